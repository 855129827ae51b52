"""Speed and memory of models beside each other, on the same work."""
import contextlib
import copy
import statistics
import sys
from pathlib import Path
from typing import (Callable, ContextManager, Dict, List, Mapping, NamedTuple,
                    Optional, Sequence, Tuple, Union)

import torch
from torch import Tensor, nn

from .complexity import count_macs, count_parameters
from .report import number
from .timing import (Spread, Step, operator_table, peak_memory, speed_ratio,
                     time_in_turn)

LAYOUTS = {'contiguous': torch.contiguous_format,
           'channels-last': torch.channels_last}
# How a model is run, by the names that columns of tables have.
MODES: Dict[str, dict] = {
    'eager': {},
    'compiled': dict(compile=True),
    'bfloat16': dict(dtype='bfloat16'),
    'float16': dict(dtype='float16'),
    'compiled-bfloat16': dict(compile=True, dtype='bfloat16'),
    # With CUDA graphs, which spare launching kernels one by one.
    'graphs-bfloat16': dict(compile='reduce-overhead', dtype='bfloat16'),
}


class Workload(NamedTuple):
    """What every model does in a step.

    Args:
        size (tuple[int, int]): (H, W) of the images in pixels.
        batch_size (int): Images of a step.
        train (bool): A step of the optimizer instead of inference.
        dtype (str): 'float32', or that of autocast.
        device (str): 'cpu' or 'cuda'.
        compile (bool | str): By torch.compile; a str is its mode.
        whole (bool): Models are detectors, from images to boxes or losses, instead
            of backbones.
        layer (str): The name of the module that is called alone, on what it is
            given in the model. Default: '', the model.
        layout (str): Of weights and images: 'contiguous', 'channels-last', or
            'best': whichever a short trial finds faster. Default: 'best'.
    """
    size: Tuple[int, int]
    batch_size: int = 8
    train: bool = False
    dtype: str = 'float32'
    device: str = 'cpu'
    compile: Union[bool, str] = False
    whole: bool = False
    layer: str = ''
    layout: str = 'best'


def compare(names: Sequence[str], build: Callable[[str], nn.Module], work: Workload,
            rounds: int = 10, warmup: int = 3, macs: bool = True,
            operators: bool = False) -> Dict[str, dict]:
    """Times of every model, in turn; memory of each by itself.

    As `compare_modes`, in one mode: what comes back is by model alone.
    """
    return compare_modes(names, build, {'': work}, rounds, warmup, macs,
                         operators)['']


def compare_modes(names: Sequence[str], build: Callable[[str], nn.Module],
                  modes: Mapping[str, Workload], rounds: int = 10, warmup: int = 3,
                  macs: bool = True,
                  operators: bool = False) -> Dict[str, Dict[str, dict]]:
    """Times of every model in every mode, in turn; memory of each by itself.

    A model that cannot be built, or fails at its first step, is left out, and stderr
    says so.

    Args:
        names (Sequence[str]): The models. Ratios are of their speeds over that of
            the first.
        build (Callable): Makes the model of a name.
        modes (Mapping[str, Workload]): What they do, by mode: workloads that
            differ in dtype, compilation and layout alone.
        rounds (int): At least 2. Default: 10.
        warmup (int): Rounds that are not counted. Default: 3.
        macs (bool): Whether to count the multiply-adds of backbones. Default: True.
        operators (bool): Whether to profile the operators too. Default: False.

    Raises:
        ValueError: If ``layer`` is no module of a model, or is not called.

    Returns:
        dict[str, dict[str, dict]]: By mode and model ``ms``, ``ms_p10``, ``ms_p90``;
        ``images_per_s``; ``ratio`` with its percentiles; ``gain``, the speed over
        that of the same model in the first mode (None: it has none there);
        ``memory_mb`` beside the weights; ``params_m`` and ``gmacs`` in millions and
        1e9 (None: not counted); ``layout``; ``profile``.
    """
    steps: Dict[Tuple[str, str], Step] = {}
    layouts, sizes, any_work = {}, {}, next(iter(modes.values()))
    for name in names:
        try:
            model = build(name).to(any_work.device)
        except (ImportError, RuntimeError) as error:  # a toolbox that is not there
            leave_out(name, str(error))
            continue
        model.train(any_work.train)  # of mmpretrain's it returns nothing
        forms = in_layouts(model, {work.layout for work in modes.values()})
        for mode, work in modes.items():
            ready = prepare(f'{name} {mode}'.strip(), forms, work)
            if ready is not None:
                layouts[mode, name], steps[mode, name] = ready
        # Those left out need their memory no more.
        sizes[name] = count(model, any_work, macs) if any(
            (mode, name) in steps for mode in modes) else {}
    for mode in modes:
        measured = [name for name in names if (mode, name) in steps]
        if measured and measured[0] != names[0]:
            print(f'{mode}: ratios are over {measured[0]}.' if mode else
                  f'Ratios are over {measured[0]}.', file=sys.stderr)
    times = time_in_turn(steps, rounds, warmup, any_work.device,
                         f'{any_work.size[0]}x{any_work.size[1]}')
    results: Dict[str, Dict[str, dict]] = {mode: {} for mode in modes}
    firsts: Dict[str, List[float]] = {}  # by mode: times of the first model
    for (mode, name), seconds in sorted(
            times.items(), key=lambda item: names.index(item[0][1])):
        step, first = steps[mode, name], firsts.setdefault(mode, seconds)
        spread, ratio = Spread.of(seconds), speed_ratio(first, seconds)
        slow = times.get((next(iter(modes)), name))
        results[mode][name] = dict(
            ms=1e3 * spread.median, ms_p10=1e3 * spread.p10, ms_p90=1e3 * spread.p90,
            images_per_s=any_work.batch_size / spread.median,
            ratio=ratio.median, ratio_p10=ratio.p10, ratio_p90=ratio.p90,
            gain=slow and speed_ratio(slow, seconds).median,
            memory_mb=peak_memory(step, any_work.device),
            layout=layouts[mode, name],
            profile=operator_table(step) if operators else None, **sizes[name])
    return results


def count(model: nn.Module, work: Workload, macs: bool) -> dict:
    """Parameters and multiply-adds, which no mode changes."""
    counted = macs and not work.whole and not work.layer
    parameters = count_parameters(model.get_submodule(work.layer))
    return dict(params_m=parameters / 1e6,
                gmacs=count_macs(model, work.size) / 1e9 if counted else None)


def in_layouts(model: nn.Module, wanted: set) -> Dict[str, nn.Module]:
    """The model as it is, and a copy with channels-last weights where one is wanted.

    A model that chooses the layout of its weights itself keeps it.
    """
    forms = {'contiguous': model}
    if wanted - {'contiguous'}:
        forms['channels-last'] = copy.deepcopy(model).to(
            memory_format=torch.channels_last)
    return forms


def prepare(title: str, forms: Mapping[str, nn.Module],
            work: Workload) -> Optional[Tuple[str, Step]]:
    """The layout and the step of a model that has taken its first; None if it fails."""
    tried = LAYOUTS if work.layout == 'best' else [work.layout]
    steps = {layout: make_step(forms[layout], work._replace(
        compile=False, layout=layout)) for layout in tried}
    errors = {layout: error for layout, step in steps.items()
              if (error := first_error(step, work)) is not None}
    if len(errors) == len(steps):
        return leave_out(title, next(iter(errors.values())))
    # Compiled, a model has the layout in which it is faster eager.
    layout = fastest({layout: step for layout, step in steps.items()
                      if layout not in errors}, work.device)
    if not work.compile:
        return layout, steps[layout]
    step = make_step(forms[layout], work._replace(layout=layout))
    error = first_error(step, work)
    return (layout, step) if error is None else leave_out(title, error)


def first_error(step: Step, work: Workload) -> Optional[str]:
    """Takes the first step, which compiles; in words what is wrong, if anything."""
    try:
        step()
    except Exception as error:
        if work.device == 'cuda':  # another model may fit into the memory
            torch.cuda.empty_cache()
        return (f'{type(error).__name__}: '
                f'{str(error).strip().partition(chr(10))[0]}')
    return None


def leave_out(title: str, error: str) -> None:
    print(f'{title} is left out: {error}', file=sys.stderr)


def fastest(steps: Dict[str, Step], device: str) -> str:
    """By the median of three rounds, after a step that each has taken."""
    if len(steps) == 1:
        return next(iter(steps))
    times = time_in_turn(steps, rounds=3, warmup=0, device=device, quiet=True)
    return min(times, key=lambda name: statistics.median(times[name]))


def make_step(model: nn.Module, work: Workload) -> Step:
    """One inference, or one forward, backward and SGD step."""
    if work.compile:
        model = torch.compile(
            model, mode=work.compile if isinstance(work.compile, str) else None)
    forward = make_forward(model, work)

    def infer() -> None:
        with torch.no_grad(), autocast(work):
            forward()

    if not work.train:
        return infer
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def train() -> None:
        with autocast(work):
            loss = sum(out.float().mean() for out in forward())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def autocast(work: Workload) -> ContextManager:
    """Other than float32: autocast."""
    if work.dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(work.device, getattr(torch, work.dtype))


def make_forward(model: nn.Module, work: Workload) -> Callable[[], object]:
    """A call that gives tensors: maps, boxes or, in training, losses."""
    if work.whole:
        return detector_forward(model, work)
    images = lay_out(
        torch.rand(work.batch_size, 3, *work.size, device=work.device), work)
    if work.layer:
        layer, inputs = find_layer(model, work.layer, images)
        return lambda: layer(*inputs)
    return lambda: model(images)


def lay_out(images: Tensor, work: Workload) -> Tensor:
    return images.contiguous(memory_format=LAYOUTS[work.layout])


def classes_of(detector: nn.Module) -> int:
    """How many classes a detector of one or two stages tells apart.

    Raises:
        ValueError: If it is another kind of model.
    """
    head = getattr(getattr(detector, 'roi_head', detector), 'bbox_head', None)
    if isinstance(head, nn.ModuleList):  # of a cascade
        head = head[0]
    if not hasattr(head, 'num_classes'):
        raise ValueError(f'{type(detector).__name__}: expected a detector with a '
                         'bbox_head')
    return head.num_classes


def detector_forward(model: nn.Module, work: Workload) -> Callable[[], List[Tensor]]:
    """From images with ten boxes each to detected boxes or to the loss."""
    from mmdet.testing import demo_mm_inputs
    n = work.batch_size
    data = demo_mm_inputs(n, [(3, *work.size)] * n, num_items=[10] * n,
                          num_classes=classes_of(model),
                          with_mask=getattr(model, 'with_mask', False))

    def forward() -> List[Tensor]:
        batch = model.data_preprocessor(data, work.train)
        batch['inputs'] = lay_out(batch['inputs'], work)
        if work.train:
            return [model.parse_losses(model(**batch, mode='loss'))[0]]
        return [r.pred_instances.bboxes for r in model(**batch, mode='predict')]

    return forward


def find_layer(model: nn.Module, name: str, images: Tensor) -> tuple:
    """A module of the model and its inputs in a forward of the images.

    Raises:
        ValueError: If there is none of that name, or it is not called.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f'layer={name}: {error}') from None
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(images)
    handle.remove()
    if not seen:
        raise ValueError(f'layer={name}: its forward is not called')
    return layer, seen[0]


def comparison_rows(results: Dict[str, dict]) -> List[dict]:
    """The results of `compare` as rows of a table, configs by their files' names."""
    rows = []
    for name, r in results.items():
        rows.append({
            'model': Path(name).stem if name.endswith('.py') else name,
            'ms (p10-p90)':
            f'{r["ms"]:.1f} ({r["ms_p10"]:.1f}-{r["ms_p90"]:.1f})',
            'images/s': number(r['images_per_s'], 2),
            'MB': number(r['memory_mb'], 0),
            'parameters, M': number(r['params_m'], 2),
            'MACs, G': number(r['gmacs'], 2),
            'layout': r['layout'],
            'speed ratio':
            f'{r["ratio"]:.2f} ({r["ratio_p10"]:.2f}-{r["ratio_p90"]:.2f})'
        })
    return rows


def mode_rows(results: Dict[str, Dict[str, dict]],
              top1: Mapping[str, float]) -> List[dict]:
    """The results of `compare_modes` with a mode's time and ratio side by side.

    Args:
        results (dict): By mode and model.
        top1 (Mapping[str, float]): Published accuracies in percent, by model.
    """
    rows = []
    for name in dict.fromkeys(name for each in results.values() for name in each):
        found = {mode: each.get(name) for mode, each in results.items()}
        known = [r for r in found.values() if r]
        row = {
            'model': Path(name).stem if name.endswith('.py') else name,
            'top-1, published': number(top1.get(name)),
            'parameters, M': number(known[0]['params_m'], 2),
            'MACs, G': number(known[0]['gmacs'], 2),
        }
        for mode, r in found.items():
            row[f'{mode}, ms'] = number(r and r['ms'])
            row[f'{mode}, speed ratio'] = number(r and r['ratio'], 2)
        row['layout'] = ' / '.join(dict.fromkeys(r['layout'] for r in known))
        rows.append(row)
    return rows
