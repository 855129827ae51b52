"""Makes images whose class is told by comparing distant places.

Each image has several of scikit-learn's scanned digits, each in a colour of its own, and a
bar at its border in one of these colours. The class is the digit that has the bar's colour. Colours
are random for each image, and so is the side of the bar. Digits of the validation images
occur in no training image. Who reads the digits and not the bar is right in one of
--digits cases.

    python tools/make_cued_digits.py data/cued_digits --digits 2

    data/cued_digits/{train,val}/{0-9}/*.png    class folders
    data/cued_digits/dataset.json               the arguments, written last
"""
import argparse
import colorsys
from pathlib import Path
from typing import List, Tuple

import cv2
import numpy as np
from tqdm import tqdm

# Height of a digit, and width of the bar, of an image's side.
DIGIT, BAR = (.28, .36), .07


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'out', type=Path, help='folder that is written; e.g. data/cued_digits')
    for split, count in (('train', 20000), ('val', 2000)):
        parser.add_argument(
            f'--{split}', type=int, default=count, metavar='N',
            help=f'images; default: %(default)s; e.g. --{split} 100')
    parser.add_argument(
        '--size', type=int, default=64, metavar='PIXELS',
        help='side of the images, at least 48; default: %(default)s; e.g. --size 96')
    parser.add_argument(
        '--digits', type=int, default=4, choices=(2, 3, 4),
        help='in an image; default: %(default)s; e.g. --digits 2')
    parser.add_argument(
        '--seed', type=int, default=0,
        help='of all random numbers; default: %(default)s; e.g. --seed 1')
    args = parser.parse_args()
    for name in ('train', 'val'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} {getattr(args, name)}: at least 1')
    if args.size < 48:
        parser.error(f'--size {args.size}: at least 48')
    return args


def choose_colours(rng: np.random.Generator, count: int) -> List[np.ndarray]:
    """Bright colours (3, ), 0 to 255, whose hues are equally far apart."""
    hues = (rng.uniform() + rng.permutation(count) / count
            + rng.uniform(-.03, .03, count)) % 1
    return [255 * np.float32(colorsys.hsv_to_rgb(hue, 1, rng.uniform(.8, 1)))
            for hue in hues]


def compose(rng: np.random.Generator, scans: np.ndarray, labels: np.ndarray,
            size: int, digits: int) -> Tuple[np.ndarray, int]:
    """An image (size, size, 3), uint8, and its class."""
    image = np.full((size, size, 3), rng.uniform(20, 90), np.float32)
    colours = choose_colours(rng, digits)
    # Different digits, or the class would be told by two of a kind.
    chosen = [int(rng.choice(np.flatnonzero(labels == label)))
              for label in rng.permutation(10)[:digits]]
    cells = rng.permutation(4)
    bar = round(BAR * size)
    half = (size - 2 * bar) // 2  # side of the cell of one digit
    for cell, index, colour in zip(cells, chosen, colours):
        height = min(round(size * rng.uniform(*DIGIT)), half)
        y, x = (bar + half * place + rng.integers(0, half - height + 1)
                for place in divmod(cell, 2))
        alpha = cv2.resize(scans[index], (height, height),
                           interpolation=cv2.INTER_CUBIC)
        alpha = (alpha * 1.6 - .3).clip(0, 1)[..., None]
        region = image[y:y + height, x:x + height]
        region[:] = region * (1 - alpha) + colour * alpha
    cued = rng.integers(digits)
    sides = image[:bar], image[-bar:], image[:, :bar], image[:, -bar:]
    sides[rng.integers(4)][:] = colours[cued]
    image = image + rng.normal(0, 6, image.shape)
    return image.clip(0, 255).round().astype(np.uint8), int(labels[chosen[cued]])


def write_split(folder: Path, count: int, scans: np.ndarray, labels: np.ndarray,
                args: argparse.Namespace, rng: np.random.Generator) -> None:
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for i in tqdm(range(count), desc=f'{folder.name} images', unit='image',
                  disable=None):
        image, label = compose(rng, scans, labels, args.size, args.digits)
        cv2.imwrite(str(folder / str(label) / f'{i:05d}.png'), image)


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    from mmlavit.analysis.digits import make_once, split_digits

    def write(folder: Path) -> None:
        rng = np.random.default_rng(args.seed)
        scans = split_digits(rng)
        for split in ('train', 'val'):
            write_split(folder / split, getattr(args, split), *scans[split], args, rng)

    make_once(args, __file__, write)


if __name__ == '__main__':
    main()
