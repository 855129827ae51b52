"""What a model does not read of its backbone is said, and what does not fit."""
import copy
import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from builders import ARCH, BATCHES
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

import mmlavit.engine.feature_maps as feature_maps

NORM = dict(type='BN')


def backbone(*out_indices: int, **options) -> dict:
    return {**dict(type='LaViT', arch=ARCH, pretrain_img_size=64, trunk_norm=False,
                   out_indices=out_indices), **options}


def deeplab(*out_indices: int, in_index: int = -1, dims=(8, 32), **options) -> dict:
    """mmseg's DeepLabV3+, which reads the first map and another one."""
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(96, 128)),
        backbone=backbone(*out_indices, **options),
        decode_head=dict(
            type='DepthwiseSeparableASPPHead', in_channels=dims[1], in_index=in_index,
            channels=8, dilations=(1, 2), c1_in_channels=dims[0], c1_channels=4,
            num_classes=150, norm_cfg=NORM))


def retinanet(*out_indices: int, in_channels=(16, 24, 32), trunk_norm=False,
              **neck) -> dict:
    return dict(
        type='RetinaNet',
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=backbone(*out_indices, trunk_norm=trunk_norm),
        neck=dict(type='FPN', in_channels=list(in_channels), out_channels=8,
                  num_outs=5, **neck),
        bbox_head=dict(
            type='RetinaHead', num_classes=10, in_channels=8, feat_channels=8,
            stacked_convs=1, anchor_generator=dict(
                type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
                ratios=[1.0], strides=[8, 16, 32, 64, 128])),
        train_cfg=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4),
            sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1))


def classifier(*out_indices: int, in_channels: int = 32) -> dict:
    return dict(
        type='ImageClassifier',
        data_preprocessor=dict(type='ClsDataPreprocessor'),
        backbone=backbone(*out_indices),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=in_channels))


def build(scope: str, config: dict) -> torch.nn.Module:
    init_default_scope(scope)
    return MODELS.build(copy.deepcopy(config)).train()


@pytest.fixture
def told(monkeypatch) -> list:
    messages = []
    monkeypatch.setattr(
        feature_maps, 'print_log', lambda message, **_: messages.append(message))
    return messages


def step(model: torch.nn.Module, scope: str) -> list:
    """The names of parameters that a training step leaves without a gradient."""
    losses = model(**BATCHES[scope](model), mode='loss')
    model.parse_losses(losses)[0].backward()
    return [name for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.grad is None]


@pytest.mark.parametrize('scope, config, unread, rest', [
    ('mmseg', deeplab(0, 1, 2, 3), 'stages 1, 2', (0, 3)),
    ('mmseg', deeplab(0, 1, 2, 3, in_index=1, dims=(8, 16)), 'stages 2, 3', (0, 1)),
    ('mmdet', retinanet(0, 1, 2, 3, in_channels=(8, 16, 24, 32), start_level=1),
     'stages 0', (1, 2, 3)),
    ('mmpretrain', classifier(2, 3), 'stages 2', (3, )),
])
def test_unread_maps_are_named_once(scope, config, unread, rest, told):
    model = build(scope, config)
    assert step(model, scope)  # what DDP would stop at
    step(model, scope)
    assert len(told) == 1
    assert f'maps of {unread}: nobody' in told[0]
    assert f'model.backbone.out_indices={rest},' in told[0]
    # As told, nothing is left.
    config = copy.deepcopy(config)
    config['backbone']['out_indices'] = rest
    if 'neck' in config and 'start_level' in config['neck']:
        config['neck'].update(in_channels=[16, 24, 32], start_level=0)
    if 'decode_head' in config:
        config['decode_head']['in_index'] = -1
    assert step(build(scope, config), scope) == []
    assert len(told) == 1


@pytest.mark.parametrize('scope, config', [
    ('mmdet', retinanet(0, 1, 2, 3, in_channels=(8, 16, 24, 32), start_level=1,
                        trunk_norm=True)),
    ('mmseg', deeplab(0, 1, 2, 3, trunk_norm=True)),
])
def test_norms_in_the_trunk_need_no_reader(scope, config, told):
    assert step(build(scope, config), scope) == []
    assert not told


PVT = dict(type='LessAttentionPVT', pretrain_img_size=64, embed_dims=8,
           num_layers=[1, 1, 1, 2], num_heads=[1, 2, 3, 4], num_va_layers=(1, 1, 1, 0),
           mlp_ratios=[1, 1, 1, 1])
SWIN = dict(type='LessAttentionSwin', embed_dims=8, depths=(1, 1, 1, 3),
            num_heads=(1, 1, 1, 1), la_layers=(5, ), window_size=2)
SWIN_CLASSIFIER = dict(type='LessAttentionSwinClassifier', la_layers=(5, ),
                       window_size=2, arch=dict(
                           embed_dims=8, depths=(1, 1, 1, 3), num_heads=(1, 1, 1, 1)))


@pytest.mark.parametrize('module, arguments, dims, unread', [
    ('la_pvt', PVT, (8, 16, 24, 32), None),  # whose maps have no norms
    ('la_swin', SWIN, (8, 16, 32, 64), 'stages 1, 2'),
    ('la_swin_cls', SWIN_CLASSIFIER, (8, 16, 32, 64), 'stages 1, 2')])
def test_less_attention_in_pvt_and_swin_is_looked_at(module, arguments, dims, unread,
                                                     told):
    importlib.import_module(f'mmlavit.models.backbones.{module}')
    config = deeplab(dims=(dims[0], dims[3]))
    config['backbone'] = dict(arguments, out_indices=(0, 1, 2, 3))
    left = step(build('mmseg', config), 'mmseg')
    assert [f'maps of {unread}: nobody' in message for message in told] == (
        [True] if unread else [])
    assert all(re.fullmatch(r'backbone.norm[12]\.\w+', name) for name in left)
    assert bool(left) == bool(unread)
    config['decode_head']['in_channels'] = 99
    with pytest.raises(ValueError, match=r'4 maps have \[8, 16, .*in_channels=99 with'):
        build('mmseg', config)


def test_stages_behind_the_last_map_that_is_read_are_named(told):
    config = deeplab(0, 1, 2, 3, in_index=1, dims=(8, 16), trunk_norm=True)
    assert step(build('mmseg', config), 'mmseg')
    assert 'maps of stages 2, 3: nobody' in told[0]


def test_read_and_frozen_maps_and_tests_are_passed_over(told):
    frozen = build('mmseg', deeplab(0, 1, 2, 3, frozen_stages=2))
    step(frozen, 'mmseg')
    model = build('mmdet', retinanet(1, 2, 3))
    model.eval()(**BATCHES['mmdet'](model), mode='tensor')
    model.train()(**BATCHES['mmdet'](model), mode='tensor')
    model = copy.deepcopy(model)  # holds no graph of that forward
    assert step(model.train(), 'mmdet') == []
    # A copy, as of an average of weights, looks at its own maps.
    step(copy.deepcopy(model), 'mmdet')
    assert not told
    step(copy.deepcopy(build('mmseg', deeplab(0, 1, 3))), 'mmseg')
    assert 'stages 1: nobody' in told[0]


@pytest.mark.parametrize('scope, config, named, remedy', [
    ('mmdet', retinanet(0, 1, 2, 3), 'model.neck.in_channels=[16, 24, 32]',
     'out_indices=(1, 2, 3)'),
    ('mmdet', retinanet(1, 2, 3, in_channels=(16, 24, 99)),
     'model.neck.in_channels=[16, 24, 99]', ': set that to match'),
    ('mmseg', deeplab(0, 1, 2), 'model.decode_head.in_channels=32 with in_index=-1',
     'set that to match'),
    ('mmseg', deeplab(0, 3, in_index=3), 'in_channels=32 with in_index=3', 'match'),
    ('mmpretrain', classifier(0, 2), 'model.head.in_channels=32, of the last map',
     'out_indices=(3,)'),
])
def test_maps_that_do_not_fit_are_refused_when_built(scope, config, named, remedy):
    indices = config['backbone']['out_indices']
    with pytest.raises(ValueError) as error:
        build(scope, config)
    message = str(error.value)
    assert f'LaViT: out_indices={indices}: its {len(indices)} maps have' in message
    assert named in message and message.endswith(remedy)


def test_one_of_several_heads_is_refused_at_the_first_forward():
    config = deeplab(0, 3)
    config['auxiliary_head'] = [
        dict(type='FCNHead', in_channels=dim, in_index=0, channels=4, num_convs=1,
             num_classes=150, norm_cfg=NORM) for dim in (8, 16)]
    model = build('mmseg', config)
    with pytest.raises(ValueError, match='auxiliary_head.in_channels=16 with in_ind'):
        step(model, 'mmseg')


def test_heads_that_select_or_join_maps_fit():
    for transform, wanted in (('multiple_select', [8, 32]), ('resize_concat', 40)):
        head = SimpleNamespace(in_channels=wanted, in_index=[0, -1])
        lavit = SimpleNamespace(stage_channels=lambda: (8, 16, 24, 32),
                                out_indices=(0, 1, 3))
        feature_maps.check_decode_head(lavit, 'decode_head', head)
        lavit.out_indices = (0, 1, 2)
        with pytest.raises(ValueError, match='decode_head'):
            feature_maps.check_decode_head(lavit, 'decode_head', head)


def test_a_model_registered_again_is_looked_at_once():
    """mmengine does so to replace SyncBN where training is not distributed."""
    init_default_scope('mmpretrain')
    model = revert_sync_batchnorm(MODELS.build(classifier(3)))
    assert len(model._forward_hooks) == len(model.backbone._forward_hooks) == 1
    watch = next(iter(model._forward_hooks.values())).__self__
    assert isinstance(watch, feature_maps.MapWatch)
