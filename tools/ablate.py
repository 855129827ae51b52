"""Which part of LaViT does what: a grid of variants under one budget.

    python tools/ablate.py CONFIG DATA --epochs 30 --seeds 0 1 2 --size 64
    python tools/ablate.py configs/retinanet_lavit_digits.py --only LaViT "DP loss"

Trains every variant (``--only`` chooses) with every seed and tests it. CONFIG is of a
classifier, detector or segmentor with LaViT that trains by epochs. Only the variants
named after the DP loss have it, with its defaults but for what the name says, whatever
CONFIG has. With DATA, a folder with ``train/CLASS/*`` and ``val/CLASS/*``
or ``test/CLASS/*``, CONFIG is a classifier's, of which the model is taken; images are
resized, and for training cropped and flipped. The learning rate warms up in 50 steps and
falls along a cosine, whatever CONFIG has. Weights begin at random. What is done is
skipped, what was cut off resumed. Writes to OUT:

    ablation.md, .csv   top-1, AP or mIoU (mean and spread over seeds), parameters, MACs,
                        time of a training step, similarity of attention maps and tokens;
                        the maps' entropy, asymmetry and diagonals and both similarities
                        layer by layer
    ablation.png        accuracy and similarity

A small data set says little about ImageNet: the table names its data and budget.
"""
import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import List

VARIANTS = ('LaViT', 'DP loss', 'DP loss, weight 0.01', 'DP loss, weight 1',
            'DP loss, bounded', 'DP loss, margin 1', 'DP loss, paper form',
            'identity', 're-attention', 'low-rank mixing', 'no residual',
            'LA one stage earlier', 'LA stages only', 'all VA (the twin)',
            'uniform in the place of LA', 'uniform everywhere', 'ResNet')


def plot(summaries: List[dict], scale: str, path: Path) -> None:
    """Bars of accuracy and of both similarities, a row for each variant."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(14, .42 * len(summaries) + 1.6))
    axes = fig.subplots(1, 3, sharey=True)
    names = [row['variant'] for row in summaries]
    for ax, (key, title) in zip(axes, (
        ('score', f'{summaries[0]["metric"]}, % (mean, std over seeds)'),
        ('maps', 'attention maps: cosine to the layer before'),
        ('tokens', 'tokens: mean pairwise cosine'))):
        values = [row[key] or 0 for row in summaries]
        errors = [row['spread'] or 0 for row in summaries]
        ax.barh(names, values, xerr=errors if key == 'score' else None,
                color=['#3b6ea5' if name == 'LaViT' else '#a9bdd2'
                       for name in names])
        ax.set_xlim(left=max(0, min(values) - (5 if key == 'score' else .1)))
        ax.set_title(title, fontsize=11)
        ax.grid(axis='x', alpha=.3)
    axes[0].invert_yaxis()
    fig.suptitle(f'{scale} (not an ImageNet result)', fontsize=11)
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config', type=Path, help='e.g. configs/lavit_t_in1k.py')
    parser.add_argument(
        'data', type=Path, nargs='?',
        help="folder of images; default: the config's data; e.g. data/digits/classes")
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/ablation'), metavar='DIR',
        help='folder that is written to; default: %(default)s; e.g. --out '
        'work_dirs/mine')
    parser.add_argument(
        '--only', nargs='+', choices=VARIANTS, default=VARIANTS,
        metavar='VARIANT',
        help=f'some of: {"; ".join(VARIANTS)} (a control, on DATA alone); default: '
        'all; e.g. --only LaViT "DP loss"')
    parser.add_argument(
        '--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='SEED',
        help='a training of every variant for each; default: 0 1 2; e.g. '
        '--seeds 0')
    parser.add_argument(
        '--epochs', type=int, metavar='N',
        help="of every training; default: 30 on DATA, else the config's; e.g. "
        '--epochs 100')
    parser.add_argument(
        '--size', type=int, default=64, metavar='PIXELS',
        help='side of the images of DATA; default: %(default)s; e.g. --size 32')
    parser.add_argument(
        '--batch-size', type=int, default=64, metavar='N',
        help='images of a step on DATA; default: %(default)s; e.g. --batch-size 128')
    parser.add_argument(
        '--lr', type=float,
        help="highest learning rate; default: 1e-3 on DATA, else the config's; e.g. "
        '--lr 5e-4')
    parser.add_argument(
        '--workers', type=int, default=2, metavar='N',
        help='processes that load images, 0: none beside the training; default: '
        '%(default)s; e.g. --workers 8')
    parser.add_argument(
        '--no-augment', action='store_true',
        help='training images of DATA as they are; default: cropped and flipped at '
        'random; e.g. --no-augment')
    parser.add_argument(
        '--analysed-images', type=int, default=256, metavar='N',
        help='of the validation, for the similarities; default: %(default)s; e.g. '
        '--analysed-images 64')
    args = parser.parse_args()
    if not args.config.is_file():
        parser.error(f'{args.config}: no such config')
    for name in ('epochs', 'size', 'batch_size', 'lr'):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f'--{name.replace("_", "-")} {getattr(args, name)}: expected '
                         'more than 0')
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f'--seeds {" ".join(map(str, args.seeds))}: expected each once')
    if args.data is not None:
        check_data(parser, args.data)
        args.epochs, args.lr = args.epochs or 30, args.lr or 1e-3
    else:  # ResNet has no maps for necks that take four
        args.only = [name for name in args.only if name != 'ResNet']
        if not args.only:
            parser.error('--only ResNet: expected DATA with it')
    return args


def check_data(parser: argparse.ArgumentParser, data: Path) -> None:
    """Ends with an error unless it is a folder of class folders."""
    if not (data / 'train').is_dir():
        parser.error(f'{data}: expected a folder with train/CLASS/* and val/CLASS/* or '
                     'test/CLASS/*')
    if not any(path.is_dir() for path in (data / 'train').iterdir()):
        parser.error(f'{data}/train: no folders in it, expected one a class')
    tests = [data / split for split in ('val', 'test') if (data / split).is_dir()]
    if not tests:
        parser.error(f'{data}: expected val/CLASS/* or test/CLASS/* beside train')
    train, test = ({path.name for path in folder.iterdir() if path.is_dir()}
                   for folder in (data / 'train', tests[0]))
    if train != test:
        parser.error(f'{tests[0]}: expected the class folders of {data}/train, but '
                     f'{", ".join(sorted(train ^ test)[:3])} are in one of them alone')


def main() -> None:
    args = parse_args()
    # So that the training that runs is ended, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # After parsing: it takes seconds, which --help need not wait for.
    from tqdm import tqdm

    from mmengine.config import Config

    from mmlavit.analysis.ablation import (LAYER_MEASURES, Grid, check_config,
                                           layer_rows, summarise, table_rows, train)
    from mmlavit.analysis.report import markdown_table, write_csv
    logging.disable(logging.INFO)
    runs = [(variant, seed) for seed in args.seeds for variant in args.only]
    progress = tqdm(runs, 'training', disable=None)
    try:
        check_config(args.config, args.data)
        epochs = args.epochs or Config.fromfile(args.config).train_cfg.max_epochs
        grid = Grid(args.config, args.out, epochs, args.data, args.lr, args.workers,
                    args.size, args.batch_size, not args.no_augment)
        for i, (variant, seed) in enumerate(progress, 1):
            progress.set_postfix_str(f'{variant}, seed {seed}')
            score = train(grid, variant, seed)
            tqdm.write(f'[{i}/{len(runs)}] {variant}, seed {seed}: {score:.1f} %')
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    summaries = [summarise(grid, variant, args.seeds, args.analysed_images)
                 for variant in tqdm(args.only, 'analysing', disable=None)]
    title = (f'{grid.describe()}, seeds {" ".join(map(str, args.seeds))}. Not an '
             'ImageNet result.')
    parts = [title, markdown_table(table_rows(summaries))]
    for measure, about in LAYER_MEASURES.items():
        parts += [about, markdown_table(layer_rows(summaries, measure))]
    text = '\n\n'.join(parts) + '\n'
    (args.out / 'ablation.md').write_text(text)
    write_csv([{key: value for key, value in row.items() if key != 'layers'}
               for row in summaries], args.out / 'ablation.csv')
    plot(summaries, grid.describe(), args.out / 'ablation.png')
    print(f'\n{text}\nwritten to {args.out}/ablation.md, .csv and .png')


if __name__ == '__main__':
    main()
