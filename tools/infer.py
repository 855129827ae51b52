"""Runs a detector, segmentor or classifier on images: pictures and JSON.

    python tools/infer.py CONFIG CHECKPOINT IMAGES --out outputs
    python tools/infer.py CONFIG CHECKPOINT 'photos/*.jpg' --batch-size 8

The toolboxes' own inferencers do the work. IMAGES is a file, a folder, which is
searched through, or a pattern in quotes. Writes to --out: ``predictions.json``, and
pictures under the images' own names. Files that cannot be read are named and skipped.
"""
import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config', type=Path, help='e.g. configs/retinanet_lavit_digits.py')
    parser.add_argument(
        'checkpoint', type=Path, help='e.g. work_dirs/demo/epoch_6.pth')
    parser.add_argument(
        'images', help='file, folder or pattern; e.g. data/digits/images/val')
    parser.add_argument(
        '--out', type=Path, default=Path('outputs'),
        help='folder to write to; default: outputs; e.g. --out work_dirs/infer')
    parser.add_argument(
        '--device',
        help='default: the GPU if there is one, else the CPU; e.g. --device cpu')
    parser.add_argument(
        '--batch-size', type=int, default=1,
        help='images at once; default: 1; e.g. --batch-size 8')
    parser.add_argument(
        '--score-thr', type=float, default=0.3,
        help='least score of a box that is drawn; predictions.json has all; '
        'default: 0.3; e.g. --score-thr 0.5')
    args = parser.parse_args()
    for path in (args.config, args.checkpoint):
        if not path.is_file():
            parser.error(f'{path}: no such file')
    if args.batch_size < 1:
        parser.error(f'--batch-size {args.batch_size}: expected at least 1')
    return args


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    import torch

    from mmlavit.analysis.inference import infer
    from mmlavit.utils.memory import keep_freed_memory
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        done, skipped = infer(
            args.config, args.checkpoint, args.images, args.out,
            device=args.device, batch_size=args.batch_size,
            score_thr=args.score_thr)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(str(error))
    print(f'{done} images; written to {args.out}')
    if skipped:
        print(f'{len(skipped)} files skipped:\n  ' + '\n  '.join(skipped),
              file=sys.stderr)
    if not done:
        sys.exit('no image could be read')


if __name__ == '__main__':
    main()
