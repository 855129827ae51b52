"""Speed and memory of backbones, or detectors, beside each other in one run.

    python tools/benchmark.py                                   # LaViT-S and its peers
    python tools/benchmark.py LaViT-S PVTv2-B2 --size 800 1344 --batch-size 1 --train
    python tools/benchmark.py LaViT-S LaViT-S-twin --scaling    # from 224 to 2048 pixels
    python tools/benchmark.py today --modes eager compiled bfloat16   # timm's, side by side
    python tools/benchmark.py configs/retinanet_lavit_s_coco.py \\
        configs/baselines/retinanet_pvtv2-b2_coco.py --whole --size 800 1344 --batch-size 1

Models are measured in turn, round by round, so that a machine that slows down
slows all of them; warm-up rounds are not counted. Prints medians, their spread and
each model's speed over the first one's (the median of the rounds' ratios, and their
10th and 90th percentile) in Markdown, and writes JSON, CSV and a plot. MODEL is the
path of a config whose backbone is taken, a registered class with its arguments, as
``"mmdet.ResNet(depth=101)"``, or one of

    LaViT-N  LaViT-T  LaViT-S  LaViT-B  LaViT-N-twin  LaViT-T-twin  LaViT-S-twin
    LaViT-B-twin  LaViT-S-keys14  LaViT-S-pooled  LaViT-S-keys14-pooled
    LaViT-S-keys14-twin  LaViT-S-factored  LaViT-S-materialised
    PVT-S  PVTv2-B0  PVTv2-B1  PVTv2-B2  PVTv2-B3  Swin-T  Swin-S  ConvNeXt-T
    ResNet-50  MobileNetV2                                    # the toolboxes' own
    EfficientViT-B2  Twins-SVT-S  ResNet-50-timm  FastViT-SA24  ConvNeXt-T-timm
    EfficientFormerV2-L  Hiera-T  NextViT-S  CAFormer-S18  MambaOut-T  Swin-T-timm
    PVTv2-B2-timm  TinyViT-21M                                # timm's
    DeiT-T  LA-DeiT-T  LA-DeiT-T-low-rank  DeiT-S  LA-DeiT-S  LA-DeiT-S-low-rank
    LA-PVT-S  LA-PVT-S-low-rank  LA-Swin-T  LA-Swin-T-low-rank
    LaViT-S-low-rank                # less attention in others', and a cheaper mixing
    today                           # stands for LaViT-S, its twin and all of timm's

Every model is measured in the layout, channels-last or contiguous, that a short trial
in the same run finds faster. timm's (pip install timm) are fused for inference where
timm can. With --modes each mode has a column of times and one of ratios, all of one run.

With --whole it is the whole detector of the config, from images to boxes or to a step
of the optimizer; with --layer one of its modules on what it is given in the model:

    python tools/benchmark.py LaViT-S LaViT-S-materialised --layer stages.2.blocks.3.attn
"""
import argparse
import functools
import itertools
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Dict, Tuple

PUBLISHED = Path(__file__).resolve().parents[1] / 'configs/published.yml'
DEFAULT = ('LaViT-S', 'LaViT-S-twin', 'PVTv2-B2', 'Swin-T', 'ConvNeXt-T',
           'ResNet-50')
SIDES = (224, 320, 448, 640, 896, 1280, 1600, 2048)
# Those of mmlavit.analysis.benchmark, which --help need not import.
MODES = ('eager', 'compiled', 'bfloat16', 'float16', 'compiled-bfloat16',
         'graphs-bfloat16')


def plot(results: Dict[str, Dict[str, dict]], title: str, path: Path) -> None:
    """Bars at one size; time and memory against pixels at several."""
    from matplotlib.figure import Figure
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'models', nargs='*', default=list(DEFAULT), metavar='MODEL',
        help=f'default: {", ".join(DEFAULT)}; e.g. LaViT-S PVTv2-B2')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(224, 224), metavar=('H', 'W'),
        help='height and width of the images in pixels; default: 224 224; e.g. '
        '--size 800 1344')
    parser.add_argument(
        '--batch-size', type=int, default=8, metavar='N',
        help='images of a step; default: %(default)s; e.g. --batch-size 1')
    parser.add_argument(
        '--train', action='store_true',
        help='a training step; default: inference; e.g. --train')
    parser.add_argument(
        '--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32',
        help='other than float32: autocast; default: %(default)s; e.g. --dtype '
        'bfloat16')
    parser.add_argument(
        '--compile', action='store_true',
        help='with torch.compile; default: eager; e.g. --compile')
    parser.add_argument(
        '--modes', nargs='+', choices=MODES, metavar='MODE',
        help='several of these beside each other, instead of --dtype and --compile: '
        f'{", ".join(MODES)}; default: one; e.g. --modes eager compiled bfloat16')
    parser.add_argument(
        '--layout', choices=('best', 'contiguous', 'channels-last'), default='best',
        help='of weights and images; best: what a short trial finds faster; default: '
        '%(default)s; e.g. --layout contiguous')
    parser.add_argument(
        '--whole', action='store_true',
        help='whole detectors, every MODEL being a config; default: backbones; '
        'e.g. --whole')
    parser.add_argument(
        '--layer', default='', metavar='NAME',
        help='this module of each model alone, in inference; default: the model; '
        'e.g. --layer stages.2.blocks.3.attn')
    parser.add_argument(
        '--scaling', action='store_true',
        help=f'squares of {", ".join(map(str, SIDES))} pixels; default: --size; '
        'e.g. --scaling')
    parser.add_argument(
        '--profile', action='store_true',
        help='also the operators that each model spends time in; default: off; '
        'e.g. --profile')
    parser.add_argument(
        '--rounds', type=int, default=10, metavar='N',
        help='of all models that are counted, at least 2; default: %(default)s; '
        'e.g. --rounds 30')
    parser.add_argument(
        '--warmup', type=int, default=3, metavar='N',
        help='rounds before that are not counted; default: %(default)s; e.g. '
        '--warmup 1')
    parser.add_argument(
        '--no-macs', action='store_true',
        help='leave out the multiply-adds; default: counted; e.g. --no-macs')
    parser.add_argument(
        '--device', choices=('cpu', 'cuda'),
        help='default: cuda where there is a GPU, else cpu; e.g. --device cpu')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark'), metavar='DIR',
        help='folder that is written to; default: %(default)s; e.g. --out '
        'work_dirs/at_800')
    args = parser.parse_args()
    if args.whole and not all(Path(name).is_file() for name in args.models):
        parser.error(f'--whole {" ".join(args.models)}: expected the paths of '
                     'configs of detectors')
    if args.layer and (args.train or args.compile or args.whole):
        parser.error('--layer takes no --train, --compile or --whole')
    if args.modes and (args.layer or args.compile or args.dtype != 'float32'):
        parser.error('--modes takes no --dtype, --compile or --layer')
    if args.rounds < 2:
        parser.error(f'--rounds {args.rounds}: at least 2, for a spread')
    return args


def main() -> None:
    args = parse_args()
    # Before torch reads it: its profiler complains of a missing GPU.
    os.environ.setdefault('KINETO_LOG_LEVEL', '5')
    # After parsing: it takes seconds, which --help need not wait for.
    import torch

    from mmlavit.analysis.peers import expand_groups
    from mmlavit.analysis.report import write_csv
    from mmlavit.utils.memory import keep_freed_memory
    logging.disable(logging.WARNING)
    args.models = expand_groups(args.models)
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if args.device == 'cpu':
        keep_freed_memory()  # as tools/train.py does
    device = (torch.cuda.get_device_name() if args.device == 'cuda' else
              f'{torch.get_num_threads()} CPU threads ({platform.machine()})')
    title = (f'{device}, torch {torch.__version__}, batch {args.batch_size}, '
             f'{"several modes" if args.modes else args.dtype}, '
             f'{"training step" if args.train else "inference"}'
             f'{", compiled" if args.compile else ""}')
    print(title)
    sizes = [(s, s) for s in SIDES] if args.scaling else [tuple(args.size)]
    results, rows = {}, []
    for size in sizes:
        key = f'{size[0]}x{size[1]}'
        try:
            measured, new = measure(args, size)
        except ValueError as error:
            sys.exit(str(error))
        if not new:  # the smaller sizes are kept
            continue
        results[key] = measured
        rows += [dict(size=key, **row) for row in new]
    if not results:
        sys.exit('No model is left to be measured.')
    args.out.mkdir(parents=True, exist_ok=True)
    options = {k: str(v) for k, v in vars(args).items()}
    (args.out / 'benchmark.json').write_text(json.dumps(
        dict(device=device, torch=torch.__version__, options=options,
             results=results), indent=1) + '\n')
    write_csv(rows, args.out / 'benchmark.csv')
    if args.modes:  # the plot is of the first
        results = {size: each[args.modes[0]] for size, each in results.items()}
    plot(results, title if args.scaling else f'{next(iter(results))}, {title}',
         args.out / 'benchmark.png')
    print(f'\nwritten to {args.out}')


def measure(args: argparse.Namespace, size: Tuple[int, int]) -> Tuple[dict, list]:
    """The models at one size: results, by mode if there are several, and rows."""
    from mmlavit.analysis.benchmark import (MODES, Workload, compare, compare_modes,
                                            comparison_rows, mode_rows)
    from mmlavit.analysis.peers import build_backbone, build_detector, published_top1
    from mmlavit.analysis.report import markdown_table, without_empty_columns
    work = Workload(size, args.batch_size, args.train, args.dtype, args.device,
                    args.compile, args.whole, args.layer, args.layout)
    build = build_detector if args.whole else functools.partial(
        build_backbone, size=size, fuse=not args.train)
    options = args.rounds, args.warmup, not args.no_macs, args.profile
    if args.modes:
        measured = compare_modes(
            args.models, build,
            {mode: work._replace(**MODES[mode]) for mode in args.modes}, *options)
        top1 = published_top1(args.models, PUBLISHED)
        rows, each = mode_rows(measured, top1), measured
    else:
        measured = compare(args.models, build, work, *options)
        rows, each = comparison_rows(measured), {'': measured}
    if rows:
        print(f'\n{size[0]} x {size[1]}\n\n'
              f'{markdown_table(without_empty_columns(rows))}')
    for mode, results in each.items():
        for name, row in results.items():
            if row['profile']:
                print(f'\n{name} {mode}\n{row["profile"]}')
    return measured, rows


if __name__ == '__main__':
    main()
