"""Makes a small detection, segmentation and classification data set.

scikit-learn's 1,797 real scanned digits (8 x 8, from the UCI repository) are
placed at several scales, colours and overlaps on textured backgrounds. Digits
of the validation images occur in no training image.

    python tools/make_digits.py data/digits

    data/digits/
        annotations/{train,val}.json    COCO detection, 10 classes
        images/{train,val}/*.png
        masks/{train,val}/*.png         0 background, 1-10 the digits 0-9
        classes/{train,val}/{0-9}/*.png every digit once, alone
        dataset.json                    the arguments, written last
"""
import argparse
import json
from pathlib import Path
from typing import Tuple

import cv2
import numpy as np
from tqdm import tqdm

SPLITS = ('train', 'val')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'out', type=Path, help='folder that is written; e.g. data/digits')
    for split, count in (('train', 1500), ('val', 150)):
        parser.add_argument(
            f'--{split}', type=int, default=count, metavar='N',
            help=f'images; default: %(default)s; e.g. --{split} 8')
    parser.add_argument(
        '--size', type=int, default=160, metavar='PIXELS',
        help='side of the images, at least 64; default: %(default)s; e.g. --size 320')
    parser.add_argument(
        '--digits', type=int, nargs=2, default=(4, 9), metavar=('MIN', 'MAX'),
        help='digits in an image; default: 4 9; e.g. --digits 1 3')
    parser.add_argument(
        '--seed', type=int, default=0,
        help='of all random numbers; default: %(default)s; e.g. --seed 1')
    args = parser.parse_args()
    for name in ('train', 'val'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} {getattr(args, name)}: at least 1')
    if args.size < 64:
        parser.error(f'--size {args.size}: at least 64')
    if not 1 <= args.digits[0] <= args.digits[1]:
        parser.error(f'--digits {args.digits}: expected 1 <= MIN <= MAX')
    return args


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A (size, size, 3) background: colour clouds of two scales, and noise."""
    image = np.full((size, size, 3), rng.uniform(60, 195, 3), np.float32)
    for cells, strength in ((rng.integers(2, 5), 20), (rng.integers(8, 25), 8)):
        clouds = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(clouds, (size, size), interpolation=cv2.INTER_CUBIC)
    return (image + rng.normal(0, 4, image.shape)).clip(0, 255)


def paint(rng: np.random.Generator, image: np.ndarray, scan: np.ndarray,
          height: int, y: int, x: int) -> np.ndarray:
    """Paints a digit in place; returns where it is opaque (height, width)."""
    width = round(height * rng.uniform(0.75, 1.05))
    alpha = cv2.resize(scan, (width, height), interpolation=cv2.INTER_CUBIC)
    alpha = (alpha * 1.6 - 0.3).clip(0, 1)[..., None]
    region = image[y:y + height, x:x + width]
    # Far enough from the background's mean colour to be seen.
    mean = region.mean((0, 1))
    colour = (mean + 128 + rng.uniform(-50, 50, 3)) % 256
    region[:] = region * (1 - alpha) + colour * alpha
    return alpha[..., 0] > 0.5


def overlap(a: tuple, b: tuple) -> float:
    """Intersection of two boxes (x, y, w, h) over the smaller one."""
    w, h = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])
            for i in (0, 1))
    return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])


def compose(rng: np.random.Generator, scans: np.ndarray, labels: np.ndarray,
            size: int, counts: tuple) -> tuple:
    """One image, its mask and its boxes [(label, x, y, w, h), ...]."""
    image = texture(rng, size)
    mask = np.zeros((size, size), np.uint8)
    boxes = []
    for _ in range(rng.integers(counts[0], counts[1] + 1)):
        # As many small as large ones, by octave.
        height = round(size * 2**rng.uniform(np.log2(0.16), np.log2(0.5)))
        for _ in range(20):
            y, x = rng.integers(0, size - int(height * 1.05), 2)
            # Digits may touch and overlap, but none may hide another.
            if all(overlap((x, y, height, height), box) < 0.2
                   for _, *box in boxes):
                break
        else:
            continue
        i = rng.integers(len(scans))
        opaque = paint(rng, image, scans[i], height, y, x)
        mask[y:y + height, x:x + opaque.shape[1]][opaque] = labels[i] + 1
        rows, columns = (np.flatnonzero(opaque.any(axis)) for axis in (1, 0))
        top, left = int(y + rows[0]), int(x + columns[0])
        h, w = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
        boxes.append((int(labels[i]), left, top, w, h))
    return image.round().astype(np.uint8), mask, boxes


def write_split(out: Path, split: str, count: int, scans: np.ndarray,
                labels: np.ndarray, size: int, digits: Tuple[int, int],
                rng: np.random.Generator) -> None:
    for folder in ('images', 'masks'):
        (out / folder / split).mkdir(parents=True)
    images, annotations = [], []
    for i in tqdm(range(count), desc=f'{split} images', unit='image',
                  disable=None):
        name = f'{i:05d}.png'
        image, mask, boxes = compose(rng, scans, labels, size, digits)
        cv2.imwrite(str(out / 'images' / split / name), image)
        cv2.imwrite(str(out / 'masks' / split / name), mask)
        images.append(
            dict(id=i, file_name=name, width=size, height=size))
        annotations += [
            dict(
                id=len(annotations) + n,
                image_id=i,
                category_id=label,
                bbox=box,
                area=box[2] * box[3],
                iscrowd=0) for n, (label, *box) in enumerate(boxes, start=1)
        ]
    categories = [dict(id=label, name=str(label)) for label in range(10)]
    (out / 'annotations').mkdir(exist_ok=True)
    (out / 'annotations' / f'{split}.json').write_text(
        json.dumps(
            dict(
                images=images, annotations=annotations,
                categories=categories)))

    for label in range(10):
        (out / 'classes' / split / str(label)).mkdir(parents=True)
    for i, (scan, label) in enumerate(
            tqdm(
                list(zip(scans, labels)),
                desc=f'{split} classes',
                unit='image',
                disable=None)):
        image = texture(rng, 64)
        height = int(rng.integers(32, 57))
        paint(rng, image, scan, height, *rng.integers(0, 65 - height * 1.06, 2))
        cv2.imwrite(
            str(out / 'classes' / split / str(label) / f'{i:05d}.png'),
            image.round().astype(np.uint8))


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    from mmlavit.analysis.digits import make_once, split_digits

    def write(folder: Path) -> None:
        rng = np.random.default_rng(args.seed)
        scans = split_digits(rng)
        for split in SPLITS:
            write_split(folder, split, getattr(args, split), *scans[split], args.size,
                        args.digits, rng)

    make_once(args, __file__, write)


if __name__ == '__main__':
    main()
