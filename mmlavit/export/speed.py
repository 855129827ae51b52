"""Speed of exported backbones beside PyTorch's, in one run."""
import contextlib
import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..analysis.peers import backbone_config, build_backbone
from ..analysis.timing import Spread, Step, speed_ratio, time_in_turn
from ..models.backbones.lavit import LaViT
from .choose import choose_part
from .parts import Part
from .programs import export_program, to_fixed_onnx, to_onnx
from .shrink import quantise_linear
from .verify import openvino_core

# What can run which type of numbers; 'int8' has linear layers alone in int8.
RUNTIMES = dict(
    eager=('float32', 'bfloat16'),
    compiled=('float32', 'bfloat16'),
    onnxruntime=('float32', 'int8'),
    openvino=('float32', 'bfloat16', 'int8'))
DTYPES = ('float32', 'bfloat16', 'int8')


class Way(NamedTuple):
    """A model in a runtime."""
    model: str
    dtype: str
    runtime: str


class Exported(NamedTuple):
    """A backbone and its files."""
    part: Part
    files: Dict[str, Path]  # by type: 'float32', 'int8'
    sizes: str  # 'any' or 'fixed'


def compare(names: Sequence[str], size: Tuple[int, int, int], folder: Path,
            runtimes: Sequence[str] = tuple(RUNTIMES),
            dtypes: Sequence[str] = DTYPES, rounds: int = 10,
            warmup: int = 3) -> List[Dict[str, str]]:
    """Times of every model in every runtime, in turn.

    Args:
        names (Sequence[str]): The models, as for `build_backbone`.
        size (tuple[int, int, int]): Batch, height and width in pixels.
        folder (Path): Where the ONNX files go.
        runtimes (Sequence[str]): Of `RUNTIMES`. Default: all.
        dtypes (Sequence[str]): Of `DTYPES`. Default: all.
        rounds (int): At least 2. Default: 10.
        warmup (int): Rounds that are not counted. Default: 3.

    Returns:
        list[dict[str, str]]: Rows of a table, one for each model and type: median
        milliseconds of a batch with their 10th and 90th percentile, and behind them
        the speed over eager PyTorch with the same type, for 'int8' over that with
        float32: the median of the rounds' ratios.
    """
    for name in names:  # a wrong one is named before work is done
        with contextlib.suppress(ImportError):  # it is left out below
            backbone_config(name)
    steps: Dict[Way, Step] = {}
    sizes = {}
    needs_files = not {'eager', 'compiled'}.issuperset(runtimes)
    for name in names:
        try:
            exported = export_backbone(name, size, folder, needs_files)
        except (ImportError, RuntimeError) as error:
            print(f'{name} is left out: {error}', file=sys.stderr)
            continue
        sizes[name] = exported.sizes
        for runtime in runtimes:
            for dtype in dtypes:
                if dtype in RUNTIMES[runtime]:
                    way = Way(name, dtype, runtime)
                    add_step(steps, way, exported, size)
    times = time_in_turn(steps, rounds, warmup, 'cpu', 'x'.join(map(str, size)))
    return [row(name, dtype, sizes[name], times, runtimes)
            for name in names for dtype in dtypes
            if any(way[:2] == (name, dtype) for way in times)]


def add_step(steps: Dict[Way, Step], way: Way, exported: Exported,
             size: Tuple[int, int, int]) -> None:
    """Adds what is timed, unless it fails; stderr says so."""
    try:
        step = make_step(way, exported, exported.part.example(*size))
        step()  # which compiles
    except Exception as error:  # whatever a runtime may raise
        print(f'{" ".join(way)} is left out: {error}', file=sys.stderr)
    else:
        steps[way] = step


def export_backbone(name: str, size: Tuple[int, int, int], folder: Path,
                    needs_files: bool = True) -> Exported:
    """Exports LaViT for any size, others for the one that is measured: their best."""
    model = nn.Module()
    model.backbone = build_backbone(name)
    part = choose_part(model, 'backbone')
    if not needs_files:
        return Exported(part, {}, '')
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r'\W+', '_', Path(name).name)
    files = {dtype: folder / f'{stem}_{dtype}.onnx'
             for dtype in ('float32', 'int8')}
    if isinstance(model.backbone, LaViT):
        to_onnx(export_program(part), part, files['float32'])
        sizes = 'any'
    else:  # for any size, torch takes long with some of them, and fails with others
        to_fixed_onnx(part, size, files['float32'])
        sizes = 'fixed'
    files['int8'].write_bytes(files['float32'].read_bytes())
    quantise_linear(files['int8'], [dict(images=part.example(*size)[0].numpy())])
    return Exported(part, files, sizes)


def make_step(way: Way, exported: Exported, inputs: Tuple[Tensor, ...]) -> Step:
    """One inference."""
    if way.runtime in ('eager', 'compiled'):
        return torch_step(way, exported.part, inputs)
    path = exported.files['int8' if way.dtype == 'int8' else 'float32']
    start = dict(onnxruntime=onnxruntime_step, openvino=openvino_step)[way.runtime]
    return start(path, way.dtype, inputs[0].numpy())


def torch_step(way: Way, part: Part, inputs: Tuple[Tensor, ...]) -> Step:
    run = torch.compile(part) if way.runtime == 'compiled' else part

    def step() -> None:
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16,
                                             enabled=way.dtype == 'bfloat16'):
            run(*inputs)

    return step


def onnxruntime_step(path: Path, dtype: str, images) -> Step:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its threads go on spinning while the next model runs.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(
        path, options, providers=['CPUExecutionProvider'])
    return lambda: session.run(None, {'images': images})


def openvino_step(path: Path, dtype: str, images) -> Step:
    model = openvino_core().compile_model(path, 'CPU', {
        'INFERENCE_PRECISION_HINT': 'bf16' if dtype == 'bfloat16' else 'f32',
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
        'PERFORMANCE_HINT': 'LATENCY'})
    return lambda: model([images], share_inputs=True, share_outputs=True)


def row(name: str, dtype: str, sizes: str, times: Dict[Way, List[float]],
        runtimes: Sequence[str]) -> Dict[str, str]:
    """Milliseconds by runtime, with the speed over eager PyTorch."""
    base = 'float32' if dtype == 'int8' else dtype
    eager = times.get(Way(name, base, 'eager'))
    cells = {'model': Path(name).stem if name.endswith('.py') else name,
             'exported sizes': sizes, 'precision': dtype}
    for runtime in runtimes:
        own = times.get(Way(name, dtype, runtime))
        cells[f'{runtime}, ms'] = '' if own is None else cell(own, eager)
    return cells


def cell(own: Sequence[float], eager: Sequence[float]) -> str:
    low, median, high = (f'{1e3 * x:.0f}' for x in (
        Spread.of(own).p10, Spread.of(own).median, Spread.of(own).p90))
    text = f'{median} ({low}-{high})'
    if eager is None or eager is own:
        return text
    return f'{text}, x{speed_ratio(eager, own).median:.2f}'
