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
from builders import ARCH, digits_config, train
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


# One stage of two layers, which takes seconds to trace.
SMALL = dict(embed_dims=(8, ), depths=(2, ), num_heads=(1, ), num_va_layers=(1, ),
             strides=(4, ), patch_sizes=(7, ))


def test_mmengines_compile_trains_the_same_weights(digits, tmp_path):
    weights = []
    for compiled in (False, dict(backend='eager')):
        torch._dynamo.reset()
        config = digits_config(
            digits,
            model__backbone__arch=SMALL,
            model__backbone__sr_ratios=(4, ),
            model__backbone__out_indices=(0, ),
            model__head__in_channels=8,
            train_dataloader__dataset__indices=list(range(0, 1440, 90)),
            train_cfg__max_epochs=1,
            optim_wrapper=dict(
                constructor='MergedGroupsConstructor',
                optimizer=dict(
                    type='AdamW', lr=1e-2, weight_decay=0.1, foreach=True),
                paramwise_cfg=dict(norm_decay_mult=0.)),
            compile=compiled)
        weights.append(train(config, tmp_path / str(bool(compiled))))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=name)


def classifier(**backbone) -> nn.Module:
    init_default_scope('mmpretrain')
    backbone = dict(type='LaViT', arch=ARCH, out_indices=(1, 3), **backbone)
    return build_model(Config(dict(
        default_scope='mmpretrain', model=dict(
            type='ImageClassifier', backbone=backbone,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=3, in_channels=32)))))


def test_mmpretrain_decays_the_learning_rate_by_layer():
    """By hand: nine layers, the first patches below them, the head above."""
    model = classifier()
    optimizer = build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=1., weight_decay=.05),
        constructor='LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=.5))).optimizer
    rates = {name: group['lr']
             for name, group in settings(optimizer, model).items()}
    expected = {
        'backbone.stages.0.patch_embed.conv.weight': 10,
        'backbone.stages.0.blocks.0.attn.q.weight': 9,
        'backbone.stages.0.blocks.1.norm1.bias': 8,
        'backbone.stages.1.patch_embed.norm.weight': 7,
        'backbone.stages.1.downsample.mix': 7,
        'backbone.stages.1.blocks.0.attn.kv.weight': 7,
        'backbone.stages.1.blocks.1.attn.theta.weight': 6,
        'backbone.stages.1.norm.weight': 6,
        'backbone.stages.2.blocks.2.ffn.fc1.weight': 3,
        'backbone.stages.3.downsample.depthwise': 2,
        'backbone.stages.3.blocks.1.attn.psi.weight': 1,
        'backbone.stages.3.norm.bias': 1,
        'head.fc.weight': 0,
    }
    assert {name: rates[name] for name in expected} == {
        name: .5**below for name, below in expected.items()}
    assert set(rates.values()) == {.5**below for below in range(11)}


@pytest.mark.parametrize('frozen_stages', [-1, 1])
def test_merged_groups_decay_as_mmpretrains_do(frozen_stages):
    model = classifier(frozen_stages=frozen_stages)
    paramwise_cfg = dict(layer_decay_rate=.7, norm_decay_mult=0., flat_decay_mult=0.)
    stock, merged = (build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=.05),
        constructor=constructor, paramwise_cfg=dict(paramwise_cfg))).optimizer
        for constructor in ('LearningRateDecayOptimWrapperConstructor',
                            'MergedGroupsConstructor'))
    expected, found = settings(stock, model), settings(merged, model)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, group in found.items():
        for key in ('lr', 'weight_decay'):
            assert group[key] == pytest.approx(expected[name][key]), name
    # Of each depth weights, and what has no weight decay.
    assert len(merged.param_groups) <= 2 * 11 < len(stock.param_groups)


def test_backbones_without_depths_are_named():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='layer_decay_rate=0.5: Linear does not tell'):
        build_optim_wrapper(model, dict(
            constructor='MergedGroupsConstructor', optimizer=dict(type='SGD', lr=1.),
            paramwise_cfg=dict(layer_decay_rate=.5)))


def test_a_backbone_alone_decays_as_in_its_model():
    model = classifier()
    cfg = dict(optimizer=dict(type='AdamW', lr=1.), constructor='MergedGroupsConstructor',
               paramwise_cfg=dict(layer_decay_rate=.5))
    whole, alone = (settings(build_optim_wrapper(x, copy.deepcopy(cfg)).optimizer, x)
                    for x in (model, model.backbone))
    assert {f'backbone.{name}': group['lr'] for name, group in alone.items()} == {
        name: group['lr'] for name, group in whole.items() if 'backbone' in name}


def test_layers_decay_a_learning_rate_that_there_is():
    with pytest.raises(ValueError, match='optimizer.lr=None beside layer_decay_rate=0.5'):
        build_optim_wrapper(classifier(), dict(
            constructor='MergedGroupsConstructor', optimizer=dict(type='Rprop'),
            paramwise_cfg=dict(layer_decay_rate=.5)))


@pytest.mark.parametrize('rate', [0, 1.1, '0.9', True])
def test_wrong_decay_rates_are_named(rate):
    with pytest.raises(ValueError, match=f'layer_decay_rate={rate!r}: expected a number'):
        build_optim_wrapper(classifier(), dict(
            constructor='MergedGroupsConstructor', optimizer=dict(type='SGD', lr=1.),
            paramwise_cfg=dict(layer_decay_rate=rate)))


def test_detectors_decay_by_layer_too():
    """Which the toolbox's own constructor does for ConvNeXt alone."""
    config = Config.fromfile(COCO)
    init_default_scope('mmdet')
    model = build_model(config)
    config.optim_wrapper.paramwise_cfg.update(
        layer_decay_rate=.9, custom_keys=dict(bbox_head=dict(lr_mult=2.)))
    groups = settings(build_optim_wrapper(model, config.optim_wrapper).optimizer, model)
    lr = config.optim_wrapper.optimizer.lr
    for name, expected in (('neck.fpn_convs.0.conv.weight', lr),
                           ('bbox_head.retina_cls.weight', 2 * lr),
                           ('backbone.stages.3.blocks.1.attn.v.weight', .9 * lr),
                           ('backbone.stages.0.patch_embed.conv.bias', .9**9 * lr)):
        assert groups[name]['lr'] == pytest.approx(expected), name
