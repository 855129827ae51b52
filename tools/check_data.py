"""Checks the data sets of a config before hours are spent on training.

    python tools/check_data.py CONFIG [--splits train val test] [--workers 4]

For any config of mmdetection, mmsegmentation or mmpretrain. Builds each data set as
the runner would, loads its annotations, runs its pipeline on every item, and looks
at what is wrong and what is silently left out: missing and broken files, boxes and
labels that cannot be right, class names that the annotations do not have (whose boxes
mmdetection silently drops, renumbering the other classes), heads for another
number of classes. It goes on after an error, counts every problem, names the first
examples and prints how often each class occurs.

Ends with exit code 1 if there are errors: training would stop, or learn something
wrong. Warnings are yours to judge.
"""
import argparse
import logging
import sys
from pathlib import Path

SPLITS = ('train', 'val', 'test')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config', type=Path, help='e.g. configs/retinanet_lavit_s_coco.py')
    parser.add_argument(
        '--splits', nargs='+', default=SPLITS, choices=SPLITS,
        help='data sets to check; default: all; e.g. --splits train val')
    parser.add_argument(
        '--workers', type=int, default=2, metavar='N',
        help='processes that load items, 0: none beside this one; default: '
        '%(default)s; e.g. --workers 8')
    parser.add_argument(
        '--examples', type=int, default=3, metavar='N',
        help='places named of each kind of problem; default: %(default)s; e.g. '
        '--examples 20')
    parser.add_argument(
        '--cfg-options', nargs='+', action='extend', default=[],
        metavar='KEY=VALUE',
        help="changes to the config; default: none; e.g. --cfg-options "
        'train_dataloader.dataset.data_root=data/mine/')
    args = parser.parse_args()
    if not args.config.is_file():
        parser.error(f'{args.config}: no such config')
    for option in args.cfg_options:
        if '=' not in option:
            parser.error(f'--cfg-options {option}: expected KEY=VALUE')
    for name, value in (('workers', args.workers), ('examples', args.examples)):
        if value < 0:
            parser.error(f'--{name} {value}: expected 0 or more')
    return args


def load_config(path: Path, options: list):
    """The config with --cfg-options, which mmengine's own action reads."""
    from mmengine.config import Config, DictAction
    config = Config.fromfile(path)
    if options:
        parser = argparse.ArgumentParser()
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        config.merge_from_dict(
            parser.parse_args(['--cfg-options', *options]).cfg_options)
    return config


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    from mmlavit.analysis.dataset_checks import check_config, split_dataset
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    config = load_config(args.config, args.cfg_options)
    if not any(split_dataset(config, split) for split in args.splits):
        sys.exit(f'{args.config}: no data set for {", ".join(args.splits)}')
    kinds = []
    for split, report in check_config(config, args.splits, args.workers):
        if report is None:
            print(f'\n{split}: ' + ('checked above' if split_dataset(config, split)
                                    else 'not in the config'))
            continue
        print(f'\n{report.describe(args.examples)}')
        kinds += report.kinds()
    errors = sum(kind.startswith('ERROR') for kind in kinds)
    print(f'\n{errors} kinds of errors, {len(kinds) - errors} of warnings')
    sys.exit(1 if errors else 0)


if __name__ == '__main__':
    main()
