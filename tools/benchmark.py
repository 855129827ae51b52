"""Speed and memory of backbones, or detectors, beside each other in one run.

    python tools/benchmark.py                                   # LaViT-S and its peers
    python tools/benchmark.py LaViT-S PVTv2-B2 --size 800 1344 --batch-size 1 --train
    python tools/benchmark.py LaViT-S LaViT-S-twin --scaling    # from 224 to 1600 pixels
    python tools/benchmark.py configs/retinanet_lavit_s_coco.py \\
        configs/baselines/retinanet_pvtv2-b2_coco.py --whole --size 800 1344 --batch-size 1

Models are measured in turn, round by round, so that a change of the machine's speed
meets all of them; warm-up rounds are not counted. Prints medians, their spread and
each model's speed over the first one's (the median of the rounds' ratios, and their
10th and 90th percentile), and writes JSON and a plot. MODEL is a name of MODELS, the
path of a config whose backbone is taken, or a registered class with its arguments, as
``"mmdet.ResNet(depth=101)"``; with --whole, the whole detector of the
config, from images to boxes or to a step of the optimizer; with --layer, one of its
modules on what it is given in the model:

    python tools/benchmark.py LaViT-S LaViT-S-materialised --layer stages.2.blocks.3.attn
"""
import argparse
import ast
import contextlib
import gc
import importlib
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from matplotlib.figure import Figure

# Before torch reads it: its profiler complains of a missing GPU.
os.environ.setdefault('KINETO_LOG_LEVEL', '5')
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS as REGISTRY  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from torch import nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from tqdm import tqdm  # noqa: E402

import mmlavit  # noqa: E402,F401  (registers LaViT)
from mmlavit.building import build_model  # noqa: E402
from mmlavit.complexity import count_macs  # noqa: E402
from mmlavit.lavit import ARCHS  # noqa: E402

# A profile here is one cycle.
warnings.filterwarnings('ignore', '.*Profiler clears events')


def lavit(arch: str, **kwargs) -> dict:
    return dict(type='LaViT', arch=arch, **kwargs)


def twin(arch: str) -> dict:
    """Without less attention and without residuals: vanilla attention alone."""
    return lavit(arch, num_va_layers=ARCHS[arch]['depths'],
                 attn_residual=False)


def pvtv2(layers: list) -> dict:
    return dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=64,
                num_layers=layers)


def swin(depths: list) -> dict:
    return dict(type='mmdet.SwinTransformer', embed_dims=96, depths=depths,
                num_heads=[3, 6, 12, 24], drop_path_rate=0.)


MODELS = {
    'LaViT-T': lavit('tiny'),
    'LaViT-S': lavit('small'),
    'LaViT-B': lavit('base'),
    'LaViT-T-twin': twin('tiny'),
    'LaViT-S-twin': twin('small'),
    'LaViT-B-twin': twin('base'),
    'LaViT-S-keys14': lavit('small', max_key_grid=14),
    'LaViT-S-pooled': lavit('small', value_reduction='pool'),
    'LaViT-S-keys14-pooled': lavit('small', max_key_grid=14,
                                   value_reduction='pool'),
    'LaViT-S-keys14-twin': {**twin('small'), 'max_key_grid': 14},
    'LaViT-S-factored': lavit('small', score_path='factored'),
    'LaViT-S-materialised': lavit('small', score_path='materialised'),
    'PVT-S': dict(type='mmdet.PyramidVisionTransformer',
                  num_layers=[3, 4, 6, 3]),
    'PVTv2-B1': pvtv2([2, 2, 2, 2]),
    'PVTv2-B2': pvtv2([3, 4, 6, 3]),
    'PVTv2-B3': pvtv2([3, 4, 18, 3]),
    'Swin-T': swin([2, 2, 6, 2]),
    'Swin-S': swin([2, 2, 18, 2]),
    'ConvNeXt-T': dict(type='mmpretrain.ConvNeXt', arch='tiny',
                       out_indices=(0, 1, 2, 3), gap_before_final_norm=False),
    'ResNet-50': dict(type='mmdet.ResNet', depth=50),
}
DEFAULT = ('LaViT-S', 'LaViT-S-twin', 'PVTv2-B2', 'Swin-T', 'ConvNeXt-T',
           'ResNet-50')
DTYPES = dict(float32=None, bfloat16=torch.bfloat16, float16=torch.float16)
SIDES = (224, 320, 448, 640, 896, 1280, 1600)


def build(name: str, args) -> nn.Module:
    torch.manual_seed(0)
    if args.whole:
        model = build_model(Config.fromfile(name))
    else:
        model = REGISTRY.build(backbone_config(name))
    model.to(args.device).train(args.train)
    return model


def backbone_config(name: str) -> dict:
    if name in MODELS:
        config = dict(MODELS[name])
    elif Path(name).is_file():
        file = Config.fromfile(name)
        init_default_scope(file.default_scope)
        config = file.model.backbone
    else:
        config = parse_name(name)
    config.pop('init_cfg', None)
    scope = config['type'].partition('.')[0]
    if scope in ('mmdet', 'mmseg', 'mmpretrain'):
        importlib.import_module(f'{scope}.models')  # registers them
    if REGISTRY.get(config['type']) is None:
        raise SystemExit(f'{name}: expected the path of a config, a registered '
                         f'name or one of {", ".join(MODELS)}')
    return config


def parse_name(name: str) -> dict:
    """``mmdet.ResNet(depth=101)`` as the config that it stands for."""
    try:
        call = ast.parse(name, mode='eval').body
        if not isinstance(call, ast.Call):
            return dict(type=name)
        return dict(type=ast.unparse(call.func), **{
            each.arg: ast.literal_eval(each.value) for each in call.keywords})
    except (SyntaxError, ValueError):
        return dict(type=name)


def make_forward(model: nn.Module, size: tuple, args) -> Callable:
    """A call that gives tensors: maps, boxes or, in training, losses."""
    if not args.whole:
        x = torch.rand(args.batch_size, 3, *size, device=args.device)
        if args.layer:
            layer, inputs = find_layer(model, args.layer, x)
            return lambda: layer(*inputs)
        return lambda: model(x)
    from mmdet.testing import demo_mm_inputs
    n = args.batch_size
    data = demo_mm_inputs(n, [(3, *size)] * n, num_items=[10] * n,
                          num_classes=model.bbox_head.num_classes)

    def forward() -> list:
        batch = model.data_preprocessor(data, args.train)
        if args.train:
            return [model.parse_losses(model(**batch, mode='loss'))[0]]
        return [r.pred_instances.bboxes for r in model(**batch, mode='predict')]

    return forward


def find_layer(model: nn.Module, name: str, x: torch.Tensor) -> tuple:
    """A module of the model and its inputs in a forward of ``x``."""
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise SystemExit(f'--layer {name}: {error}')
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(x)
    handle.remove()
    if not seen:
        raise SystemExit(f'--layer {name}: its forward is not called')
    return layer, seen[0]


def make_step(model: nn.Module, size: tuple, args) -> Callable[[], None]:
    """One inference, or one forward, backward and SGD step."""
    dtype = DTYPES[args.dtype]
    autocast = (torch.autocast(args.device, dtype) if dtype else
                contextlib.nullcontext())
    forward = make_forward(
        torch.compile(model) if args.compile else model, size, args)
    if not args.train:

        def step():
            with torch.no_grad(), autocast:
                forward()
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

        def step():
            with autocast:
                loss = sum(out.float().mean() for out in forward())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def synchronise(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def peak_memory(step: Callable[[], None], device: str) -> float:
    """What a step needs beside the weights, in MB of tensors."""
    gc.collect()
    if device != 'cuda':
        # The process's own memory would tell what the other models left.
        with profile(activities=[ProfilerActivity.CPU],
                     profile_memory=True) as run:
            step()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, 'trace.json')
            run.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())['traceEvents']
        events = sorted((event['ts'], event['args']['Bytes'])
                        for event in events if event['name'] == '[memory]')
        return max(itertools.accumulate(n for _, n in events), default=0) / 1e6
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def profile_table(step: Callable[[], None]) -> str:
    """Where the time of a step goes, by operator."""
    with profile() as run:
        step()
    return run.key_averages().table(
        sort_by='self_cpu_time_total', row_limit=12, max_name_column_width=40)


def compare(names: List[str], size: tuple, args) -> Dict[str, dict]:
    """Times of every model, interleaved; memory of each by itself."""
    models = {name: build(name, args) for name in names}
    steps = {name: step for name, model in models.items()
             if works(name, step := make_step(model, size, args))}
    models = {name: models[name] for name in steps}  # the others' memory is free
    times = {name: [] for name in steps}
    if steps and names[0] not in steps:
        print(f'Ratios are over {next(iter(steps))}.', file=sys.stderr)
    for i in tqdm(range(args.warmup + args.rounds),
                  f'{size[0]}x{size[1]}', disable=None):
        for name, step in steps.items():
            synchronise(args.device)
            begin = time.perf_counter()
            step()
            synchronise(args.device)
            if i >= args.warmup:
                times[name].append(time.perf_counter() - begin)
    results = {}
    for name, step in steps.items():
        low, median, high = percentiles(times[name])
        ratios = percentiles(
            [a / b for a, b in zip(next(iter(times.values())), times[name])])
        results[name] = dict(
            ms=1e3 * median, ms_p10=1e3 * low, ms_p90=1e3 * high,
            images_per_s=args.batch_size / median,
            ratio=ratios[1], ratio_p10=ratios[0], ratio_p90=ratios[2],
            memory_mb=peak_memory(step, args.device),
            params_m=sum(
                p.numel() for p in
                models[name].get_submodule(args.layer).parameters()) / 1e6,
            profile=profile_table(step) if args.profile else None,
            gmacs=None if args.no_macs or args.whole or args.layer else
            count_macs(models[name], size) / 1e9)
    return results


def works(name: str, step: Callable) -> bool:
    """Takes the first step, which compiles; a model that fails there is left out."""
    try:
        step()
    except Exception as error:
        print(f'{name} is left out: {type(error).__name__}: '
              f'{str(error).strip().partition(chr(10))[0]}', file=sys.stderr)
        return False
    return True


def percentiles(values: List[float]) -> Tuple[float, float, float]:
    """The 10th, 50th and 90th."""
    low, *_, high = statistics.quantiles(values, n=10, method='inclusive')
    return low, statistics.median(values), high


def table(results: Dict[str, dict]) -> str:
    lines = [f'{"model":<30}{"ms":>9}{"p10":>9}{"p90":>9}{"images/s":>10}'
             f'{"MB":>8}{"params M":>10}{"GMACs":>8}{"speed ratio":>20}']
    for name, r in results.items():
        macs = '' if r['gmacs'] is None else f'{r["gmacs"]:.2f}'
        name = Path(name).stem
        lines.append(
            f'{name:<30}{r["ms"]:9.1f}{r["ms_p10"]:9.1f}{r["ms_p90"]:9.1f}'
            f'{r["images_per_s"]:10.2f}{r["memory_mb"]:8.0f}'
            f'{r["params_m"]:10.2f}{macs:>8}'
            f'{r["ratio"]:8.2f} ({r["ratio_p10"]:.2f}-{r["ratio_p90"]:.2f})')
    return '\n'.join(lines)


def plot(results: Dict[str, Dict[str, dict]], title: str, path: Path) -> None:
    """Bars at one size; time and memory against pixels at several."""
    names = list(dict.fromkeys(itertools.chain(*results.values())))
    if len(results) == 1:
        rows, = results.values()
        fig = Figure(figsize=(7, .4 * len(names) + 1.2))
        ax = fig.subplots()
        ax.barh([Path(name).stem for name in names],
                [rows[name]['images_per_s'] for name in names])
        ax.invert_yaxis()
        ax.set_xlabel('images/s')
    else:
        fig = Figure(figsize=(11, 4.2))
        axes = fig.subplots(1, 2)
        for ax, key in zip(axes, ('ms', 'memory_mb')):
            for name in names:
                sizes = [tuple(map(int, size.split('x')))
                         for size, r in results.items() if name in r]
                ax.loglog([h * w for h, w in sizes],
                          [r[name][key] for r in results.values() if name in r],
                          'o-', label=name)
            ax.set_xlabel('pixels')
            ax.set_ylabel(key)
            ax.grid(alpha=.3, which='both')
        axes[0].legend()
    fig.suptitle(title, fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=90)


def parse_args(args: Optional[list]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=list(DEFAULT),
                        metavar='MODEL', help=f'{", ".join(MODELS)}; a config; or a '
                        'registered name with its arguments')
    parser.add_argument('--size', type=int, nargs=2, default=(224, 224),
                        metavar=('H', 'W'))
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--train', action='store_true',
                        help='a training step instead of inference')
    parser.add_argument('--dtype', choices=DTYPES, default='float32',
                        help='other than float32: autocast')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--whole', action='store_true',
                        help='whole detectors; every MODEL is a config')
    parser.add_argument('--layer', default='', metavar='NAME',
                        help='this module of each model alone, in inference')
    parser.add_argument('--scaling', action='store_true',
                        help=f'squares of {SIDES} pixels, instead of --size')
    parser.add_argument('--profile', action='store_true',
                        help='also the operators that each model spends time in')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--warmup', type=int, default=3)
    parser.add_argument('--no-macs', action='store_true')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available()
                        else 'cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--out', type=Path,
                        default=Path('work_dirs/benchmark'))
    args = parser.parse_args(args)
    if args.whole and not all(Path(name).is_file() for name in args.models):
        parser.error(f'--whole {" ".join(args.models)}: expected the paths of '
                     'configs of detectors')
    if args.layer and (args.train or args.compile or args.whole):
        parser.error('--layer takes no --train, --compile or --whole')
    if args.rounds < 2:
        parser.error(f'--rounds {args.rounds}: at least 2, for a spread')
    return args


def main(args: Optional[list] = None) -> None:
    args = parse_args(args)
    logging.disable(logging.WARNING)
    device = (torch.cuda.get_device_name() if args.device == 'cuda' else
              f'{torch.get_num_threads()} CPU threads ({platform.machine()})')
    title = (f'{device}, torch {torch.__version__}, batch {args.batch_size}, '
             f'{args.dtype}, {"training step" if args.train else "inference"}'
             f'{", compiled" if args.compile else ""}')
    print(title)
    sizes = [(s, s) for s in SIDES] if args.scaling else [tuple(args.size)]
    results = {}
    for size in sizes:
        rows = compare(args.models, size, args)
        if not rows:  # the smaller sizes are kept
            continue
        results[f'{size[0]}x{size[1]}'] = rows
        print(f'\n{size[0]} x {size[1]}\n{table(rows)}')
        for name, row in rows.items():
            if row['profile']:
                print(f'\n{name}\n{row["profile"]}')
    if not results:
        raise SystemExit('No model is left to be measured.')
    args.out.mkdir(parents=True, exist_ok=True)
    options = {k: str(v) for k, v in vars(args).items()}
    (args.out / 'benchmark.json').write_text(json.dumps(
        dict(device=device, torch=torch.__version__, options=options,
             results=results), indent=1) + '\n')
    plot(results, title if args.scaling else f'{next(iter(results))}, {title}',
         args.out / 'benchmark.png')
    print(f'\nwritten to {args.out}')


if __name__ == '__main__':
    main()
