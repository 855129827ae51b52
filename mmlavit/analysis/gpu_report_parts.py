"""The parts of `gpu_report`: each gives its figures and its piece of the page."""
import contextlib
import io
import os
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple
from xml.etree import ElementTree

import torch
from torch import Tensor

from ..models.layers.attend import MAX_BUILT_SCORES
from .benchmark import MODES, Workload, compare_modes, make_step, mode_rows
from .complexity import count_macs
from .logs import read_scalars
from .made_coco import make_coco
from .peers import TIMM_PEERS, build_backbone, published_top1
from .report import markdown_table, number, without_empty_columns
from .timing import Spread, peak_memory, profile_kernels, time_in_turn

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / 'configs/published.yml'
# TFLOP/s of dense bfloat16 products by the data sheets; the first that fits the name.
DATA_SHEETS = {'H100 PCIe': 756, 'H100': 989, 'H200': 989, 'A100': 312, 'L40S': 362,
               'L4': 121, 'A10': 125}


class Bench(NamedTuple):
    """A benchmark: its models, what they do, and in which modes."""
    models: Sequence[str]
    size: Tuple[int, int]
    batch_size: int
    modes: Sequence[str]
    train: bool = False
    rounds: int = 10

    @property
    def title(self) -> str:
        return (f'{"Training step" if self.train else "Inference"}, '
                f'{self.size[0]} x {self.size[1]}, batch {self.batch_size}')


class Plan(NamedTuple):
    """How much of everything."""
    device: str
    tests: Sequence[str]  # arguments of pytest
    benches: Dict[str, Bench]
    profiles: Dict[str, Bench]  # of which the first model's kernels are listed
    pieces: Bench  # for MAX_BUILT_SCORES
    piece_sizes: Sequence[int]  # powers of 2
    product_side: int  # of the matrices whose product gives the peak
    images: int  # of the RetinaNet's training, two an iteration
    image_size: Tuple[int, int]  # (width, height) of them
    train_options: Sequence[str]  # further options of tools/train.py


OURS = ('LaViT-S', 'LaViT-S-twin', 'LaViT-T', 'LaViT-T-twin', 'LaViT-B',
        'LaViT-B-twin', 'LaViT-S-keys14', 'LaViT-S-keys14-twin')
TOOLBOXES = ('PVTv2-B2', 'Swin-T', 'ConvNeXt-T', 'ResNet-50')
ALL = (*OURS, *TIMM_PEERS, *TOOLBOXES)
SOME = ('LaViT-S', 'LaViT-S-twin', 'LaViT-S-keys14', 'LaViT-T', 'LaViT-B',
        'PVTv2-B2-timm', 'Swin-T-timm', 'ConvNeXt-T-timm', 'ResNet-50-timm',
        'FastViT-SA24', 'CAFormer-S18')
FEW = ('LaViT-S', 'LaViT-S-twin', 'PVTv2-B2-timm', 'Swin-T-timm', 'ConvNeXt-T-timm')
TYPES = ('eager', 'bfloat16', 'float16')
TWO_TYPES = ('eager', 'bfloat16')
COMPILED = ('bfloat16', 'compiled-bfloat16')
DETECTION = (800, 1344)

FULL = Plan(
    device='cuda',
    tests=('-m', 'cuda', 'tests/models'),
    benches={
        'inference-224': Bench(ALL, (224, 224), 128, TYPES),
        'training-224': Bench(ALL, (224, 224), 128, TWO_TYPES, True, 5),
        'inference-800x1344': Bench(ALL, DETECTION, 2, TYPES),
        'training-800x1344': Bench(ALL, DETECTION, 2, TWO_TYPES, True, 5),
        'inference-512': Bench(SOME, (512, 512), 32, TWO_TYPES),
        'training-512': Bench(SOME, (512, 512), 16, TWO_TYPES, True, 5),
        'compiled-inference-224': Bench(FEW, (224, 224), 128, COMPILED),
        'compiled-inference-800x1344': Bench(
            FEW, DETECTION, 2, (*COMPILED, 'graphs-bfloat16')),
        'compiled-training-224': Bench(
            (*FEW[:2], 'Swin-T-timm'), (224, 224), 128, COMPILED, True, 5),
    },
    profiles={
        'inference, 224': Bench(FEW, (224, 224), 128, ('bfloat16', )),
        'training, 224': Bench(FEW, (224, 224), 128, ('bfloat16', ), True),
        'inference, 800 x 1344': Bench(FEW, DETECTION, 2, ('bfloat16', )),
        'training, 800 x 1344': Bench(FEW, DETECTION, 2, ('bfloat16', ), True),
    },
    pieces=Bench(('LaViT-S', ), DETECTION, 2, ('bfloat16', ), True),
    piece_sizes=(21, 23, 25, 27, 29),
    product_side=8192,
    images=100,
    image_size=(1333, 800),
    train_options=('--amp', ))

SMALL = Plan(
    device='cpu',
    tests=('tests/models/layers/test_attention.py', '-k', 'hand_computed'),
    benches={
        'inference-64': Bench(
            ('LaViT-T', 'FastViT-SA24'), (64, 64), 2, ('eager', 'bfloat16'),
            rounds=2),
        'training-64': Bench(('LaViT-T', ), (64, 64), 2, ('eager', ), True, 2),
    },
    profiles={
        'inference, 64': Bench(('LaViT-T', ), (64, 64), 2, ('eager', ), rounds=2),
        'training, 64': Bench(('LaViT-T', ), (64, 64), 2, ('eager', ), True, 2),
    },
    pieces=Bench(('LaViT-T', ), (64, 96), 1, ('eager', ), True, 2),
    piece_sizes=(8, 20),
    product_side=128,
    images=4,
    image_size=(96, 64),
    train_options=())


Part = Callable[[Plan, Path], dict]


def parts_of(plan: Plan) -> Dict[str, Part]:
    """By name, in the order of their worth where the time does not last for all."""
    first, *rest = plan.benches
    return {
        'operators': run_operators,
        'tests': run_tests,
        first: partial(run_benchmark, name=first),
        'profile': run_profile,
        'retinanet': run_retinanet,
        **{name: partial(run_benchmark, name=name) for name in rest},
        'pieces': run_pieces,
    }


# mmcv's operators ---------------------------------------------------------------
def run_operators(plan: Plan, out: Path) -> dict:
    """mmcv's compiled operators on the device against the CPU's."""
    rows = []
    for name, call in operator_calls().items():
        try:
            difference = compare_devices(call, plan.device)
            rows.append(dict(operator=name, runs='yes',
                             difference=f'{difference:.1e}'))
        except Exception as error:  # whatever an operator that is not there raises
            rows.append(dict(operator=name, runs=f'no: {type(error).__name__}: '
                             f'{str(error)[:200]}', difference=''))
    return dict(rows=rows, markdown='## Operators of mmcv\n\nThe largest difference '
                'of their results from the CPU\'s.\n\n' + markdown_table(rows))


def operator_calls() -> Dict[str, Callable[[str], Tensor]]:
    """What detectors call, as functions of the device; their inputs are the same."""
    from mmcv import ops
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 4, 16, 16, generator=generator)
    corners = torch.rand(20, 2, generator=generator) * 8
    boxes = torch.cat([corners, corners + 4], 1)
    scores = torch.rand(20, generator=generator)
    regions = torch.cat([torch.zeros(20, 1), boxes], 1)
    offsets = torch.rand(2, 18, 16, 16, generator=generator)
    weight = torch.rand(4, 4, 3, 3, generator=generator)
    mask = torch.rand(2, 9, 16, 16, generator=generator)

    def on(device: str, *tensors: Tensor) -> List[Tensor]:
        return [x.to(device) for x in tensors]

    return {
        'nms': lambda device: ops.nms(*on(device, boxes, scores), 0.3)[0],
        'RoIAlign': lambda device: ops.roi_align(*on(device, maps, regions), 7),
        'deformable convolution': lambda device: ops.deform_conv2d(
            *on(device, maps, offsets, weight), 1, 1),
        'modulated deformable convolution': lambda device: ops.modulated_deform_conv2d(
            *on(device, maps, offsets, mask, weight), None, 1, 1),
        'focal loss': lambda device: focal_loss(*on(device, boxes)),
    }


def focal_loss(logits: Tensor) -> Tensor:
    """mmcv's on a GPU; it has none for CPUs, where it is the formula."""
    from mmcv import ops
    classes = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    if logits.device.type != 'cpu':
        return ops.sigmoid_focal_loss(logits, classes, 2., .25, None, 'none')
    target = torch.nn.functional.one_hot(classes, logits.shape[1]).float()
    p = (logits * (2 * target - 1)).sigmoid()  # of what is right
    return -(.25 * target + .75 * (1 - target)) * (1 - p)**2 * p.log()


def compare_devices(call: Callable[[str], Tensor], device: str) -> float:
    """The largest difference between a device's result and the CPU's."""
    return (call(device).cpu() - call('cpu')).abs().max().item()


# Tests --------------------------------------------------------------------------
def run_tests(plan: Plan, out: Path) -> dict:
    """The suite's tests on the device."""
    report = (out / 'parts/tests.xml').resolve()
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', *plan.tests, '-q', '-p', 'no:cacheprovider',
         f'--junitxml={report}'], cwd=ROOT)
    if done.returncode not in (0, 1):
        raise RuntimeError(f'pytest ended with {done.returncode}')
    cases = list(ElementTree.parse(report).iter('testcase'))
    failed = [f'{case.get("classname")}::{case.get("name")}' for case in cases
              if case.find('failure') is not None or case.find('error') is not None]
    skipped = sum(case.find('skipped') is not None for case in cases)
    lines = [f'## Tests\n\n`pytest {" ".join(plan.tests)}`: {len(cases)} tests, '
             f'{len(failed)} failed, {skipped} skipped.']
    lines += [f'- `{name}`' for name in failed]
    return dict(tests=len(cases), failed=failed, skipped=skipped,
                markdown='\n'.join(lines))


# Benchmarks ---------------------------------------------------------------------
def works_of(bench: Bench, device: str) -> Dict[str, Workload]:
    """What a benchmark's models do, by mode."""
    return {mode: Workload(bench.size, bench.batch_size, bench.train, device=device,
                           **MODES[mode]) for mode in bench.modes}


def builder_of(bench: Bench) -> Callable:
    return partial(build_backbone, size=bench.size, fuse=not bench.train)


def run_benchmark(plan: Plan, out: Path, name: str) -> dict:
    """Times and memory of a table's models."""
    bench = plan.benches[name]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        results = compare_modes(bench.models, builder_of(bench),
                                works_of(bench, plan.device), bench.rounds,
                                warmup=1, macs=not bench.train)
    print(said.getvalue())
    rows = mode_rows(results, published_top1(bench.models, PUBLISHED))
    memory = [{'model': model, **{
        f'{mode}, MB': number(each[model]['memory_mb'] if model in each else None, 0)
        for mode, each in results.items()}} for model in
        dict.fromkeys(model for each in results.values() for model in each)]
    left_out = [line for line in said.getvalue().splitlines()
                if ' is left out: ' in line]
    markdown = [f'## {bench.title}']
    if rows:
        markdown += [markdown_table(without_empty_columns(rows)),
                     'Peak memory of a step beside the weights:', markdown_table(memory)]
    if left_out:
        markdown.append('\n'.join(f'- {line}' for line in left_out))
    return dict(results=results, left_out=left_out, markdown='\n\n'.join(markdown))


# Profile ------------------------------------------------------------------------
def run_profile(plan: Plan, out: Path) -> dict:
    """Rate of arithmetic and use of the device; the kernels that take the time."""
    peak = measure_peak(plan)
    sheet = peak_by_data_sheet(plan.device)
    rows, tables = [], []
    for title, bench in plan.profiles.items():
        (_, work), = works_of(bench, plan.device).items()
        for name in bench.models:
            row, kernels = profile_model(name, bench, work, sheet or peak)
            rows.append({'step': title, 'model': name, **row})
            if name == bench.models[0]:
                tables.append((f'{name}, {title}', kernels))
    lines = [
        '## Profile',
        f'Products of {plan.product_side} x {plan.product_side} matrices in '
        f'{work.dtype}: {peak:.4g} TFLOP/s. ' +
        ('' if sheet is None else f'By the data sheet: {sheet} TFLOP/s. ') +
        '*Busy*: the share of the step in which kernels run; what is missing from '
        '100 % is waiting for launches. A training step counts as three times the '
        'multiply-adds of inference.', markdown_table(rows)]
    for title, kernels in tables:
        lines += [f'### {title}', markdown_table(kernels)]
    return dict(peak_tflops=peak, data_sheet_tflops=sheet, rows=rows,
                kernels=dict(tables), markdown='\n\n'.join(lines))


def profile_model(name: str, bench: Bench, work: Workload,
                  peak: float) -> Tuple[dict, List[dict]]:
    """A row of the summary, and the kernels that take the most time."""
    model = builder_of(bench)(name).to(
        work.device, memory_format=torch.channels_last)
    model.train(work.train)
    macs = count_macs(model, work.size) * work.batch_size
    step = make_step(model, work._replace(layout='channels-last'))
    times = time_in_turn({name: step}, bench.rounds, 3, work.device, quiet=True)[name]
    seconds, kernels = Spread.of(times).median, profile_kernels(step, work.device)
    flops = 2 * macs * (3 if work.train else 1) / seconds / 1e12
    row = {'ms': number(1e3 * seconds), 'TFLOP/s': f'{flops:.3g}',
           'of the peak, %': number(100 * flops / peak),
           'launches': kernels.calls,
           'busy, %': number(min(100., kernels.busy_ms / seconds / 10))}
    return row, [{'kernel': each['kernel'][:90], 'calls': each['calls'],
                  'ms': number(each['ms'], 2),
                  'share, %': number(100 * each['share'])}
                 for each in kernels.rows[:20]]


def measure_peak(plan: Plan) -> float:
    """TFLOP/s of the products of large square matrices, in the profile's type."""
    (_, work), = works_of(next(iter(plan.profiles.values())), plan.device).items()
    side = plan.product_side
    a, b = (torch.rand(side, side, device=plan.device,
                       dtype=getattr(torch, work.dtype)) for _ in range(2))
    times = time_in_turn({'': lambda: a @ b}, 20, 5, plan.device, quiet=True)['']
    return 2 * side**3 / Spread.of(times).median / 1e12


def peak_by_data_sheet(device: str) -> Optional[float]:
    """TFLOP/s in bfloat16; None for a card that is not listed."""
    name = torch.cuda.get_device_name() if device == 'cuda' else ''
    return next((peak for part, peak in DATA_SHEETS.items()
                 if re.search(rf'\b{part}\b', name)), None)


# Pieces of scores ---------------------------------------------------------------
def run_pieces(plan: Plan, out: Path) -> dict:
    """Time and memory against the scores that may be built at once."""
    bench, kind = plan.pieces, 'gpu' if plan.device == 'cuda' else 'cpu'
    default, rows = MAX_BUILT_SCORES[kind], []
    model = builder_of(bench)(bench.models[0]).to(
        plan.device, memory_format=torch.channels_last)
    model.train(bench.train)
    (_, work), = works_of(bench, plan.device).items()
    step = make_step(model, work._replace(layout='channels-last'))
    for power in plan.piece_sizes:
        MAX_BUILT_SCORES[kind] = 2**power
        times = time_in_turn({'': step}, bench.rounds, 2, plan.device, quiet=True)['']
        rows.append({'scores at once': f'2^{power}',
                     'ms': number(1e3 * Spread.of(times).median),
                     'MB': number(peak_memory(step, plan.device), 0)})
    MAX_BUILT_SCORES[kind] = default
    return dict(rows=rows, default=default, markdown=(
        f'## Inherited scores in pieces\n\n{bench.models[0]}, {bench.title}, '
        f'{work.dtype}. `MAX_BUILT_SCORES[{kind!r}]` is {default} now.\n\n' +
        markdown_table(rows)))


# Training -----------------------------------------------------------------------
def run_retinanet(plan: Plan, out: Path) -> dict:
    """An epoch of the RetinaNet's config on made images, by the users' tool."""
    data, work_dir = out / 'made_coco', out / 'retinanet'
    make_coco(data, plan.images, plan.image_size)
    dataset = 'train_dataloader.dataset'
    command = [
        sys.executable, 'tools/train.py', 'configs/retinanet_lavit_s_coco.py',
        '--work-dir', str(work_dir.resolve()), *plan.train_options, '--cfg-options',
        'model.backbone.init_cfg=None', f'{dataset}.data_root={data.resolve()}/',
        f'{dataset}.ann_file=train.json', f'{dataset}.data_prefix.img=images/',
        f'{dataset}.pipeline.2.scale=({plan.image_size[0]},{plan.image_size[1]})',
        'train_dataloader.batch_size=2', 'train_cfg.max_epochs=1',
        'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None',
        'default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=100'
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=dict(os.environ))
    lines = [line for line in read_scalars(work_dir) if 'loss' in line]
    later = lines[len(lines) // 2:]  # after the first, which are slower
    rows = [{
        'iterations': len(lines),
        's an iteration': number(statistics.median(x['time'] for x in later), 3),
        'of which data': number(statistics.median(x['data_time'] for x in later), 3),
        'MB': max(x.get('memory', 0) for x in lines),
        'loss, first': number(lines[0]['loss'], 3),
        'last': number(lines[-1]['loss'], 3),
    }]
    shown = ' '.join(['configs/retinanet_lavit_s_coco.py', *plan.train_options])
    return dict(scalars=lines, markdown=(
        f'## Training of a RetinaNet\n\n`{shown}`, batch 2, {plan.image_size[0]} x '
        f'{plan.image_size[1]}, made images. The median of the second half.\n\n' +
        markdown_table(rows)))
