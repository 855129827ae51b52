"""The grid of variants, on a folder of random images."""
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from mmlavit.analysis import ablation, training
from mmlavit.analysis.ablation import (VARIANTS, Grid, check_config, layer_rows,
                                       summarise, table_rows, train)
from mmlavit.analysis.building import build_model
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
    names = ['LaViT', 'identity', 'all VA (the twin)', 'uniform everywhere', 'ResNet']
    tasks = []

    def listen(task, arguments, log):
        tasks.append(task)
        # In this process: one that starts takes longer than the training.
        config = Config.fromfile(arguments[0])
        config.work_dir = str(arguments[arguments.index('--work-dir') + 1])
        # Else two that begin in the same second share their log.
        config.experiment_name = str(len(tasks))
        if task == 'train':
            config.resume = True
            Runner.from_cfg(config).train()
        else:
            config.load_from = str(arguments[1])
            Runner.from_cfg(config).test()

    monkeypatch.setattr(training, 'launch', listen)
    for name in names:
        assert 0 <= train(grid, name, 0) <= 100
    assert tasks == ['train'] * 5
    rows = {name: summarise(grid, name, [0], images=8) for name in names}
    # Plain reuse makes maps more alike, and has no Theta and Psi; the twin has Q
    # and K instead.
    lavit, identity, twin, uniform, resnet = (rows[name] for name in names)
    assert identity['maps'] > twin['maps']
    assert identity['params'] < min(lavit['params'], twin['params'])
    assert 1 - uniform['va_entropy'] < 1e-6 < 1 - twin['va_entropy']
    assert uniform['params'] == twin['params']
    assert resnet['macs'] > 0
    layers = layer_rows(list(rows.values()), 'entropy')
    every = [f'layer {i}' for i in range(5)]
    assert [layers[3][name] for name in every] == ['1.00'] * 5
    assert [layers[4][name] for name in every] == [''] * 5

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
    assert train(grid._replace(workers=1), 'LaViT', 0) == rows['LaViT']['score']
    with pytest.raises(ValueError, match='another configuration, budget, data set'):
        train(grid._replace(epochs=2), 'LaViT', 0)
    (grid.data / 'dataset.json').write_text('{"seed": 1}')
    with pytest.raises(ValueError, match='another configuration, budget, data set'):
        train(grid, 'LaViT', 0)
    (grid.data / 'dataset.json').unlink()
    with training.alone(run), pytest.raises(RuntimeError, match='another process'):
        train(grid, 'LaViT', 0)
    # What was trained there is not known.
    (run / 'asked/config.py').unlink()
    with pytest.raises(ValueError, match='another configuration, budget, data set'):
        train(grid, 'LaViT', 0)


def test_images_are_augmented_or_not(grid):
    for augments in (True, False):
        config = ablation.make_config(grid._replace(augments=augments), 'LaViT', 0)
        kinds = {step.type for step in config.train_dataloader.dataset.pipeline}
        assert ({'RandomCrop', 'RandomFlip'} <= kinds) == augments


def test_the_resnet_is_as_large_as_the_network():
    config = Config.fromfile(ROOT / 'configs/lavit_n_tin100.py')
    count = sum(p.numel() for p in build_model(config).parameters())
    ablation.set_backbone(config.model, 'ResNet', {})
    model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=.05)


def test_sizes_that_a_config_switches_to_are_left_out(grid):
    """Else images would be cropped and flipped at 96 and 128 px from epoch 13 on."""
    grid = grid._replace(config=ROOT / 'configs/lavit_n_tin100.py')
    hooks = ablation.make_config(grid, 'LaViT', 0).custom_hooks
    assert [hook.type for hook in hooks] == ['InvalidLossHook']
    with pytest.raises(ValueError, match='without SwitchRecipeHook'):
        check_config(grid.config, None)


def test_uniform_maps_are_where_they_are_said_to_be(grid):
    config = ablation.make_config(grid, 'uniform in the place of LA', 0)
    hook = dict(config.custom_hooks[-1])
    assert hook.pop('type') == 'UniformMaps'
    model = build_model(config)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    ablation.UniformMaps(**hook).before_train(SimpleNamespace(model=model))
    kept = [[bool(block.attn.q.weight.any()) for block in stage.blocks]
            for stage in model.backbone.stages]
    assert kept == [[True, True], [True, False, False]]
    assert not model.backbone.stages[1].blocks[1].attn.q.weight.requires_grad


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
        'uniform in the place of LA': [2, 4, 4],
        'uniform everywhere': [2, 4, 4]
    }
    for name in ('tiny', 'small', 'base'):
        arch = resolve_arch(name, None, (8, 4, 2, 1))
        earlier = ablation.one_earlier(arch['depths'], arch['num_va_layers'])
        assert sum(earlier) < sum(arch['num_va_layers'])


def test_the_dp_loss_is_in_the_variants_named_after_it():
    """Whatever the config has."""
    for own in (None, dict(form='bounded')):
        for name in VARIANTS:
            model = Config(dict(head=dict(), backbone=dict(
                type='LaViT', arch=ARCH, sr_ratios=(2, 1), out_indices=(1, ),
                dp_loss=own)))
            ablation.set_backbone(model, name, ARCH)
            loss = model.backbone.get('dp_loss')
            assert (loss is not None) == name.startswith('DP loss'), name
            assert name != 'DP loss' or loss == {}


def test_every_row_names_its_data_and_budget(grid):
    summary = dict(dict.fromkeys(ablation.COLUMNS, 1.23456), metric='top-1')
    rows = table_rows([dict(summary, variant='LaViT', scale=grid.describe(),
                            spread=None, seeds=1)])
    assert rows[0]['scale'] == 'data at 32 px (64 keys), 1 epochs, batch 4'
    assert rows[0]['top-1, %'] == '1.2' and rows[0]['± (std over seeds)'] == ''
    assert rows[0]['MACs, G'] == '1.235' and rows[0]['training step, ms'] == '1'


@pytest.mark.parametrize('path, data, message', [
    ('retinanet_lavit_t_coco.py', Path('data'), "expected a classifier's config"),
    ('baselines/retinanet_r50_coco.py', None, 'whose backbone is LaViT'),
    ('_base_/models/lavit_t.py', None, 'expected a config of a whole model'),
    ('baselines/lavit-n-twin_tin100.py', Path('data'), 'less-attention layers'),
    ('semantic_fpn_lavit_t_ade20k.py', None, 'that trains by epochs')])
def test_other_configs_are_named(path, data, message):
    with pytest.raises(ValueError, match=f'{ROOT}/configs/{path}: .*{message}'):
        check_config(ROOT / 'configs' / path, data)
    check_config(ROOT / 'configs/lavit_t_in1k.py', Path('data'))
    check_config(ROOT / 'configs/retinanet_lavit_t_coco.py', None)


@pytest.mark.parametrize('evaluator', [
    None, [dict(type='VOCMetric')], dict(type='mmdet.LVISMetric')])
def test_other_metrics_are_named_before_the_training(evaluator, tmp_path):
    config = Config.fromfile(ROOT / 'configs/retinanet_lavit_t_coco.py')
    config.val_evaluator = evaluator
    config.dump(tmp_path / 'x.py')
    with pytest.raises(ValueError, match='val_evaluator .*: expected CocoMetric'):
        check_config(tmp_path / 'x.py', None)


@pytest.mark.parametrize('result, score', [
    ('{"time": 1, "data_time": 0}', 0.), ('{"pascal_voc/mAP": 0.7, "time": 1}', None)])
def test_a_detector_that_finds_nothing_has_no_precision(result, score, tmp_path):
    config = Config.fromfile(ROOT / 'configs/retinanet_lavit_t_coco.py')
    (tmp_path / 'test/1').mkdir(parents=True)
    (tmp_path / 'test/1/result.json').write_text(result)
    (tmp_path / 'last_checkpoint').write_text(f'epoch_{config.train_cfg.max_epochs}.pth')
    assert training.progress(config, tmp_path).figures.get('score') == score


def test_a_detector_keeps_its_data_and_takes_the_budget(tmp_path):
    path = ROOT / 'configs/retinanet_lavit_digits.py'
    config = ablation.make_config(Grid(path, tmp_path, epochs=3, workers=0),
                                  'all VA (the twin)', 1)
    kept = Config.fromfile(path)
    assert config.train_dataloader.dataset == kept.train_dataloader.dataset
    assert config.optim_wrapper == kept.optim_wrapper
    assert config.train_cfg.max_epochs == config.train_cfg.val_interval == 3
    assert training.metric_of(config).title == 'AP'


def test_a_variant_is_trained_from_scratch(tmp_path):
    path = tmp_path / 'fine_tuned.py'
    path.write_text(f"_base_ = {str(ROOT / 'configs/retinanet_lavit_n_digits.py')!r}\n"
                    'model = dict(backbone=dict(frozen_stages=1))\n'
                    'optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=.9))\n')
    asked = Config.fromfile(path)
    assert asked.model.backbone.init_cfg.type == 'Pretrained'
    assert asked.optim_wrapper.paramwise_cfg.layer_decay_rate < 1
    config = ablation.make_config(Grid(path, tmp_path, epochs=1, workers=0), 'LaViT', 0)
    assert config.model.backbone.init_cfg is None
    assert config.model.backbone.frozen_stages == -1
    assert 'layer_decay_rate' not in config.optim_wrapper.paramwise_cfg
