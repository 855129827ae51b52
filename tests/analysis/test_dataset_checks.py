"""Whole and broken data of the three toolboxes."""
import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from builders import run_tool
from mmlavit.analysis.dataset_checks import Balance, check_config, stated_classes

ROOT = Path(__file__).parents[2]
DIGITS = tuple('0123456789')


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    """Two images of each class, so that a walk takes no time."""
    out = tmp_path_factory.mktemp('data') / 'digits'
    done = run_tool('make_digits', out, '--train', 8, '--val', 4, '--digits', 9, 12)
    assert done.returncode == 0, done.stderr
    for folder in out.glob('classes/*/*'):
        for path in sorted(folder.iterdir())[2:]:
            path.unlink()
    return out


def rows_of(report: str) -> list:
    """The cells of its tables."""
    return [[cell.strip() for cell in line.strip('|').split('|')]
            for line in report.splitlines() if line.startswith('|')]


def make_config(scope: str, root: Path) -> Config:
    """Data sets with the usual pipelines; of the model what is compared."""
    pytest.importorskip(scope)

    def split(name: str) -> dict:
        if scope == 'mmdet':
            dataset = dict(
                type='CocoDataset', metainfo=dict(classes=DIGITS),
                ann_file=f'annotations/{name}.json',
                data_prefix=dict(img=f'images/{name}/'),
                filter_cfg=dict(filter_empty_gt=True),
                test_mode=name == 'val')
            load = [dict(type='LoadAnnotations', with_bbox=True)]
            pack = 'PackDetInputs'
        elif scope == 'mmseg':
            dataset = dict(
                type='BaseSegDataset', metainfo=dict(classes=('none', *DIGITS)),
                img_suffix='.png',
                data_prefix=dict(
                    img_path=f'images/{name}', seg_map_path=f'masks/{name}'))
            load, pack = [dict(type='LoadAnnotations')], 'PackSegInputs'
        else:
            dataset = dict(type='CustomDataset', data_prefix=f'classes/{name}')
            load, pack = [], 'PackInputs'
        pipeline = [dict(type='LoadImageFromFile'), *load, dict(type=pack)]
        return dict(dataset=dict(
            dataset, data_root=str(root), pipeline=pipeline))

    head = dict(mmdet='bbox_head', mmseg='decode_head', mmpretrain='head')
    return Config(
        dict(
            default_scope=scope,
            model={head[scope]: dict(num_classes=10 + (scope == 'mmseg'))},
            train_dataloader=split('train'),
            val_dataloader=split('val'),
            test_dataloader=split('val')))


def check(config: Config, splits=('train', 'val', 'test'), workers=0) -> tuple:
    """Whether there are errors, and the report."""
    found = dict(check_config(config, splits, workers))
    assert list(found) == list(splits)
    reports = [report for report in found.values() if report]
    return (any(kind.startswith('ERROR') for report in reports
                for kind in report.kinds()),
            '\n\n'.join(report.describe() + '\n' for report in reports))


@pytest.fixture
def wrapped(digits) -> Config:
    """Detection data within a wrapper that has a pipeline of its own."""
    config = make_config('mmdet', digits)
    inner = config.train_dataloader.dataset
    *inner.pipeline, pack = inner.pipeline
    config.train_dataloader.dataset = dict(
        type='MultiImageMixDataset', dataset=inner,
        pipeline=[dict(type='Mosaic', img_scale=(160, 160)), pack])
    return config


def test_wrappers_are_tried_too(wrapped):
    errors, report = check(wrapped, ['train'])
    assert not errors, report
    wrapped.train_dataloader.dataset.pipeline[0].img_scale = 160
    errors, report = check(wrapped, ['train'])
    assert errors
    assert 'ERROR: data set wrapper that fails: 1\n' in report
    assert 'MultiImageMixDataset: ' in report


def test_masks_from_zero_with_reduce_zero_label_are_noticed(digits):
    """Digits' masks number none of 11 classes from 0; the last one is missing then."""
    config = make_config('mmseg', digits)
    for split in (config.train_dataloader, config.val_dataloader):
        split.dataset.reduce_zero_label = True
        split.dataset.pipeline[1].reduce_zero_label = True
    errors, report = check(config, ['train'])
    assert not errors
    assert 'the last class never occurs: 1\n' in report and "'9': if" in report


def edit_json(root: Path, edit) -> None:
    path = root / 'annotations/train.json'
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def cut(path: Path, size: int = 2000) -> None:
    path.write_bytes(path.read_bytes()[:size])


def add_cut_off_jpeg(folder: Path) -> None:
    """Which OpenCV reads, with a grey half."""
    path = str(folder / 'x.jpg')
    cv2.imwrite(path, cv2.imread(str(next(folder.iterdir()))))
    cut(Path(path), Path(path).stat().st_size // 2)
    assert cv2.imread(path) is not None


def set_box(number: int, *box):
    return lambda root, config: edit_json(
        root, lambda data: data['annotations'][number].update(bbox=box))


def set_train(**kwargs):
    return lambda root, config: config.train_dataloader.dataset.update(kwargs)


def paint(path: str, *labels, shape=(160, 160)):
    mask = np.full(shape, labels[0], np.uint8)
    mask.flat[:len(labels)] = labels
    return lambda root, config: cv2.imwrite(str(root / path), mask)


IMAGE, MASK = 'images/train/00003.png', 'masks/train/00003.png'
# fault: (toolbox, how it is provoked, words of the report)
FAULTS = dict(
    missing_image=('mmdet', lambda root, config: (root / IMAGE).unlink(),
                   'ERROR: missing image: 1\n', IMAGE),
    cut_off_image=('mmdet', lambda root, config: cut(root / IMAGE),
                   'ERROR: unreadable image: 1\n', IMAGE),
    cut_off_jpeg=('mmpretrain', lambda root, config: add_cut_off_jpeg(
        root / 'classes/train/3'), 'ERROR: unreadable image: 1\n', '3/x.jpg'),
    empty_image=('mmdet', lambda root, config: cut(root / IMAGE, 0),
                 'ERROR: unreadable image: 1\n', IMAGE),
    text_as_image=(
        'mmpretrain', lambda root, config: (
            root / 'classes/train/3/x.png').write_text('text'),
        'ERROR: unreadable image: 1\n', '3/x.png'),
    missing_annotations=('mmdet', set_train(ann_file='no.json'),
                         'ERROR: data set that cannot be loaded: 1\n',
                         'FileNotFoundError', 'no.json', 'val: CocoDataset: 4'),
    broken_annotations=(
        'mmdet', lambda root, config: cut(root / 'annotations/train.json'),
        'ERROR: data set that cannot be loaded: 1\n', 'JSONDecodeError'),
    repeated_annotation=(
        'mmdet', lambda root, config: edit_json(
            root, lambda data: data['annotations'].append(
                data['annotations'][0])),
        'ERROR: data set that cannot be loaded: 1\n', 'not unique'),
    wrong_class_name=(
        'mmdet', set_train(metainfo=dict(classes=('zero', *DIGITS[1:]))),
        'ERROR: class of the config that the annotation file does not have: 1\n',
        "'zero': write metainfo=dict(classes=('0', '1'",
        'WARNING: class of the annotation file that the config leaves out: 1\n'),
    no_class_names=(
        'mmdet', lambda root, config: config.train_dataloader.dataset.pop(
            'metainfo'),
        'class of the config that the annotation file does not have: 80\n',
        'ERROR: data set that cannot be loaded: 1\n', 'no image is left of 8'),
    one_class_without_comma=(
        'mmdet', set_train(metainfo=dict(classes='digit')),
        "ERROR: classes are a text: 1\n    'digit': write ('digit', )"),
    classes_in_another_order=(
        'mmdet', set_train(metainfo=dict(classes=DIGITS[::-1])),
        'ERROR: classes in another order than in the annotation file: 1\n',
        'ERROR: other classes than the data set before: 1\n'),
    folders_in_another_order=(
        'mmpretrain', set_train(metainfo=dict(classes=DIGITS[::-1])),
        'ERROR: classes in another order than in the folders: 1\n'),
    head_of_another_size=(
        'mmdet', lambda root, config: config.merge_from_dict(
            {'model.bbox_head.num_classes': 80}),
        'ERROR: model for another number of classes: 1\n',
        'model.bbox_head.num_classes=80, the data set has 10'),
    unknown_category=(
        'mmdet', lambda root, config: edit_json(
            root, lambda data: data['annotations'][0].update(category_id=77)),
        'ERROR: category 77 that is not in the file: 1\n'),
    annotation_of_no_image=(
        'mmdet', lambda root, config: edit_json(
            root, lambda data: data['annotations'][0].update(image_id=77)),
        'WARNING: annotation of an image not in the file: 1\n'),
    box_outside=('mmdet', set_box(0, 200, 10, 20, 20),
                 'WARNING: box outside of its image, left out: 1\n'
                 '    annotation 1, 00000.png (160 x 160): [200, 10, 20, 20]'),
    box_partly_outside=('mmdet', set_box(0, 150, 10, 20, 20),
                        'WARNING: box partly outside of its image: 1\n'),
    box_without_area=('mmdet', set_box(0, 50, 10, 20, 0),
                      'WARNING: box without area, left out: 1\n'),
    box_not_finite=('mmdet', set_box(0, float('nan'), 10, 20, 20),
                    'ERROR: box that is not finite: 1\n'),
    another_image_size=(
        'mmdet', lambda root, config: edit_json(
            root, lambda data: data['images'][3].update(width=320)),
        'ERROR: image of another size than its annotations say: 1\n',
        '(160, 160), not (320, 160)'),
    image_without_annotations=(
        'mmdet', lambda root, config: edit_json(
            root, lambda data: data.update(annotations=[
                ann for ann in data['annotations'] if ann['image_id'] != 3])),
        'train: CocoDataset: 7 images of 8\n',
        'WARNING: image left out by filter_cfg or indices: 1\n', IMAGE),
    no_annotations=(
        'mmdet', lambda root, config: (
            edit_json(root, lambda data: data.update(annotations=[])),
            set_train(filter_cfg=None)(root, config)),
        'ERROR: data set without any annotation: 1\n',
        'WARNING: image without annotations: 8\n',
        'WARNING: class without any annotation: 10\n'),
    all_filtered_out=('mmdet', set_train(filter_cfg=dict(min_size=999)),
                      'ERROR: data set that cannot be loaded: 1\n',
                      'no image is left of 8', 'filter_cfg'),
    wrong_suffix=('mmseg', set_train(img_suffix='.jpg'),
                  'ERROR: data set that cannot be loaded: 1\n',
                  'no image is left of 0', 'suffixes'),
    missing_mask=('mmseg', lambda root, config: (root / MASK).unlink(),
                  'ERROR: missing mask: 1\n', MASK),
    cut_off_mask=('mmseg', lambda root, config: cut(root / MASK, 100),
                  'ERROR: unreadable mask: 1\n', MASK),
    unknown_label=('mmseg', paint(MASK, 3, 11, 200, 255),
                   'ERROR: label that is no class: 1\n',
                   f'{MASK}: [11, 200], expected 0 to 10'),
    mask_of_another_size=('mmseg', paint(MASK, 3, shape=(80, 160)),
                          'ERROR: mask of another size than its image: 1\n',
                          f'{MASK}: (160, 80), not (160, 160)'),
    mask_of_colours=('mmseg', paint(MASK, 3, shape=(160, 160, 3)),
                     'ERROR: mask of colours, not labels: 1\n'),
    ignored_mask=('mmseg', paint(MASK, 255),
                  'WARNING: image without annotations: 1\n'),
    contradicting_pipeline=(
        'mmseg', lambda root, config: config.train_dataloader.dataset.pipeline[
            1].update(reduce_zero_label=True),
        'ERROR: item at which the pipeline fails: 8\n', 'reduce_zero_label'),
    label_beyond_the_classes=(
        'mmpretrain', lambda root, config: (
            (root / 'list.txt').write_text('0/{0} 0\n1/{0} 10\n'.format(
                next((root / 'classes/train/1').iterdir()).name)),
            set_train(ann_file='list.txt')(root, config)),
        'ERROR: label that is no class: 1\n', '[10], expected 0 to 9'),
    class_without_images=(
        'mmpretrain', lambda root, config: [
            path.unlink() for path in (root / 'classes/train/4').iterdir()],
        'WARNING: class without any annotation: 1\n    4\n'),
    missing_folder=(
        'mmpretrain', lambda root, config: shutil.rmtree(
            root / 'classes/val/4'),
        'ERROR: other classes than the data set before: 1\n',
        'ERROR: model for another number of classes: 1\n'),
)


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_named(fault, digits, tmp_path):
    scope, provoke, *words = FAULTS[fault]
    root = tmp_path / 'digits'
    shutil.copytree(digits, root)
    config = make_config(scope, root)
    provoke(root, config)
    errors, report = check(config)
    for word in words:
        assert word in report
    assert errors == any('ERROR' in word for word in words)
    assert '\n\nval:' in report  # it went on to the end


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_whole_data_passes_and_its_balance_is_right(scope, digits):
    errors, report = check(make_config(scope, digits))
    assert not errors and 'ERROR' not in report, report
    number = 20 if scope == 'mmpretrain' else 8
    assert f': {number} images of {number}\n' in report
    cells = next(cells for cells in rows_of(report) if cells[0] == '7')
    if scope == 'mmdet':
        data = json.loads((digits / 'annotations/train.json').read_text())
        images = [ann['image_id'] for ann in data['annotations']
                  if ann['category_id'] == 7]
        counts, total = (len(set(images)), len(images)), data['annotations']
        share = len(images) / len(total)
    elif scope == 'mmseg':
        masks = np.stack([cv2.imread(str(path), -1)
                          for path in digits.glob('masks/train/*')])
        here = masks == 8
        counts, share = (here.any((1, 2)).sum(), here.sum()), here.mean()
    else:
        counts, share = (2, 2), .1
    assert cells == ['7', *map(str, counts), f'{share:.2%}']


def test_heads_of_other_classes_do_not_count():
    model = dict(rpn_head=dict(num_classes=1), roi_head=dict(
        bbox_head=[dict(num_classes=80)], semantic_head=dict(num_classes=183)))
    assert list(stated_classes(model)) == [
        ('model.roi_head.bbox_head[0].num_classes=80', 80)]


def test_wrapped_data_sets_processes_and_chosen_splits(digits, tmp_path):
    root = tmp_path / 'digits'
    shutil.copytree(digits, root)
    config = make_config('mmdet', root)
    (root / IMAGE).unlink()
    dataset = config.train_dataloader.dataset
    config.train_dataloader.dataset = dict(
        type='RepeatDataset', times=3, dataset=dict(
            type='ConcatDataset', datasets=[dataset, dataset]))
    errors, report = check(config, ['train'], workers=2)
    assert errors
    assert 'ERROR: missing image: 2\n' in report and 'val' not in report
    assert check(config, ['val'])[0] == 0


def test_of_many_classes_the_most_and_the_least_frequent_are_shown():
    counts = Counter({label: label + 1 for label in range(100)})
    rows = [list(map(str, row.values()))
            for row in Balance('', range(100), counts, counts).rows()]
    assert len(rows) == 41
    assert rows[0] == ['99', '100', '100', '1.98%']
    assert rows[20] == ['...', '', '', ''] and rows[-1][:3] == ['0', '1', '1']
