"""docs/own_data.md followed with made digits in the place of one's own data."""
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
from mmengine.config import Config

from mmlavit import launch
from mmlavit.analysis.dataset_checks import check_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs/own_data.md').read_text()
KINDS = ('boxes', 'masks', 'folders')
CODES = dict(zip(KINDS, re.findall(r'^```python\n(.*?)^```', PAGE, re.M | re.S),
                 strict=True))
DIGITS = tuple('0123456789')
# What the page says to change: here to the digits' classes and files.
CHANGES = dict(
    boxes={"('cat', 'dog')": str(DIGITS), 'num_classes=2': 'num_classes=10'},
    masks={"('sky', 'building')": str(('none', *DIGITS)),
           '[[128, 128, 128], [128, 0, 0]]': str([[9 * i] * 3 for i in range(11)]),
           'num_classes=2': 'num_classes=11', "'.jpg'": "'.png'"},
    folders={'num_classes=2': 'num_classes=10'})
# Else a step on a CPU takes half a minute.
SIZES = dict(Resize=dict(scale=(64, 64)), RandomResize=dict(scale=(64, 64)),
             RandomCrop=dict(crop_size=(64, 64)), RandomResizedCrop=dict(scale=64),
             ResizeEdge=dict(scale=64), CenterCrop=dict(crop_size=64))


@pytest.fixture(scope='module')
def data(digits, tmp_path_factory) -> Path:
    """The digits where the page expects the data; two of each class."""
    folder = tmp_path_factory.mktemp('own')
    for split in ('train', 'val'):
        shutil.copy(digits / f'annotations/{split}.json', folder)
        for label in DIGITS:
            (folder / split / label).mkdir(parents=True)
            for file in sorted((digits / f'classes/{split}/{label}').iterdir())[:2]:
                shutil.copy(file, folder / split / label)
    for name in ('images', 'masks'):
        shutil.copytree(digits / name, folder / name)
    return folder


def shrink(config: Config) -> Config:
    """Small images and a step or two; all else as the page has it."""
    model = config.model
    if 'bbox_head' in model:
        model.test_cfg.score_thr = 0.  # after a step no box has the usual score
    if config.default_scope == 'mmseg':
        model.data_preprocessor.size = (64, 64)
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        for step in loader.dataset.pipeline:
            step.update(SIZES.get(step.type, {}))
    config.default_hooks.visualization.interval = 1  # a picture of every image
    short = dict(max_iters=1) if 'max_iters' in config.train_cfg else dict(max_epochs=1)
    config.train_cfg.update(val_interval=1, **short)
    return config


def run(task: str, *argv) -> None:
    """tools/train.py or tools/test.py, in this process."""
    with mock.patch.object(sys, 'argv', [f'{task}.py', *map(str, argv)]):
        launch.main(task)


@pytest.mark.parametrize('kind', KINDS)
def test_check_train_and_test(kind, data, tmp_path, capsys):
    code = CODES[kind].replace("'configs/", f"'{ROOT}/configs/")
    for old, new in {"'DATA": f"'{data}", **CHANGES[kind]}.items():
        assert old in code, old
        code = code.replace(old, new)
    code = code.replace("'checkpoints/", f"'{ROOT}/checkpoints/")
    path = tmp_path / f'my_{kind}.py'
    path.write_text(code)

    for split, report in check_config(Config.fromfile(path), ('train', 'val'), 0):
        assert not [x for x in report.kinds() if x.startswith('ERROR')], split

    shrink(Config.fromfile(path)).dump(path)
    run('train', path, '--work-dir', tmp_path / 'work')
    checkpoint = Path((tmp_path / 'work/last_checkpoint').read_text())
    assert checkpoint.is_file()
    run('test', path, checkpoint, '--show-dir', tmp_path / 'pictures', '--work-dir',
        tmp_path / 'test')
    metric = dict(boxes='coco/bbox_mAP', masks='mIoU', folders='accuracy/top1')[kind]
    assert f'{metric}: ' in capsys.readouterr().out.split('Epoch(test)')[-1]
    # mmsegmentation's go where the first visualizer of this process wrote.
    pictures = [x for x in tmp_path.rglob('*') if x.suffix in ('.png', '.jpg')]
    assert len(pictures) >= 4
