"""Data sets of a config: what is wrong with them and what they silently leave out.

For mmdetection, mmsegmentation and mmpretrain: built as the runner would, every item
taken through its pipeline.
"""
import contextlib
import io
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope
from torch.utils.data import DataLoader
from tqdm import tqdm

from .item_checks import CheckedItems
from .report import markdown_table

SPLITS = ('train', 'val', 'test')
WRAPPED_ITEMS = 8  # taken through a wrapper's own pipeline
SHOWN_CLASSES = 40  # of more, the most and the least frequent
NOT_LOADED = 'ERROR: data set that cannot be loaded'
Findings = Dict[str, List[str]]  # 'ERROR: problem' or 'WARNING: problem': where


@dataclass
class Balance:
    """How often each class occurs in a data set."""
    title: str  # 'CocoDataset: 8 images of 8'
    classes: Sequence  # as training numbers them
    images: Counter = field(default_factory=Counter)  # with the label
    labels: Counter = field(default_factory=Counter)  # boxes, images or pixels
    labelled: bool = False

    def rows(self) -> List[dict]:
        """Of a table; of many classes the most and the least frequent."""
        total = max(sum(self.labels.values()), 1)
        rows = [{
            'class, as training numbers them': str(name),
            'images': self.images[label],
            'annotations or pixels': self.labels[label],
            'share': f'{self.labels[label] / total:.2%}'
        } for label, name in enumerate(self.classes)]
        if len(rows) <= SHOWN_CLASSES:
            return rows
        order = sorted(range(len(rows)), key=lambda label: -self.labels[label])
        rows = [rows[label] for label in order]
        gap = dict.fromkeys(rows[0], '')
        gap['class, as training numbers them'] = '...'
        half = SHOWN_CLASSES // 2
        return [*rows[:half], gap, *rows[-half:]]


@dataclass
class SplitReport:
    """What was found in the data sets of a split."""
    split: str
    balances: List[Balance] = field(default_factory=list)
    classes: List[Tuple[str, ...]] = field(default_factory=list)  # of each data set
    findings: Findings = field(default_factory=lambda: defaultdict(list))

    def kinds(self) -> List[str]:
        """The problems that occur, errors first."""
        return sorted(kind for kind, where in self.findings.items() if where)

    def describe(self, examples: int = 3) -> str:
        """The balance of each data set, and every problem with its first places."""
        parts = [] if self.balances else [f'{self.split}:']
        for balance in self.balances:
            parts.append(f'{self.split}: {balance.title}')
            if balance.labelled and balance.classes:
                parts.append(markdown_table(balance.rows()))
        for kind in self.kinds():
            where = self.findings[kind]
            parts.append('\n    '.join([f'{kind}: {len(where)}', *where[:examples]]))
        return '\n'.join(parts)


def check_config(config: Config, splits: Sequence[str] = SPLITS,
                 workers: int = 2) -> Iterator[Tuple[str, Optional[SplitReport]]]:
    """Checks the data sets of a config, one split after the other.

    Goes on after an error, and counts every problem.

    Args:
        config (Config): Of mmdet, mmseg or mmpretrain.
        splits (Sequence[str]): Of 'train', 'val' and 'test'. Default: all.
        workers (int): Processes that load items; 0: this one. Default: 2.

    Yields:
        tuple: The split and its report; None if it has no data set, or one that a
        split before has.
    """
    init_default_scope(config.get('default_scope', 'mmengine'))
    heads = [place for key in ('model', 'data_preprocessor')  # mmpretrain's mixup
             for place in stated_classes(config.get(key, {}), key)]
    checked, first = [], ()
    for split in splits:
        dataset = split_dataset(config, split)
        if dataset is None or dataset in checked:
            yield split, None
            continue
        checked.append(dataset)
        report = SplitReport(split)
        for cfg in leaves(dataset):
            check_dataset(cfg, heads, workers, report)
        for classes in report.classes:
            first = first or classes
            if classes and classes != first:
                report.findings[
                    'ERROR: other classes than the data set before'].append(
                        f'{classes}, not {first}')
        wrapped = 'type' in dataset and [dataset] != list(leaves(dataset))
        if wrapped and NOT_LOADED not in report.findings:
            check_wrapper(dataset, report.findings)
        yield split, report


def split_dataset(config: Config, split: str) -> Optional[dict]:
    """The data set of a split, or None."""
    return (config.get(f'{split}_dataloader') or {}).get('dataset')


def leaves(cfg: dict) -> Iterator[dict]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = cfg.get('datasets', cfg.get('dataset'))
    if inner is None:
        yield cfg
    else:
        for each in [inner] if isinstance(inner, dict) else inner:
            yield from leaves(each)


def stated_classes(cfg, path: str = 'model') -> Iterator[Tuple[str, int]]:
    """Every num_classes in the config of a model, with its place."""
    if isinstance(cfg, (list, tuple)):
        for i, item in enumerate(cfg):
            yield from stated_classes(item, f'{path}[{i}]')
    elif isinstance(cfg, dict):
        for key, value in cfg.items():
            if key == 'num_classes' and isinstance(value, int):
                yield f'{path}.{key}={value}', value
            elif key not in ('rpn_head', 'semantic_head'):  # of other classes
                yield from stated_classes(value, f'{path}.{key}')


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


def check_dataset(cfg: dict, heads: List[Tuple[str, int]], workers: int,
                  report: SplitReport) -> None:
    """Adds one data set's balance, classes and findings to the report."""
    findings, classes = report.findings, ()
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
        findings[NOT_LOADED].append(
            f"{cfg.get('type')}: {type(error).__name__}: {error}")
        report.classes.append(tuple(classes))
        return
    classes = classes or dataset.metainfo.get('classes') or ()  # of the folders
    report.classes.append(tuple(classes))
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
    balance = check_items(
        dataset, len(classes) or max(
            (number for _, number in heads), default=math.inf), report.split, workers,
        findings)
    balance.title = f'{type(dataset).__name__}: {len(dataset)} images of {len(items)}'
    balance.classes = classes or range(max(balance.labels, default=-1) + 1)
    report.balances.append(balance)
    if balance.labelled:
        check_balance(balance, report.split, bool(
            classes and getattr(dataset, 'reduce_zero_label', False)), findings)


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
        elif 'bbox' in ann:
            problem = box_problem(ann, image, coco.cats)
            if problem:
                findings[problem].append(
                    f"annotation {ann['id']}, {image['file_name']} "
                    f"({image['width']} x {image['height']}): {ann['bbox']}")


def box_problem(ann: dict, image: dict, categories: dict) -> Optional[str]:
    """What is wrong with a COCO annotation's box, if anything."""
    x, y, w, h = ann['bbox']
    width, height = image['width'], image['height']
    if ann['category_id'] not in categories:
        return f"ERROR: category {ann['category_id']} that is not in the file"
    if not all(map(math.isfinite, ann['bbox'])):
        return 'ERROR: box that is not finite'
    if min(w, h) < 1 or ann['area'] <= 0:
        return 'WARNING: box without area, left out'
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        return 'WARNING: box outside of its image, left out'
    if min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
        return 'WARNING: box partly outside of its image'
    return None


def check_items(dataset: BaseDataset, num_classes: float, split: str, workers: int,
                findings: Findings) -> Balance:
    """Adds what is wrong with single items; counts their labels."""
    balance = Balance('', ())
    items = DataLoader(CheckedItems(dataset, num_classes), None,
                       num_workers=workers, collate_fn=tuple)
    for found, labels in tqdm(items, split, unit='image', disable=None):
        for problem, where in found:
            findings[problem].append(where)
        if labels is not None:
            balance.labelled = True
            balance.labels.update(labels)
            balance.images.update(list(labels))
    return balance


def check_balance(balance: Balance, split: str, reduces_zero: bool,
                  findings: Findings) -> None:
    """Classes that never occur, and why that may be."""
    findings['WARNING: class without any annotation'] += [
        str(name) for label, name in enumerate(balance.classes)
        if not balance.labels[label]]
    if not balance.labels:
        findings['ERROR: data set without any annotation'].append(split)
    if reduces_zero and not balance.labels[len(balance.classes) - 1]:
        findings['WARNING: reduce_zero_label=True, which ignores label 0 and moves '
                 'the others down, and the last class never occurs'].append(
            f'{balance.classes[-1]!r}: if the masks number the classes from 0, every '
            'class has the name of another: set it to False, here and in '
            'LoadAnnotations')
