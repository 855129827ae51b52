"""docs/own_data.md followed with made digits in the place of one's own data."""
import math
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.visualization import Visualizer
from mmseg.visualization import SegLocalVisualizer

from builders import load_tool
from mmlavit import launch
from mmlavit.engine.safe_loading import load_from_local

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


def follow(config: Path, capsys) -> str:
    """The page's commands, in their order and with their arguments; what they print."""
    steps = re.search(r'^1\. (.*?)\n\n', PAGE, re.M | re.S)[1].replace('\n', ' ')
    commands = re.findall(r'`python tools/(\w+)\.py ([^`]*)`', steps)
    assert [name for name, _ in commands] == ['check_data', 'train', 'test']
    for name, arguments in commands:
        if 'CHECKPOINT' in arguments:
            files = Path('work_dirs/my_config').glob('*.pth')
            newest = max(files, key=lambda path: path.stat().st_mtime)
            arguments = arguments.replace('CHECKPOINT', str(newest))
        # In this process: another takes seconds to begin.
        with mock.patch.object(sys, 'argv', [f'{name}.py', *arguments.split()]):
            if name == 'check_data':
                with pytest.raises(SystemExit) as end:
                    load_tool(name).main()
                assert end.value.code == 0
            else:
                launch.main(name)
        Visualizer._instance_dict.clear(), SegLocalVisualizer._instance_dict.clear()
    return capsys.readouterr().out


def write_config(kind: str, data: Path) -> Path:
    """The page's, for the digits; small."""
    code = CODES[kind].replace("'configs/", f"'{ROOT}/configs/")
    for old, new in {"'DATA": f"'{data}", **CHANGES[kind]}.items():
        assert old in code, old
        code = code.replace(old, new)
    path = Path('my_config.py')
    path.write_text(code.replace("'checkpoints/", f"'{ROOT}/checkpoints/"))
    shrink(Config.fromfile(path)).dump(path)
    return path


@pytest.mark.parametrize('kind', KINDS)
def test_check_train_and_test(kind, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = follow(write_config(kind, data), capsys)
    metric = dict(boxes='coco/bbox_mAP', masks='mIoU', folders='accuracy/top1')[kind]
    assert f'{metric}: ' in out.split('Epoch(test)')[-1]
    place = dict(boxes='work_dirs/my_config/TIME/pictures', folders='pictures',
                 masks='pictures/vis_data/vis_image')[kind]
    assert f'`{place}`' in PAGE
    pictures = [x for x in Path().glob(f'{place.replace("TIME", "*")}/*')
                if x.suffix in ('.png', '.jpg')]
    assert len(pictures) >= 4


def test_the_two_options_of_fine_tuning(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ('model.backbone.frozen_stages=0',
               'optim_wrapper.paramwise_cfg.layer_decay_rate=0.9')
    for option in options:
        assert f'`--cfg-options {option}`' in PAGE
    path = write_config('folders', data)
    with mock.patch.object(sys, 'argv', ['train.py', str(path), '--cfg-options', *options]):
        launch.main('train')
    trained = load_from_local(str(next(Path('work_dirs/my_config').glob('*.pth'))))
    rates = [group['initial_lr'] for group in trained['optimizer']['param_groups']]
    # One of the head, and one of each of the eight layers that are not frozen.
    assert max(rates) == 1e-3 and len({round(math.log(x / 1e-3, .9)) for x in rates}) >= 9
    begun = load_from_local(Config.fromfile(path).model.backbone.init_cfg.checkpoint)
    moved = {name.split('.')[2] for name, x in begun['state_dict'].items()
             if name.startswith('backbone.stages.') and x.is_floating_point()
             and not torch.equal(x.float(), trained['state_dict'][name])}
    assert moved == {'1', '2', '3'}
