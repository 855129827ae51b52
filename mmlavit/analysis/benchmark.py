"""Speed and memory of models beside each other, on the same work."""
import contextlib
import sys
from pathlib import Path
from typing import Callable, ContextManager, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn

from .complexity import count_macs
from .report import number
from .timing import Spread, Step, operator_table, peak_memory, time_in_turn


class Workload(NamedTuple):
    """What every model does in a step.

    Args:
        size (tuple[int, int]): (H, W) of the images in pixels.
        batch_size (int): Images of a step.
        train (bool): A step of the optimizer instead of inference.
        dtype (str): 'float32', or that of autocast.
        device (str): 'cpu' or 'cuda'.
        compile (bool): By torch.compile.
        whole (bool): Models are detectors, from images to boxes or losses, instead
            of backbones.
        layer (str): The name of the module that is called alone, on what it is
            given in the model. Default: '', the model.
    """
    size: Tuple[int, int]
    batch_size: int = 8
    train: bool = False
    dtype: str = 'float32'
    device: str = 'cpu'
    compile: bool = False
    whole: bool = False
    layer: str = ''


def compare(names: Sequence[str], build: Callable[[str], nn.Module], work: Workload,
            rounds: int = 10, warmup: int = 3, macs: bool = True,
            operators: bool = False) -> Dict[str, dict]:
    """Times of every model, in turn; memory of each by itself.

    A model that fails at its first step is left out, and stderr says so.

    Args:
        names (Sequence[str]): The models. Ratios are of their speeds over that of
            the first.
        build (Callable): Makes the model of a name.
        work (Workload): What they do.
        rounds (int): At least 2. Default: 10.
        warmup (int): Rounds that are not counted. Default: 3.
        macs (bool): Whether to count the multiply-adds of backbones. Default: True.
        operators (bool): Whether to profile the operators too. Default: False.

    Raises:
        ValueError: If ``work.layer`` is no module of a model, or is not called.

    Returns:
        dict[str, dict]: ``ms``, ``ms_p10``, ``ms_p90``; ``images_per_s``; ``ratio``
        with its percentiles; ``memory_mb`` beside the weights; ``params_m`` and
        ``gmacs`` in millions and 1e9 (None: not counted); ``profile``.
    """
    models = {name: build(name).to(work.device) for name in names}
    for model in models.values():
        model.train(work.train)
    steps = {name: step for name, model in models.items()
             if works(name, step := make_step(model, work))}
    models = {name: models[name] for name in steps}  # the others' memory is free
    if steps and names[0] not in steps:
        print(f'Ratios are over {next(iter(steps))}.', file=sys.stderr)
    times = time_in_turn(steps, rounds, warmup, work.device,
                         f'{work.size[0]}x{work.size[1]}')
    results = {}
    for name, step in steps.items():
        seconds, first = Spread.of(times[name]), next(iter(times.values()))
        ratio = Spread.of([a / b for a, b in zip(first, times[name])])
        measured = models[name].get_submodule(work.layer)
        results[name] = dict(
            ms=1e3 * seconds.median, ms_p10=1e3 * seconds.p10,
            ms_p90=1e3 * seconds.p90,
            images_per_s=work.batch_size / seconds.median,
            ratio=ratio.median, ratio_p10=ratio.p10, ratio_p90=ratio.p90,
            memory_mb=peak_memory(step, work.device),
            params_m=sum(p.numel() for p in measured.parameters()) / 1e6,
            profile=operator_table(step) if operators else None,
            gmacs=count_macs(models[name], work.size) / 1e9
            if macs and not work.whole and not work.layer else None)
    return results


def works(name: str, step: Step) -> bool:
    """Takes the first step, which compiles; a model that fails there is left out."""
    try:
        step()
    except Exception as error:
        print(f'{name} is left out: {type(error).__name__}: '
              f'{str(error).strip().partition(chr(10))[0]}', file=sys.stderr)
        return False
    return True


def make_step(model: nn.Module, work: Workload) -> Step:
    """One inference, or one forward, backward and SGD step."""
    forward = make_forward(torch.compile(model) if work.compile else model, work)

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
    images = torch.rand(work.batch_size, 3, *work.size, device=work.device)
    if work.layer:
        layer, inputs = find_layer(model, work.layer, images)
        return lambda: layer(*inputs)
    return lambda: model(images)


def detector_forward(model: nn.Module, work: Workload) -> Callable[[], List[Tensor]]:
    """From images with ten boxes each to detected boxes or to the loss."""
    from mmdet.testing import demo_mm_inputs
    n = work.batch_size
    data = demo_mm_inputs(n, [(3, *work.size)] * n, num_items=[10] * n,
                          num_classes=model.bbox_head.num_classes)

    def forward() -> List[Tensor]:
        batch = model.data_preprocessor(data, work.train)
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
            'speed ratio':
            f'{r["ratio"]:.2f} ({r["ratio_p10"]:.2f}-{r["ratio_p90"]:.2f})'
        })
    return rows
