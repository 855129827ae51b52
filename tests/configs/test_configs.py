"""Every config builds its model on the stock bases and trains a step."""
import copy
import functools
from inspect import signature
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from builders import BATCHES, assert_same, authors_names, stock_pvt
from mmlavit import LaViT
from mmlavit.analysis.building import build_model
from mmlavit.analysis.complexity import count_macs
from mmlavit.models.backbones.arch import ARCHS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / 'configs').rglob('*.py')
                 if '_base_' not in path.parts)
OURS = [path for path in CONFIGS
        if 'lavit' in path.name and path.parent.name in ('configs', 'ablation')]
PLUGINS = [path for path in CONFIGS if path.parent.name == 'plugins']
BASELINES = [path for path in CONFIGS if path not in OURS + PLUGINS]
DETECTION = [path for path in OURS if 'retinanet' in path.name]
# The smallest that each takes: Swin and DeiT of mmpretrain have a fixed one.
SIZES = {'mmdet': (96, 128), 'mmseg': (64, 64), 'mmpretrain': (64, 64),
         **dict.fromkeys(('swin-t_in1k', 'la-swin-t_in1k', 'deit-s_in1k'), (224, 224))}
# Their own warm-up is longer.
SLOW_WARMUP = ('swin-t_in1k', 'deit-s_in1k', 'la-swin-t_in1k', 'la-deit-t_in1k',
               'la-deit-s_in1k', 'la-deit-b_in1k')


read = functools.lru_cache(maxsize=None)(Config.fromfile)


def load(path: Path) -> Config:
    config = copy.deepcopy(read(path))
    init_default_scope(config.default_scope)
    return config


def build(config: Config) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config)
    model.init_weights()
    return model


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_imports_what_it_names(path):
    """For the toolboxes' own scripts, which import nothing else."""
    config = load(path)
    text = str(config.to_dict())
    ours = ('LaViT', 'InvalidLossHook', 'MergedGroupsConstructor')
    if any(f"'{name}'" in text for name in ours):
        assert 'mmlavit' in config.custom_imports.imports
    plugins = dict(ViT='la_vit', PVT='la_pvt', Swin='la_swin',
                   SwinClassifier='la_swin_cls')
    for name, module in plugins.items():
        if f"'LessAttention{name}'" in text:
            assert (f'mmlavit.models.backbones.{module}' in
                    config.custom_imports.imports)


@pytest.mark.parametrize('path', PLUGINS, ids=lambda path: path.stem)
def test_less_attention_begins_from_the_weights_of_the_stock_class(path):
    """Those that the config names are of a model whose weights fit."""
    config = load(path)
    ours = MODELS.build({k: v for k, v in config.model.backbone.items()
                         if k != 'init_cfg'})
    stock = next(base for base in type(ours).__mro__
                 if not base.__module__.startswith('mmlavit'))
    arguments = {k: v for k, v in config.model.backbone.items()
                 if k in signature(stock).parameters and k != 'init_cfg'}
    weights = stock(**arguments).state_dict()
    result = ours.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys and not result.missing_keys
    for name, value in ours.state_dict().items():
        assert name not in weights or torch.equal(value, weights[name])


def train_step(path: Path, **changes):
    """As tools/train.py does it, with the config's optimizer."""
    config = load(path)
    config.merge_from_dict(changes)
    if config.default_scope == 'mmseg':
        config.model.data_preprocessor.size = SIZES['mmseg']  # it pads to that
    model = build(config).train()
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    scope = config.default_scope
    size = SIZES.get(path.stem, SIZES[scope])
    losses = model(**BATCHES[scope](model, size), mode='loss')
    loss, log = model.parse_losses(losses)
    assert loss.isfinite()
    optim_wrapper.backward(loss)
    before = [p.detach().clone() for p in model.parameters()]
    optim_wrapper.step()
    moved = sum(not torch.equal(p, old)
                for p, old in zip(model.parameters(), before))
    # An optimizer of torch is in a cycle, and would keep all this until the next
    # collection: gigabytes, for few objects seldom cause one.
    optim_wrapper.optimizer.state.clear()
    optim_wrapper.optimizer.param_groups.clear()
    return model, log, moved / len(before)


@pytest.mark.parametrize('path', OURS + PLUGINS, ids=lambda path: path.stem)
def test_config_trains_a_step_of_every_parameter(path):
    model, log, moved = train_step(path)
    parts = [value for name, value in log.items()
             if 'loss' in name and name != 'loss']
    if parts:
        torch.testing.assert_close(log['loss'], sum(parts))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f'{name} is unused: DDP would fail'
        assert parameter.grad.isfinite().all(), name
    # The head of mmpretrain's ViT begins at 0: at first, only it and decay move.
    assert moved > (0.3 if 'deit' in path.stem or 'vit-n' in path.stem else 0.9)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_dp_loss_is_off_but_for_the_weights(path):
    on = load(path).model.get('backbone', {}).get('dp_loss') is not None
    assert on == (path.stem == 'lavit_n_tin100')


@pytest.mark.parametrize('name', [
    'lavit_t_in1k', 'retinanet_lavit_t_coco', 'upernet_lavit_t_ade20k',
    'plugins/la-deit-t_in1k', 'plugins/la-pvt-s_in1k', 'plugins/la-swin-t_in1k',
    'plugins/retinanet_la-swin-t_coco'
])
def test_one_option_switches_the_dp_loss_on(name):
    _, log, _ = train_step(ROOT / f'configs/{name}.py',
                           **{'model.backbone.dp_loss.form': 'preserve'})
    # A fresh layer repeats its predecessor, so that nothing is lost.
    assert log['loss_dp'] == 0


@pytest.mark.parametrize('path', BASELINES, ids=lambda path: path.stem)
def test_baseline_trains_a_step(path):
    model, log, moved = train_step(path)
    assert 'loss_dp' not in log
    assert moved > 0.3  # of ResNet-50, half of which is frozen
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('path', DETECTION, ids=lambda path: path.stem)
def test_pyramid_receives_strides_8_to_32(path):
    """RetinaNet's pyramid begins at stride 8; its two coarse levels are its own."""
    config = load(path)
    model = build(config).eval()
    received = []
    model.neck.register_forward_pre_hook(
        lambda module, args: received.extend(args[0]))
    levels = model.extract_feat(torch.randn(1, 3, 224, 320))
    assert [x.shape[1] for x in received] == config.model.neck.in_channels
    received = received[config.model.neck.start_level:]
    for x, stride in zip(received, (8, 16, 32), strict=True):
        assert x.shape[2:] == (224 // stride, 320 // stride)
    strides = config.model.bbox_head.anchor_generator.strides
    for level, stride in zip(levels, strides, strict=True):
        assert level.shape[3] == -(-320 // stride)


def test_stock_pyramid_receives_strides_4_to_32():
    """mmdet's own Mask R-CNN base with its FPN from stride 4."""
    stock = Path(pytest.importorskip('mmdet').__file__).parent / '.mim'
    config = Config.fromfile(
        stock / 'configs/_base_/models/mask-rcnn_r50_fpn.py')
    init_default_scope('mmdet')
    backbone = MODELS.build(dict(type='LaViT', arch='tiny'))
    config.model.neck.in_channels = list(backbone.arch['embed_dims'])
    neck = MODELS.build(config.model.neck)
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [64 // x.shape[2] for x in maps] == [4, 8, 16, 32]
    assert [64 // x.shape[2] for x in neck(maps)] == [4, 8, 16, 32, 64]


@pytest.mark.parametrize('path', [p for p in CONFIGS if 'in1k' in p.name],
                         ids=lambda path: path.stem)
def test_classification_follows_the_published_schedule(path):
    config = load(path)
    assert config.train_cfg.max_epochs == 300
    assert config.train_dataloader.batch_size * 8 == 1024
    assert config.auto_scale_lr.base_batch_size == 1024
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == (
        'AdamW', 1e-3, 0.05)
    warmup, cosine = config.param_scheduler
    assert warmup.end == cosine.begin == (20 if path.stem in SLOW_WARMUP else 5)
    assert (warmup.type, cosine.type) == ('LinearLR', 'CosineAnnealingLR')
    kinds = [step.type for step in config.train_dataloader.dataset.pipeline]
    assert {'RandAugment', 'RandomErasing'} <= set(kinds)
    head = config.model.get('head', config.model)  # timm's have none
    assert head.loss.label_smooth_val == 0.1
    assert {x.type for x in config.model.train_cfg.augments} == {
        'Mixup', 'CutMix'}


def test_stochastic_depth_grows_with_size():
    for task in ('lavit_{}_in1k', 'retinanet_lavit_{}_coco',
                 'semantic_fpn_lavit_{}_ade20k', 'upernet_lavit_{}_ade20k'):
        rates = [load(ROOT / f'configs/{task.format(size)}.py').model.backbone
                 .drop_path_rate for size in 'tsb']
        assert rates == sorted(rates) and rates[0] < rates[2]


@pytest.mark.parametrize('path', [
    p for p in CONFIGS if 'ade20k' in p.name and 'lavit_n' not in p.name],
                         ids=lambda path: path.stem)
def test_segmentation_follows_the_published_schedule(path):
    config = load(path)
    iters, lr, decay = ((160000, 6e-5, 0.01) if 'upernet' in path.name else
                        (80000, 1e-4, 1e-4))
    assert config.train_cfg.max_iters == iters
    assert config.param_scheduler[-1].end == iters
    assert config.train_dataloader.batch_size * 8 == 16
    assert config.auto_scale_lr.base_batch_size == 16
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == (
        'AdamW', lr, decay)
    assert config.model.data_preprocessor.size == (512, 512)
    assert config.train_dataloader.dataset.pipeline[1].reduce_zero_label
    assert config.tta_model.type == 'SegTTAModel'


@pytest.mark.parametrize('path', [p for p in OURS if 'pvtv2' in p.name],
                         ids=lambda path: path.stem)
def test_pre_training_is_mmdets_of_the_same_pvtv2(path):
    stock = (Path(pytest.importorskip('mmdet').__file__).parent / '.mim/configs/'
             'pvt' / path.name.replace('lavit_', '').replace('_coco', '_fpn_1x_coco'))
    ours, theirs = load(path).model, Config.fromfile(stock).model
    checkpoint = ours.backbone.init_cfg.checkpoint
    assert ours.backbone.init_cfg == dict(type='Pretrained', checkpoint=checkpoint)
    assert checkpoint == theirs.backbone.init_cfg.checkpoint
    assert checkpoint.endswith(f'pvt_v2_{ours.backbone.arch[-2:]}.pth')
    assert ours.neck == theirs.neck
    weights = MODELS.build(theirs.backbone).state_dict()
    ours.backbone.pop('init_cfg')
    result = MODELS.build(ours.backbone).load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all('theta' in name or 'psi' in name for name in result.missing_keys)


def test_detector_begins_from_a_served_file_of_pvtv2(served):
    """The B0 config as it is, but for the host of the file."""
    folder, address = served
    config = load(ROOT / 'configs/retinanet_lavit_pvtv2-b0_coco.py')
    stock = stock_pvt(ARCHS['pvtv2_b0']).state_dict()
    start = config.model.backbone.init_cfg
    file = start.checkpoint.rpartition('/')[2]
    torch.save(authors_names(stock), folder / file)
    start.checkpoint = f'{address}/{file}'
    model = MODELS.build(config.model)
    model.init_weights()
    expected = LaViT('pvtv2_b0')
    expected.load_state_dict(stock, strict=False)
    assert_same(model.backbone.state_dict(), expected.state_dict())
    # The head's own start is not lost.
    torch.testing.assert_close(
        model.bbox_head.retina_cls.bias.sigmoid(), torch.full((720, ), .01))


@pytest.mark.parametrize('path', [p for p in OURS if not any(
    part in p.name for part in ('in1k', 'digits', 'pvtv2', 'lavit_n', 'lavit-'))],
                         ids=lambda path: path.stem)
def test_pre_training_is_of_the_classifier_of_the_same_size(path):
    backbone = load(path).model.backbone
    size = path.stem.split('lavit_')[1][0]
    assert backbone.arch == dict(t='tiny', s='small', b='base')[size]
    checkpoint = Path(backbone.init_cfg.checkpoint)
    classifier = load(ROOT / f'configs/{checkpoint.parent.name}.py')
    assert classifier.model.backbone.arch == backbone.arch
    assert checkpoint.stem == f'epoch_{classifier.train_cfg.max_epochs}'
    assert backbone.init_cfg.prefix == 'backbone.'


@pytest.mark.parametrize('path', [p for p in BASELINES if 'coco' in p.name],
                         ids=lambda path: path.stem)
def test_baselines_of_detection_share_the_schedule(path):
    config, ours = load(path), load(ROOT / 'configs/retinanet_lavit_t_coco.py')
    assert config.train_cfg == ours.train_cfg
    assert config.param_scheduler == ours.param_scheduler
    assert config.train_dataloader == ours.train_dataloader
    ours.optim_wrapper.pop('constructor')  # the same updates, put together
    convolutional = path.stem.split('_')[1] in ('r50', 'x101-32x4d')
    assert (config.optim_wrapper == ours.optim_wrapper) != convolutional


@pytest.mark.parametrize('name', ['t', 's', 's_k14', 'b', 't_3x', 's_3x'])
def test_coco_configs_follow_the_published_schedule(name):
    config = load(ROOT / f'configs/retinanet_lavit_{name}_coco.py')
    epochs, milestones = (36, [27, 33]) if '3x' in name else (12, [8, 11])
    assert config.train_cfg.max_epochs == epochs
    assert config.param_scheduler[1].milestones == milestones
    assert config.param_scheduler[1].end == epochs
    assert config.train_dataloader.batch_size * 8 == 16
    assert config.auto_scale_lr.base_batch_size == 16
    kinds = [step.type for step in config.train_dataloader.dataset.pipeline]
    assert ('RandomResize' in kinds) == ('3x' in name)
    assert config.model.backbone.get('max_key_grid') == (14 if 'k14' in name else None)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_learning_rate_can_be_scaled(path):
    assert load(path).auto_scale_lr.base_batch_size > 0


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_few_checkpoints_are_kept(path):
    checkpoint, train_cfg = load(path).default_hooks.checkpoint, load(path).train_cfg
    length = train_cfg.get('max_epochs') or train_cfg.max_iters
    assert 0 < checkpoint.get('max_keep_ckpts', length // checkpoint.interval) <= 36


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_longer_training_has_a_longer_schedule(path):
    """A T_max of its own would let the learning rate rise again."""
    assert all(schedule.get('T_max') is None for schedule in load(path).param_scheduler
               if 'end' not in schedule)


def test_building_leaves_the_config_as_it_is():
    config = load(ROOT / 'configs/semantic_fpn_lavit_t_ade20k.py')
    before = config.pretty_text
    model = build_model(config)
    assert config.pretty_text == before
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    assert model.backbone.init_cfg == [dict(type='LaViTInit')]


def test_norms_and_biases_have_no_weight_decay():
    config = load(ROOT / 'configs/retinanet_lavit_t_coco.py')
    model = build(config)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW
    decay = {
        id(parameter): group['weight_decay']
        for group in optimizer.param_groups for parameter in group['params']
    }
    assert len(decay) == len(list(model.parameters()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = name == 'bias' or isinstance(module, nn.LayerNorm)
            assert decay[id(parameter)] == (0 if plain else 1e-4), name
    assert {group['lr'] for group in optimizer.param_groups} == {1e-4}


def test_detector_size_agrees_with_the_published_flops():
    """S at 800 x 1280: 290 G published. (T's 202 G cannot be matched: 215 G.)"""
    macs = count_macs(
        build(load(ROOT / 'configs/retinanet_lavit_s_coco.py')), (800, 1280))
    assert macs / 1e9 == pytest.approx(290, rel=0.05)
