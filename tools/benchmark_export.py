"""Speed of exported backbones on the CPU: onnxruntime and OpenVINO beside PyTorch.

    python tools/benchmark_export.py                          # LaViT-S and its peers
    python tools/benchmark_export.py LaViT-S --runtimes eager openvino --size 640 640

Exports LaViT for any size, and other models for the size that is measured. Then all
models take turns in all runtimes, round by round, so that a machine that slows down
slows all of them. PyTorch's tensors have its default layout. Prints a Markdown table:
median milliseconds of a batch, their 10th and 90th percentile, and the speed over eager
PyTorch in the same precision (int8: over float32), the median of the rounds' ratios.
MODEL is as for tools/benchmark.py: one of its names, a config, or a class.
"""
import argparse
import logging
import platform
import sys
from pathlib import Path

DEFAULT = ('LaViT-S', 'LaViT-S-twin', 'PVTv2-B2', 'Swin-T', 'ConvNeXt-T',
           'ResNet-50')
RUNTIMES = ('eager', 'compiled', 'onnxruntime', 'openvino')
DTYPES = ('float32', 'bfloat16', 'int8')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'models', nargs='*', default=list(DEFAULT), metavar='MODEL',
        help=f'default: {", ".join(DEFAULT)}; e.g. LaViT-S ResNet-50')
    parser.add_argument(
        '--runtimes', nargs='+', choices=RUNTIMES, default=RUNTIMES,
        help='default: all; e.g. --runtimes eager openvino')
    parser.add_argument(
        '--dtypes', nargs='+', choices=DTYPES, default=DTYPES,
        help='bfloat16: autocast of PyTorch, no onnxruntime; int8: of linear layers '
        'in the exported file; default: all; e.g. --dtypes float32 bfloat16')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(224, 224), metavar=('H', 'W'),
        help='height and width of the images in pixels; default: 224 224; e.g. '
        '--size 800 1344')
    parser.add_argument(
        '--batch-size', type=int, default=8, metavar='N',
        help='images of a step; default: %(default)s; e.g. --batch-size 1')
    parser.add_argument(
        '--rounds', type=int, default=10, metavar='N',
        help='of all models that are counted, at least 2; default: %(default)s; '
        'e.g. --rounds 30')
    parser.add_argument(
        '--warmup', type=int, default=3, metavar='N',
        help='rounds before that are not counted; default: %(default)s; e.g. '
        '--warmup 1')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark_export'),
        metavar='DIR',
        help='folder for the exported files and the table as CSV; default: '
        '%(default)s; e.g. --out work_dirs/at_800')
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f'--rounds {args.rounds}: at least 2, for a spread')
    for name, value in (('batch-size', args.batch_size), ('size', min(args.size))):
        if value < 1:
            parser.error(f'--{name} {value}: at least 1')
    return args


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    import torch

    from mmlavit.analysis.peers import expand_groups
    from mmlavit.analysis.report import (markdown_table, without_empty_columns,
                                         write_csv)
    from mmlavit.export.speed import compare
    logging.disable(logging.WARNING)
    height, width = args.size
    print(f'{torch.get_num_threads()} CPU threads ({platform.machine()}), torch '
          f'{torch.__version__}, batch {args.batch_size}, {height} x {width}')
    try:
        rows = compare(expand_groups(args.models), (args.batch_size, height, width),
                       args.out, args.runtimes, args.dtypes, args.rounds, args.warmup)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(str(error))
    if not rows:
        sys.exit('No model is left to be measured.')
    rows = without_empty_columns(rows)
    print(f'\n{markdown_table(rows)}')
    write_csv(rows, args.out / 'benchmark_export.csv')


if __name__ == '__main__':
    main()
