"""Makes class folders of every second class of Tiny-ImageNet-200.

    python tools/make_tiny_imagenet100.py tiny-imagenet-200 data/tiny-imagenet-100

tiny-imagenet-200 is the unpacked archive of cs231n.stanford.edu/tiny-imagenet-200.zip.
Of its classes, sorted by name, the first, third, fifth and so on are taken: 100 classes
of 500 images in OUT/train/CLASS, and of 50 images in OUT/val/CLASS, 64 x 64 pixels. The
test images have no labels and are left out. What is there already is not copied again.
"""
import argparse
import shutil
import sys
from pathlib import Path
from typing import Dict, Iterable, List, Tuple


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'archive', type=Path, help='the unpacked archive; e.g. tiny-imagenet-200')
    parser.add_argument(
        'out', type=Path, help='folder to write to; e.g. data/tiny-imagenet-100')
    args = parser.parse_args()
    for name in ('train', 'val/images', 'val/val_annotations.txt'):
        if not (args.archive / name).exists():
            parser.error(f'{args.archive}: expected Tiny-ImageNet-200 unpacked, '
                         f'with {name} in it')
    return args


def chosen_classes(archive: Path) -> List[str]:
    """Every second class of the sorted names."""
    return sorted(path.name for path in (archive / 'train').iterdir()
                  if path.is_dir())[::2]


def copies(archive: Path) -> Iterable[Tuple[Path, str]]:
    """Files of the archive, and where each one goes."""
    classes = chosen_classes(archive)
    for name in classes:
        for path in sorted((archive / 'train' / name / 'images').iterdir()):
            yield path, f'train/{name}/{path.name}'
    lines = (archive / 'val/val_annotations.txt').read_text().splitlines()
    labels: Dict[str, str] = dict(line.split('\t')[:2] for line in lines)
    for file, name in sorted(labels.items()):
        if name in classes:
            yield archive / 'val/images' / file, f'val/{name}/{file}'


def main() -> None:
    args = parse_args()
    done = dict(train=0, val=0)
    for source, target in copies(args.archive):
        path = args.out / target
        if not path.is_file() or path.stat().st_size != source.stat().st_size:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
        done[target.split('/')[0]] += 1
    if not done['train']:
        sys.exit(f'{args.archive}/train: no CLASS/images/* there')
    print(f'{done["train"]} training and {done["val"]} validation images in {args.out}')


if __name__ == '__main__':
    main()
