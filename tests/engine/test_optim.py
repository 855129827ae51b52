"""Merged parameter groups are mmengine's, put together."""
import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

import mmlavit  # noqa: F401  (registers the constructor)
from mmlavit.analysis.building import build_model

COCO = Path(__file__).parents[2] / 'configs/retinanet_lavit_t_coco.py'


def settings(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict:
    """Of each parameter by name, whatever group it is in."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(parameter)],
              {key: value for key, value in group.items() if key != 'params'})
             for group in optimizer.param_groups for parameter in group['params']]
    assert len(found) == len(dict(found))  # none twice
    return dict(found)


def build_both(model: nn.Module, config: dict) -> tuple:
    stock = {key: value for key, value in config.items() if key != 'constructor'}
    merged = {**stock, 'constructor': 'MergedGroupsConstructor'}
    return tuple(build_optim_wrapper(model, copy.deepcopy(each)).optimizer
                 for each in (stock, merged))


def test_coco_config_has_two_groups_of_the_same_settings():
    config = Config.fromfile(COCO)
    init_default_scope('mmdet')
    model = build_model(config)
    stock, merged = build_both(model, config.optim_wrapper)
    assert settings(merged, model) == settings(stock, model)
    assert sorted(group['weight_decay'] for group in merged.param_groups) == [0, 1e-4]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(stock.param_groups) == len(settings(merged, model)) == len(trained)


def test_demo_updates_its_shared_weights_once():
    config = Config.fromfile(COCO.with_name('retinanet_lavit_digits.py'))
    init_default_scope('mmdet')
    model = build_model(config)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert settings(optimizer, model).keys() == dict(model.named_parameters()).keys()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Linear(5, 2))


def test_every_own_setting_keeps_its_group():
    model = small_model()
    model[3].bias.requires_grad = False
    stock, merged = build_both(model, dict(
        optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1),
        paramwise_cfg=dict(
            norm_decay_mult=0.,
            custom_keys={'2': dict(lr_mult=0.1, betas=(0.5, 0.9))})))
    assert settings(merged, model) == settings(stock, model)
    # Convolution and linear weights; the norm's; those of the custom key.
    assert sorted(len(group['params']) for group in merged.param_groups) == [2, 2, 3]


@pytest.mark.parametrize('foreach', [False, True])
def test_updates_are_the_same(foreach):
    weights = []
    for constructor in ('DefaultOptimWrapperConstructor', 'MergedGroupsConstructor'):
        model = small_model()
        optim_wrapper = build_optim_wrapper(model, dict(
            constructor=constructor,
            optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1, foreach=foreach),
            paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.)))
        x = torch.randn(2, 3, 5, 5)
        for _ in range(3):
            optim_wrapper.update_params(model(x).square().mean())
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
        assert not torch.equal(weights[0], nn.utils.parameters_to_vector(
            small_model().parameters()))
    torch.testing.assert_close(*weights)


def test_shared_parameter_is_updated_once_or_refused():
    model = small_model()
    model.append(nn.Sequential(model[2]))
    config = dict(
        constructor='MergedGroupsConstructor',
        optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1),
        paramwise_cfg=dict(norm_decay_mult=0.))
    with pytest.raises(ValueError, match='share parameters.*bypass_duplicate=True'):
        build_optim_wrapper(model, copy.deepcopy(config))
    config['paramwise_cfg']['bypass_duplicate'] = True
    optimizer = build_optim_wrapper(model, config).optimizer
    assert settings(optimizer, model).keys() == dict(model.named_parameters()).keys()


def test_compiled_steps_are_the_same():
    """mmengine compiles the whole training step; PyTorch cannot trace foreach here."""
    weights = []
    for compiled in (False, True):
        model = small_model()
        optim_wrapper = build_optim_wrapper(model, dict(
            constructor='MergedGroupsConstructor',
            optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1, foreach=True),
            paramwise_cfg=dict(norm_decay_mult=0.)))

        def step(x):
            optim_wrapper.update_params(model(x).square().mean())

        run = torch.compile(step, backend='eager') if compiled else step
        for _ in range(3):
            run(torch.ones(2, 3, 5, 5))
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*weights)
