"""Less attention for a trained ViT, DeiT, PVT or Swin: what it costs and what it saves.

    python tools/less_attention.py CONFIG CHECKPOINT
    python tools/less_attention.py CONFIG CHECKPOINT --layers 8 9 10 11 --epochs 10

CONFIG and CHECKPOINT are of a model that was trained with mmpretrain's VisionTransformer
or SwinTransformer, or mmdet's PyramidVisionTransformer or SwinTransformer. The tool tests
it, gives layers less attention (all whose attention maps are at least --min-similarity like
the map that they would inherit, or those of --layers), tests again, trains a few epochs and
tests once more. It writes to the folder of --out:

    config.py            the converted model's config, which loads CHECKPOINT; it has no
                         DP loss
    tuned/epoch_N.pth    the weights after fine-tuning
    table.csv            accuracy, parameters and time before and after

The table is printed as Markdown too.
"""
import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path,
                        help="the trained model's config; e.g. configs/baselines/"
                        'deit-s_in1k.py')
    parser.add_argument('checkpoint', help='its weights; e.g. epoch_300.pth')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/less_attention'),
                        help='folder for what is written; default: %(default)s; '
                        'e.g. --out work_dirs/la')
    parser.add_argument('--layers', type=int, nargs='+', metavar='N',
                        help='layers to convert, counted from 0 through all stages; '
                        'default: chosen by similarity; e.g. --layers 8 9 10 11')
    parser.add_argument('--num-layers', type=int, metavar='N',
                        help='choose no more layers, and of more the deepest; default: any number; '
                        'e.g. --num-layers 4')
    parser.add_argument('--min-similarity', type=float, default=0.8, metavar='X',
                        help='choose layers whose map has at least this cosine '
                        'similarity to the one before, 0 to 1; default: %(default)s; '
                        'e.g. --min-similarity 0.7')
    parser.add_argument('--mixing', choices=('full', 'low_rank'), default='full',
                        help='Theta and Psi; default: %(default)s; '
                        'e.g. --mixing low_rank')
    parser.add_argument('--epochs', type=int, default=5, metavar='N',
                        help='epochs of fine-tuning, 0 for none; default: %(default)s; '
                        'e.g. --epochs 10')
    parser.add_argument('--lr', type=float, default=1e-4, metavar='X',
                        help='learning rate at the begin of fine-tuning, which falls to '
                        '0; default: %(default)s; e.g. --lr 5e-5')
    parser.add_argument('--rounds', type=int, default=20, metavar='N',
                        help='rounds in which both backbones are timed on a batch of '
                        'the test, 0 for none; default: %(default)s; e.g. --rounds 50')
    parser.add_argument('--control', action='store_true',
                        help='also fine-tune the stock model as long, to compare with; '
                        'default: off; e.g. --control')
    parser.add_argument('--seed', type=int, metavar='N',
                        help='of the random numbers of all runs, so that they can be '
                        "repeated; default: the config's, if it has one; e.g. --seed 0")
    args = parser.parse_args()
    if not args.config.is_file():
        parser.error(f'{args.config}: no such config')
    if args.rounds == 1 or args.rounds < 0:
        parser.error(f'--rounds {args.rounds}: at least 2, or 0 for none')
    if args.epochs < 0:
        parser.error(f'--epochs {args.epochs}: at least 0')
    if args.control and not args.epochs:
        parser.error('--control takes --epochs of at least 1')
    return args


def main() -> None:
    args = parse_args()
    # After parsing: they take seconds, which --help need not wait for.
    import mmlavit  # noqa: F401
    from mmlavit.analysis.building import read_config
    from mmlavit.analysis.conversion import Conversion, convert_and_tune
    from mmlavit.analysis.report import markdown_table, write_csv
    how = Conversion(args.layers, args.num_layers, args.min_similarity, args.mixing,
                     args.epochs, args.lr, args.rounds, args.control, args.seed)
    try:
        rows = convert_and_tune(read_config(args.config), args.checkpoint, args.out,
                                how)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    print(markdown_table(rows))
    write_csv(rows, args.out / 'table.csv')


if __name__ == '__main__':
    main()
