"""Checks the data sets of a config before hours are spent on training.

    python tools/check_data.py CONFIG [--splits train val test] [--workers 4]

For any config of mmdetection, mmsegmentation or mmpretrain. Builds each data set as
the runner would, loads its annotations, runs its pipeline on every item, and looks
at what is wrong and what is silently left out: missing and broken files, boxes and
labels that cannot be right, class names that the annotations do not have (whose boxes
mmdetection drops without a word, numbering the other classes anew), heads for another
number of classes. It goes on after an error, counts every problem, names the first examples
and prints how often each class occurs.

Ends with exit code 1 if there are errors: training would stop, or learn something
wrong. Warnings are yours to judge.
"""
import argparse
import contextlib
import io
import logging
import math
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine import fileio
from mmengine.config import Config, DictAction
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

import mmlavit  # noqa: F401  (registers what a config may name)

SPLITS = ('train', 'val', 'test')
WRAPPED_ITEMS = 8  # taken through a wrapper's own pipeline
SHOWN_CLASSES = 40  # of more, the most and the least frequent
Findings = Dict[str, List[str]]  # 'ERROR: problem' or 'WARNING: problem': where
Image.MAX_IMAGE_PIXELS = None  # a large image is no attack here


def leaves(cfg: dict) -> Iterator[dict]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = cfg.get('datasets', cfg.get('dataset'))
    if inner is None:
        yield cfg
    else:
        for each in [inner] if isinstance(inner, dict) else inner:
            yield from leaves(each)


def check_wrapper(cfg: dict, findings: Findings) -> None:
    """Takes some items through a wrapper, which may have a pipeline of its own."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = DATASETS.build(cfg)
        for i in np.linspace(0, len(dataset) - 1, WRAPPED_ITEMS, dtype=int):
            dataset[int(i)]
    except Exception as error:  # whatever a data set or transform may raise
        findings['ERROR: data set wrapper that fails'].append(
            f"{cfg.get('type')}: {type(error).__name__}: {error}")


def stated_classes(cfg, path: str = 'model') -> Iterator[Tuple[str, int]]:
    """Every num_classes in the config of a model, with its place."""
    if isinstance(cfg, (list, tuple)):
        for i, item in enumerate(cfg):
            yield from stated_classes(item, f'{path}[{i}]')
    elif isinstance(cfg, dict):
        for key, value in cfg.items():
            if key == 'num_classes' and isinstance(value, int):
                yield f'{path}.{key}={value}', value
            elif key != 'rpn_head':  # which tells objects from background
                yield from stated_classes(value, f'{path}.{key}')


def load(dataset: BaseDataset) -> List[dict]:
    """Loads the annotations; returns all items, filtered out or not."""
    loaded, load_data_list = [], dataset.load_data_list

    def listen() -> List[dict]:
        loaded.append(load_data_list())
        return list(loaded[0])

    dataset.load_data_list = listen
    try:
        dataset.full_init()
        empty = not len(dataset)
    except ValueError:
        empty = loaded and not dataset.data_list
        if not empty:  # which mmengine cannot serialise
            raise
    if empty:
        raise ValueError(
            f'no image is left of {len(loaded[0])} in {dataset.data_prefix}: '
            'check data_root, data_prefix, suffixes, classes and filter_cfg')
    del dataset.load_data_list
    return loaded[0]


def check_names(classes: Sequence[str], names: Sequence[str], where: str,
                findings: Findings) -> None:
    """The config's classes against the names by which data is labelled."""
    findings[f'ERROR: class of the config that {where} does not have'] += [
        f'{name!r}: write metainfo=dict(classes={tuple(names)}) in all data sets'
        for name in classes if name not in names]
    findings[f'WARNING: class of {where} that the config leaves out'] += [
        repr(name) for name in names if name not in classes]
    theirs = tuple(name for name in names if name in classes)
    if theirs != tuple(name for name in classes if name in names):
        findings[f'ERROR: classes in another order than in {where}'].append(
            f'{tuple(classes)}; the labels are numbered by {theirs}')


def check_coco(dataset: BaseDataset, classes: Sequence[str],
               findings: Findings) -> None:
    """What mmdetection leaves out can only be seen in the file itself."""
    coco = dataset.COCOAPI(dataset.ann_file)
    check_names(classes, [cat['name'] for cat in coco.cats.values()],
                'the annotation file', findings)
    for ann in coco.dataset.get('annotations', []):
        image = coco.imgs.get(ann['image_id'])
        if image is None:
            findings['WARNING: annotation of an image not in the file'].append(
                f"annotation {ann['id']}, image {ann['image_id']}")
        if image is None or 'bbox' not in ann:
            continue
        x, y, w, h = ann['bbox']
        width, height = image['width'], image['height']
        kind = None
        if ann['category_id'] not in coco.cats:
            kind = f"ERROR: category {ann['category_id']} that is not in the file"
        elif not all(map(math.isfinite, ann['bbox'])):
            kind = 'ERROR: box that is not finite'
        elif min(w, h) < 1 or ann['area'] <= 0:
            kind = 'WARNING: box without area, left out'
        elif min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
            kind = 'WARNING: box outside of its image, left out'
        elif min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
            kind = 'WARNING: box partly outside of its image'
        if kind:
            findings[kind].append(f"annotation {ann['id']}, {image['file_name']} "
                                  f"({width} x {height}): {ann['bbox']}")


class Looks(TorchDataset):
    """A data set's items as (findings, count of each label or None).

    Args:
        dataset (BaseDataset): The data set.
        num_classes (float): Labels must be below.
    """

    def __init__(self, dataset: BaseDataset, num_classes: float) -> None:
        self.dataset = dataset
        self.num_classes = num_classes
        # The pipeline's own, for the labels before anything is cropped.
        self.load_mask = next(
            (t for t in dataset.pipeline.transforms
             if isinstance(t, LoadAnnotations) and t.with_seg), None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Tuple[List[tuple], Optional[Counter]]:
        warnings.simplefilter('ignore')
        info = self.dataset.get_data_info(i)
        path, mask_path = info.get('img_path', f'item {i}'), None
        found, counts, failure, dropped = [], None, None, False
        try:
            dropped = self.dataset.pipeline(self.dataset.get_data_info(i)) is None
        except Exception as error:  # whatever a pipeline may raise
            failure = f'{path}: {type(error).__name__}: {error}'
        size = self.read('image', info.get('img_path'), failure, found)
        if 'instances' in info:
            counts = Counter(each['bbox_label'] for each in info['instances']
                             if not each.get('ignore_flag'))
            stated = info.get('width'), info.get('height')
            if size and all(stated) and size != stated:
                found.append(('ERROR: image of another size than its annotations '
                              'say', f'{path}: {size}, not {stated}'))
        elif 'gt_label' in info:
            counts = Counter(np.atleast_1d(info['gt_label']).tolist())
        elif self.load_mask is not None:
            mask_path = info.get('seg_map_path')
            mask_size = self.read('mask', mask_path, failure, found)
            if size and mask_size and size != mask_size:
                found.append(('ERROR: mask of another size than its image',
                              f'{mask_path}: {mask_size}, not {size}'))
            with contextlib.suppress(Exception):  # the pipeline failed as well
                counts = self.mask_labels(info, found)
        wrong = [x for x in counts or () if not 0 <= x < self.num_classes]
        if wrong:
            found.append(('ERROR: label that is no class', f'{mask_path or path}: '
                          f'{wrong}, expected 0 to {self.num_classes - 1}'))
        if failure and not found:
            found.append(('ERROR: item at which the pipeline fails', failure))
        if dropped and not found:
            found.append(('WARNING: item that the pipeline drops', path))
        if counts is not None and not counts:
            found.append(('WARNING: image without annotations', path))
        return found, counts

    def mask_labels(self, info: dict, found: list) -> Counter:
        """Pixels of each label but the ignored, as the pipeline loads them."""
        mask = self.load_mask(info)['gt_seg_map']
        if mask.ndim != 2:
            found.append(('ERROR: mask of colours, not labels',
                          f"{info['seg_map_path']}: shape {mask.shape}"))
        labels, pixels = np.unique(mask, return_counts=True)
        counts = Counter(dict(zip(labels.tolist(), pixels.tolist())))
        del counts[getattr(self.dataset, 'ignore_index', 255)]
        return counts

    def read(self, what: str, path: Optional[str], failure: Optional[str],
             found: list) -> Optional[Tuple[int, int]]:
        """(width, height) of an image file; OpenCV takes cut-off ones too."""
        if not isinstance(path, str):
            return None
        backend_args = getattr(self.dataset, 'backend_args', None)
        try:
            image = Image.open(
                io.BytesIO(fileio.get(path, backend_args=backend_args)))
            image.load()
            return ImageOps.exif_transpose(image).size  # turned as by mmcv
        except FileNotFoundError:
            found.append((f'ERROR: missing {what}', path))
        except Exception as error:  # OSError, SyntaxError and others
            # What Pillow does not know, another decoder may have read.
            if failure or not isinstance(error, UnidentifiedImageError):
                found.append((f'ERROR: unreadable {what}', f'{path}: {error}'))
        return None


def check_dataset(cfg: dict, heads: List[Tuple[str, int]], split: str,
                  workers: int, findings: Findings) -> Sequence[str]:
    """Adds what is wrong with a data set, prints its balance, returns its classes."""
    classes = ()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools' chatter
            dataset = DATASETS.build(dict(cfg, lazy_init=True))
            classes = dataset.metainfo.get('classes') or ()
            if isinstance(classes, str):
                findings['ERROR: classes are a text'].append(
                    f'{classes!r}: write ({classes!r}, )')
                classes = (classes, )
            if hasattr(dataset, 'COCOAPI'):
                check_coco(dataset, classes, findings)
            items = load(dataset)
    except Exception as error:  # whatever a data set may raise
        findings['ERROR: data set that cannot be loaded'].append(
            f"{cfg.get('type')}: {type(error).__name__}: {error}")
        return classes
    print(f'{type(dataset).__name__}: {len(dataset)} images of {len(items)}')
    classes = classes or dataset.metainfo.get('classes') or ()  # of the folders
    folders = getattr(dataset, 'folder_to_idx', {})
    if set(folders) & set(classes):  # ImageNet's have other names on purpose
        check_names(classes, list(folders), 'the folders', findings)
    findings['ERROR: model for another number of classes'] += [
        f'{place}, the data set has {len(classes)}' for place, number in heads
        if classes and number != len(classes)]
    kept = {dataset.get_data_info(i).get('img_path')
            for i in range(len(dataset))}
    findings['WARNING: image left out by filter_cfg or indices'] += [
        item['img_path'] for item in items if item.get('img_path') not in kept]

    images, total, labelled = Counter(), Counter(), False
    looks = Looks(dataset, len(classes) or max(
        (number for _, number in heads), default=math.inf))
    for found, counts in tqdm(
            DataLoader(looks, None, num_workers=workers, collate_fn=tuple),
            split, unit='image', disable=None):
        for kind, where in found:
            findings[kind].append(where)
        labelled |= counts is not None
        total.update(counts or {})
        images.update(list(counts or {}))
    if labelled:
        names = classes or range(max(total, default=-1) + 1)
        findings['WARNING: class without any annotation'] += [
            str(name) for label, name in enumerate(names) if not total[label]]
        if not total:
            findings['ERROR: data set without any annotation'].append(split)
        if getattr(dataset, 'reduce_zero_label', False) and classes and (
                not total[len(classes) - 1]):
            findings['WARNING: reduce_zero_label=True, which ignores label 0 and moves '
                     'the others down, and the last class never occurs'].append(
                f'{classes[-1]!r}: if the masks number the classes from 0, every class '
                'has the name of another: set it to False, here and in LoadAnnotations')
        show_balance(names, images, total)
    return classes


def show_balance(names: Sequence, images: Counter, total: Counter) -> None:
    """Prints a table: how often each class occurs, in how many images."""
    print('| class, as training numbers them | images | annotations or pixels | '
          'share |\n'
          '|---|---|---|---|')
    rows = [f'| {name} | {images[label]} | {total[label]} '
            f'| {total[label] / max(sum(total.values()), 1):.2%} |'
            for label, name in enumerate(names)]
    if len(rows) > SHOWN_CLASSES:
        order = sorted(range(len(rows)), key=lambda label: -total[label])
        rows = [rows[label] for label in order]
        rows[SHOWN_CLASSES // 2:-SHOWN_CLASSES // 2] = ['| ... | | | |']
    print('\n'.join(rows))


def parse_args(args: Optional[list]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path)
    parser.add_argument(
        '--splits', nargs='+', default=SPLITS, choices=SPLITS,
        help='default: all')
    parser.add_argument(
        '--workers', type=int, default=2, help='processes, default 2')
    parser.add_argument(
        '--examples', type=int, default=3, help='named of a kind, default 3')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(args)


def main(args: Optional[list] = None) -> None:
    args = parse_args(args)
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    if not args.config.is_file():
        sys.exit(f'{args.config}: no such config')
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options or {})
    init_default_scope(config.get('default_scope', 'mmengine'))
    heads = [place for key in ('model', 'data_preprocessor')  # mmpretrain's mixup
             for place in stated_classes(config.get(key, {}), key)]
    checked, first, kinds = [], (), []
    for split in args.splits:
        dataset = (config.get(f'{split}_dataloader') or {}).get('dataset')
        if dataset is None or dataset in checked:
            print(f'\n{split}: ' + (
                'checked above' if dataset else 'not in the config'))
            continue
        print(f'\n{split}', end=': ')
        checked.append(dataset)
        findings = defaultdict(list)
        for cfg in leaves(dataset):
            classes = check_dataset(cfg, heads, split, args.workers, findings)
            first = first or classes
            if classes and tuple(classes) != tuple(first):
                findings['ERROR: other classes than the data set before'].append(
                    f'{tuple(classes)}, not {tuple(first)}')
        if 'type' in dataset and [dataset] != list(leaves(dataset)) and (
                'ERROR: data set that cannot be loaded' not in findings):
            check_wrapper(dataset, findings)
        for kind, where in sorted(findings.items()):
            if where:
                kinds.append(kind)
                print('\n    '.join([f'{kind}: {len(where)}',
                                     *where[:args.examples]]))
    if not checked:
        sys.exit(f'{args.config}: no data set for {", ".join(args.splits)}')
    errors = sum(kind.startswith('ERROR') for kind in kinds)
    print(f'\n{errors} kinds of errors, {len(kinds) - errors} of warnings')
    sys.exit(1 if errors else 0)


if __name__ == '__main__':
    main()
