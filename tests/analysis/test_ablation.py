"""The grid of variants, on a folder of random images."""
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmlavit.analysis import ablation, training
from mmlavit.analysis.ablation import (VARIANTS, Grid, check_config, entropy_rows,
                                       summarise, table_rows, train)
from mmlavit.models.backbones.arch import resolve_arch

ROOT = Path(__file__).parents[2]
ARCH = dict(embed_dims=(8, 16), depths=(2, 3), num_heads=(1, 2),
            num_va_layers=(2, 1), strides=(2, 2), patch_sizes=(3, 3))


@pytest.fixture
def grid(tmp_path) -> Grid:
    rng = np.random.default_rng(0)
    for split, count in (('train', 6), ('test', 4)):
        for label in ('a', 'b'):
            path = tmp_path / 'data' / split / label
            path.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(path / f'{i}.png'),
                            rng.integers(0, 255, (40, 30, 3), np.uint8))
    (tmp_path / 'config.py').write_text(
        f"_base_ = {str(ROOT / 'configs/lavit_t_in1k.py')!r}\n"
        "model = dict(backbone=dict(_delete_=True, type='LaViT', "
        f'arch={ARCH}, sr_ratios=(2, 1), out_indices=(1, ), dp_loss=dict()), '
        'head=dict(in_channels=16))\n')
    return Grid(tmp_path / 'config.py', tmp_path / 'out', epochs=1,
                data=tmp_path / 'data', size=32, batch_size=4, workers=0)


def test_grid_is_trained_once_resumed_and_summarised(grid, monkeypatch):
    names = ['LaViT', 'identity', 'all VA (the twin)', 'uniform everywhere']
    tasks = []

    def listen(task, arguments, log):
        tasks.append(task)
        # In this process: one that starts takes longer than the training.
        config = Config.fromfile(arguments[0])
        config.work_dir = str(arguments[arguments.index('--work-dir') + 1])
        if task == 'train':
            config.resume = True
            Runner.from_cfg(config).train()
        else:
            config.load_from = str(arguments[1])
            Runner.from_cfg(config).test()

    monkeypatch.setattr(training, 'launch', listen)
    for name in names:
        assert 0 <= train(grid, name, 0) <= 100
    assert tasks == ['train'] * 4
    rows = {name: summarise(grid, name, [0], images=8) for name in names}
    # Plain reuse makes maps more alike, and has no Theta and Psi; the twin has Q
    # and K instead.
    lavit, identity, twin, uniform = (rows[name] for name in names)
    assert identity['maps'] > twin['maps']
    assert identity['params'] < min(lavit['params'], twin['params'])
    assert 1 - uniform['va_entropy'] < 1e-6 < 1 - twin['va_entropy']
    assert uniform['params'] == twin['params']
    layers = entropy_rows(list(rows.values()))
    assert layers[3] == dict(variant='uniform everywhere',
                             **{f'layer {i}': '1.00' for i in range(5)})

    # Cut off between the last checkpoint and its validation: only tested.
    tasks.clear()
    run = grid.work_dir('LaViT', 0)
    log = next(run.glob('*/vis_data/scalars.json'))
    log.write_text(''.join(line for line in open(log) if 'top1' not in line))
    before = (run / 'epoch_1.pth').stat().st_mtime
    assert train(grid, 'LaViT', 0) == rows['LaViT']['score']
    assert (run / 'epoch_1.pth').stat().st_mtime == before
    assert tasks == ['test']

    tasks.clear()
    assert train(grid, 'LaViT', 0) == rows['LaViT']['score']
    assert not tasks
    with pytest.raises(ValueError, match='another configuration or budget'):
        train(grid._replace(epochs=2), 'LaViT', 0)


def test_images_are_augmented_or_not(grid):
    for augments in (True, False):
        config = ablation.make_config(grid._replace(augments=augments), 'LaViT', 0)
        kinds = {step.type for step in config.train_dataloader.dataset.pipeline}
        assert ({'RandomCrop', 'RandomFlip'} <= kinds) == augments


def test_a_training_that_fails_names_its_log(grid, monkeypatch):
    monkeypatch.setattr(training, 'launch', lambda *args: None)
    with pytest.raises(RuntimeError, match='identity-seed3: training failed; see '
                       f'{grid.out}/runs/identity-seed3/train.log'):
        train(grid, 'identity', 3)


def test_variants_are_what_they_are_called():
    depths, va = [2, 4, 4], [2, 2, 0]
    layers = {
        name: change['num_va_layers'](depths, va)
        for name, change in VARIANTS.items() if 'num_va_layers' in change
    }
    assert layers == {
        'LA one stage earlier': [1, 2, 0],
        'LA stages only': [2, 4, 0],
        'all VA (the twin)': [2, 4, 4],
        'PVTv2 of these widths': [2, 4, 4],
        'uniform in the place of LA': [2, 4, 4],
        'uniform everywhere': [2, 4, 4]
    }
    assert VARIANTS['all VA (the twin)']['dp_loss'] is None
    for name in ('tiny', 'small', 'base'):
        arch = resolve_arch(name, None, (8, 4, 2, 1))
        earlier = ablation.one_earlier(arch['depths'], arch['num_va_layers'])
        assert sum(earlier) < sum(arch['num_va_layers'])


def test_every_row_names_its_data_and_budget(grid):
    summary = dict(dict.fromkeys(ablation.COLUMNS, 1.23456), metric='top-1')
    rows = table_rows([dict(summary, variant='LaViT', scale=grid.describe(),
                            spread=None, seeds=1)])
    assert rows[0]['scale'] == 'data at 32 px, 1 epochs, batch 4'
    assert rows[0]['top-1, %'] == '1.2' and rows[0]['± (std over seeds)'] == ''
    assert rows[0]['MACs, G'] == '1.235' and rows[0]['training step, ms'] == '1'


@pytest.mark.parametrize('path, data, message', [
    ('retinanet_lavit_t_coco.py', Path('data'), "expected a classifier's config"),
    ('baselines/retinanet_r50_coco.py', None, 'whose backbone is LaViT'),
    ('semantic_fpn_lavit_t_ade20k.py', None, 'that trains by epochs')])
def test_other_configs_are_named(path, data, message):
    with pytest.raises(ValueError, match=f'{ROOT}/configs/{path}: .*{message}'):
        check_config(ROOT / 'configs' / path, data)
    check_config(ROOT / 'configs/lavit_t_in1k.py', Path('data'))
    check_config(ROOT / 'configs/retinanet_lavit_t_coco.py', None)


def test_a_detector_keeps_its_data_and_takes_the_budget(tmp_path):
    path = ROOT / 'configs/retinanet_lavit_digits.py'
    config = ablation.make_config(Grid(path, tmp_path, epochs=3, workers=0),
                                  'no DP loss', 1)
    kept = Config.fromfile(path)
    assert config.train_dataloader.dataset == kept.train_dataloader.dataset
    assert config.optim_wrapper == kept.optim_wrapper
    assert config.train_cfg.max_epochs == config.train_cfg.val_interval == 3
    assert training.metric_of(config).title == 'AP'
