"""Says what a demo run reached, with a plot and a sheet of pictures.

    python tools/demo_report.py work_dirs/demo

Reads the scalars that mmengine logged in every part of the run, and the test's
metrics and pictures in its folder test/. Exits with 1 if the result is below
--min-ap or --min-ap50, or if training did not end after --epochs.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('work_dir', type=Path, help='e.g. work_dirs/demo')
    for name in ('ap', 'ap50'):
        parser.add_argument(
            f'--min-{name}', type=float, default=0., metavar='SHARE',
            help=f'least {name.upper()}, from 0 to 1; default: %(default)s; '
            f'e.g. --min-{name} 0.6')
    parser.add_argument(
        '--epochs', type=int, metavar='N',
        help='epochs to be there; default: any number; e.g. --epochs 6')
    return parser.parse_args()


def plot(scalars: list, path: Path) -> None:
    """Loss by iteration and AP by epoch, side by side."""
    losses = [line for line in scalars if 'loss' in line]
    figure = Figure(figsize=(9, 3.2))
    left, right = figure.subplots(1, 2)
    for key in ('loss', 'loss_cls', 'loss_bbox'):
        left.plot([x['step'] for x in losses], [x[key] for x in losses],
                  label=key)
    left.set(xlabel='iteration', title='training loss', ylim=(0, None))
    aps = [line for line in scalars if 'coco/bbox_mAP' in line]
    for key, label in (('bbox_mAP', 'AP'), ('bbox_mAP_50', 'AP50')):
        right.plot([x['step'] for x in aps], [x[f'coco/{key}'] for x in aps],
                   'o-', label=label)
    right.set(xlabel='epoch', title='held-out images', ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def make_sheet(pictures: list, path: Path) -> None:
    """Six pictures, each the truth on the left and detections on the right."""
    images = [cv2.imread(str(picture)) for picture in pictures[:6]]
    height, width = images[0].shape[:2]
    images = [cv2.resize(image, (width, height)) for image in images]
    while len(images) % 2:
        images.append(np.full_like(images[0], 255))
    images = [cv2.copyMakeBorder(image, 4, 4, 4, 4, cv2.BORDER_CONSTANT,
                                 value=(255, 255, 255)) for image in images]
    rows = [np.hstack(images[i:i + 2]) for i in range(0, len(images), 2)]
    cv2.imwrite(str(path), np.vstack(rows))


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    from mmlavit.analysis.logs import read_scalars
    scalars = read_scalars(args.work_dir)
    losses = [line for line in scalars if 'loss' in line]
    results = sorted(args.work_dir.glob('test/2*/2*.json'))
    pictures = sorted(args.work_dir.glob('test/2*/pictures/*.png'))
    if not (losses and results and pictures):
        sys.exit(f'{args.work_dir} holds no finished training and test.')
    metrics = json.loads(results[-1].read_text())
    ap, ap50 = metrics['coco/bbox_mAP'], metrics['coco/bbox_mAP_50']

    curve = args.work_dir / 'curve.png'
    sheet = args.work_dir / 'detections.png'
    plot(scalars, curve)
    make_sheet(pictures, sheet)
    print(f'''\
    loss        {losses[0]["loss"]:.3f} -> {losses[-1]["loss"]:.3f}
    AP / AP50   {ap:.3f} / {ap50:.3f} on held-out images of held-out digits
    curve       {curve}
    pictures    {sheet} (truth | detections)
                {pictures[0].parent} (all)
    full log    {args.work_dir / 'demo.log'}''')

    epoch = max(line.get('epoch', 0) for line in losses)
    if not math.isfinite(losses[-1]['loss']):
        sys.exit('FAILED: the loss is not finite.')
    if args.epochs and epoch != args.epochs:
        sys.exit(f'FAILED: {epoch} epochs were trained, not {args.epochs}.')
    if ap < args.min_ap or ap50 < args.min_ap50:
        sys.exit(f'FAILED: expected at least AP {args.min_ap} and AP50 '
                 f'{args.min_ap50}.')
    print('    OK')


if __name__ == '__main__':
    main()
