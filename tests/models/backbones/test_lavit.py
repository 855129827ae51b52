"""The backbone as users build it."""
import copy
import importlib
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.fsdp
import torch.multiprocessing as mp
import torch.nn.functional as F
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from builders import ARCH, autocast, leave_process_group, logged, randomise
from mmlavit import LaViT
from mmlavit.models.layers.attend import MAX_BUILT_SCORES
from mmlavit.models.layers.attention import LessAttention, VanillaAttention
from mmlavit.models.layers.block import keep_statistics
from mmlavit.models.layers.mixing import TokenMix
from mmlavit.analysis.complexity import count_macs
from mmlavit.models.layers.scores import SCORE_PATHS

ROOT = Path(__file__).parents[3]


def build(**kwargs) -> LaViT:
    torch.manual_seed(0)
    model = LaViT(**{**dict(arch=ARCH, pretrain_img_size=64), **kwargs})
    model.init_weights()
    return model


def total(outs) -> torch.Tensor:
    """A scalar in which no output element has the same weight as another."""
    torch.manual_seed(2)
    return sum((out * torch.randn_like(out)).sum() for out in outs)


def gradients(model: nn.Module, x: torch.Tensor) -> dict:
    model.zero_grad()
    total(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize('arch, params_m, gmacs', [('tiny', 10.9, 1.6),
                                                   ('small', 22.4, 3.3),
                                                   ('base', 39.6, 6.1)])
def test_size_is_within_4_percent_of_the_published(arch, params_m, gmacs):
    model = build(arch=arch, pretrain_img_size=224, out_indices=(3, )).eval()
    head = nn.Linear(448, 1000)
    params = sum(p.numel() for m in (model, head) for p in m.parameters())
    assert params / 1e6 == pytest.approx(params_m, rel=0.04)
    macs = count_macs(model, (224, 224)) + 448 * 1000
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.04)


def test_attention_products_are_counted():
    """By hand for one VA layer: projections, reduction, products, FFN."""
    model = build(
        arch=dict(
            embed_dims=(8, ), depths=(1, ), num_heads=(2, ),
            num_va_layers=(1, ), strides=(4, ), mlp_ratios=(2, ),
            patch_sizes=(7, )),
        sr_ratios=(2, ),
        out_indices=(0, ))
    n, m, c = 64, 16, 8  # 32 x 32 pixels
    expected = (
        n * c * 3 * 49  # patch embedding
        + n * c * c + m * c * 2 * c  # q, kv
        + m * c * c * 4  # spatial reduction
        + n * m * c * 2  # Q K^T and A V
        + n * c * c  # output projection
        + 2 * n * c * 2 * c + n * 2 * c * 9)  # FFN with its convolution
    macs = count_macs(model, (32, 32))
    # mmengine counts 5 operations for each normalised element.
    norms = 5 * (4 * n + m) * c
    assert macs == expected + norms


@pytest.mark.parametrize('size', [(64, 64), (128, 96), (37, 61), (32, 200),
                                  (33, 33), (20, 7)])
@pytest.mark.parametrize('path', ['auto', 'factored'])
def test_paths_agree_in_values_and_gradients(path, size, device):
    """At base size, larger, non-square, odd and smaller than one key."""
    x = torch.randn(
        2, 3, *size, dtype=torch.double, device=device, requires_grad=True)
    reference = randomise(build(score_path='materialised')).double().to(device)
    model = build(score_path=path).double().to(device)
    model.load_state_dict(reference.state_dict())
    outs, expected = model(x), reference(x)
    for out, other, stride in zip(outs, expected, (4, 8, 16, 32)):
        assert out.shape[2:] == tuple(math.ceil(s / stride) for s in size)
        torch.testing.assert_close(out, other, rtol=1e-10, atol=1e-10)
    actual, wanted = gradients(model, x), gradients(reference, x)
    for name, grad in wanted.items():
        scale = max(grad.abs().max().item(), 1e-6)
        assert (actual[name] - grad).abs().max().item() / scale < 1e-10, name


@pytest.fixture
def few_scores_at_once(monkeypatch):
    """Inherited scores are built in many pieces."""
    for kind in MAX_BUILT_SCORES:
        monkeypatch.setitem(MAX_BUILT_SCORES, kind, 100)


def test_paths_agree_where_scores_are_too_many_to_build(few_scores_at_once, device):
    test_paths_agree_in_values_and_gradients('auto', (37, 61), device)


def test_pieces_are_recomputed_within_checkpointed_layers(request, device):
    x = torch.randn(2, 3, 64, 96, dtype=torch.double, device=device)
    expected = gradients(randomise(build()).double().to(device), x)
    request.getfixturevalue('few_scores_at_once')
    saved = randomise(build(with_cp=True)).double().to(device)
    for name, grad in gradients(saved, x).items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize('options', [
    dict(max_key_grid=2), dict(max_key_grid=1), dict(value_reduction='pool'),
    dict(max_key_grid=2, value_reduction='pool')], ids=str)
def test_paths_agree_with_fewer_keys_and_pooled_values(options, device):
    x = torch.randn(2, 3, 150, 97, dtype=torch.double, device=device)
    reference = randomise(
        build(score_path='materialised', **options)).double().to(device)
    for path in ('auto', 'factored'):
        model = build(score_path=path, **options).double().to(device)
        model.load_state_dict(reference.state_dict())
        for out, other in zip(model(x), reference(x)):
            torch.testing.assert_close(out, other, rtol=1e-10, atol=1e-10)


def test_max_key_grid_changes_nothing_below_it():
    plain = randomise(build()).double()
    capped = build(max_key_grid=2).double()
    capped.load_state_dict(plain.state_dict())
    small, large = (
        torch.randn(1, 3, size, 33, dtype=torch.double) for size in (64, 65))
    assert torch.equal(plain(small)[-1], capped(small)[-1])
    assert not torch.equal(plain(large)[-1], capped(large)[-1])


def test_macs_grow_linearly_with_max_key_grid():
    def macs(size: int, **kwargs) -> float:
        return count_macs(build(out_indices=(3, ), **kwargs), (size, size))

    ratio = (macs(512) - macs(256)) / (macs(256) - macs(128))
    capped = ((macs(512, max_key_grid=4) - macs(256, max_key_grid=4)) /
              (macs(256, max_key_grid=4) - macs(128, max_key_grid=4)))
    assert capped == pytest.approx(4, rel=0.02)
    assert ratio > 4.1


def test_scores_inherited_through_two_less_attention_stages(device):
    arch = {**ARCH, 'num_va_layers': (2, 0, 0, 0)}
    x = torch.randn(1, 3, 48, 80, dtype=torch.double, device=device)
    reference = randomise(
        build(arch=arch, score_path='materialised')).double().to(device)
    model = build(arch=arch, score_path='factored').double().to(device)
    model.load_state_dict(reference.state_dict())
    for out, other in zip(model(x), reference(x)):
        torch.testing.assert_close(out, other, rtol=1e-10, atol=1e-10)


def test_maps_of_an_image_do_not_depend_on_its_batch(device):
    model = randomise(build()).double().eval().to(device)
    x = torch.randn(3, 3, 70, 45, dtype=torch.double, device=device)
    for whole, alone in zip(model(x), model(x[1:2])):
        torch.testing.assert_close(whole[1:2], alone)


def test_size_may_change_from_image_to_image():
    model = randomise(build()).double().eval()
    first = torch.randn(1, 3, 64, 64, dtype=torch.double)
    before = model(first)
    model(torch.randn(1, 3, 96, 41, dtype=torch.double))
    for out, again in zip(before, model(first)):
        assert torch.equal(out, again)


@pytest.mark.parametrize('memory_format',
                         [torch.contiguous_format, torch.channels_last])
def test_maps_are_laid_out_as_the_input(memory_format, device):
    model = randomise(build()).double().to(device)
    x = torch.randn(2, 3, 64, 96, dtype=torch.double, device=device)
    expected = model(x)
    for out, other in zip(
            model(x.contiguous(memory_format=memory_format)), expected):
        assert out.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(out, other)


def test_checkpointing_changes_nothing_but_memory(device):
    x = torch.randn(
        2, 3, 64, 64, dtype=torch.double, device=device, requires_grad=True)
    model = randomise(build()).double().to(device)
    saved = randomise(build(with_cp=True)).double().to(device)
    expected = gradients(model, x)
    for name, grad in gradients(saved, x).items():
        torch.testing.assert_close(grad, expected[name])

    def activations(model):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            total(model(x))
        return count

    assert activations(saved) < activations(model) / 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('path', ['auto', 'factored', 'materialised'])
def test_autocast_is_close_to_float32(dtype, path, device):
    model = build(score_path=path)
    nn.init.normal_(model.stages[2].blocks[1].attn.psi.weight, std=0.1)
    model, x = model.to(device), torch.randn(2, 3, 64, 96, device=device)
    expected = model(x)
    with autocast(device, dtype):
        outs = model(x)
        total(outs).backward()
    for out, other in zip(outs, expected):
        assert (out - other).abs().mean() < 0.03 * other.abs().mean()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_compiling'),
    reason='torch is too old to compile LaViT: it has no torch.compiler.is_compiling')
def test_compiles_as_one_graph_for_changing_sizes(device):
    # A layer of each kind: tracing takes most of a minute for ARCH.
    arch = {**ARCH, 'depths': (1, 1, 2, 1), 'num_va_layers': (1, 1, 1, 0)}
    model = randomise(build(arch=arch)).double().eval().to(device)
    compiled = torch.compile(
        model, backend='eager', fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((64, 64), (96, 80), (70, 45)):
            x = torch.randn(1, 3, *size, dtype=torch.double, device=device)
            for out, other in zip(compiled(x), model(x)):
                torch.testing.assert_close(out, other)


@pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_compiling'),
    reason='torch is too old to compile LaViT: it has no torch.compiler.is_compiling')
def test_compiled_and_recomputed_batch_norms_are_counted_once():
    arch = dict(embed_dims=(8, ), depths=(2, ), num_heads=(1, ), num_va_layers=(1, ))
    model = randomise(build(
        arch=arch, sr_ratios=(4, ), out_indices=(0, ), norm_cfg=dict(type='BN'),
        with_cp=True)).double().train()
    compiled, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32, dtype=torch.double)
    total(model(x)).backward()
    total(torch.compile(compiled, backend='aot_eager')(x)).backward()
    torch.testing.assert_close(dict(compiled.state_dict()), dict(model.state_dict()))
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3, ), (1, 2), (0, )])
@pytest.mark.parametrize('attn_residual, trunk_norm', [(True, True), (False, False)])
def test_every_parameter_gets_a_gradient(out_indices, attn_residual, trunk_norm,
                                         device):
    model = randomise(
        build(out_indices=out_indices, attn_residual=attn_residual,
              trunk_norm=trunk_norm)).to(device)
    assert [stage.norm is not None for stage in model.stages] == [
        trunk_norm or i in out_indices for i in range(out_indices[-1] + 1)]
    assert len(model.stages) == out_indices[-1] + 1
    grads = gradients(model, torch.randn(2, 3, 96, 64, device=device))
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name


def test_residual_is_optional_and_the_twin_has_no_less_attention():
    model = build(num_va_layers=ARCH['depths'], attn_residual=False)
    kinds = {type(m) for m in model.modules()}
    assert VanillaAttention in kinds
    assert not kinds & {LessAttention, TokenMix}
    assert all(stage.downsample is None for stage in model.stages)

    with_residual = build(num_va_layers=ARCH['depths'])
    inherits = [s.downsample is not None for s in with_residual.stages]
    assert inherits == [False, True, True, True]
    # Without it only the stage that has nothing else inherits.
    inherits = [s.downsample is not None
                for s in build(attn_residual=False).stages]
    assert inherits == [False, False, False, True]


@pytest.mark.parametrize('arch, heads', [
    ('nano', (1, 2, 4, 6)), ('tiny', (1, 2, 5, 7)), ('small', (1, 2, 5, 7)),
    ('base', (1, 2, 5, 7)), ('pvtv2_b2', (1, 2, 5, 8))])
def test_heads_of_the_presets(arch, heads):
    """Which parameters and multiply-adds hardly depend on."""
    with torch.device('meta'):
        model = LaViT(arch)
    assert tuple(stage.blocks[0].attn.num_heads for stage in model.stages) == heads


def test_layers_are_vanilla_first_then_less():
    model = build()
    for stage, vanilla in zip(model.stages, ARCH['num_va_layers']):
        kinds = [type(block.attn) for block in stage.blocks]
        less = len(kinds) - vanilla
        assert kinds == [VanillaAttention] * vanilla + [LessAttention] * less


def test_initial_weights():
    model = build(arch='tiny', pretrain_img_size=224, drop_path_rate=0.3)
    block = model.stages[2].blocks[1]
    assert block.ffn.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # By fan-out: 3 x 3 x 1280 outputs in 1280 groups.
    assert block.ffn.dwconv.weight.std().item() == pytest.approx(
        math.sqrt(2 / 9), rel=0.05)
    assert block.ffn.fc1.bias.abs().max() == 0
    assert block.attn.psi.weight.shape == (14**2, 14**2)
    assert block.attn.theta.weight.shape == (7**2, 7**2)
    assert block.attn.psi.weight.abs().max() == 0
    rates = [getattr(b.drop_path, 'drop_prob', 0.)
             for stage in model.stages for b in stage.blocks]
    torch.testing.assert_close(
        torch.tensor(rates), torch.linspace(0, 0.3, 8))


def test_max_query_grid_bounds_psi():
    def side(**kwargs):
        model = build(num_va_layers=(1, 1, 1, 0), **kwargs)
        return [s.blocks[-1].attn.psi.base_grid[0] for s in model.stages]

    assert side() == [14, 8, 4, 2]
    assert side(max_query_grid=3) == [3, 3, 3, 2]


@pytest.mark.parametrize('frozen', [-1, 0, 2])
def test_frozen_stages_stay(frozen):
    model = build(frozen_stages=frozen, drop_rate=0.2)
    model.train()
    before = copy.deepcopy(model.state_dict())
    # Large enough a decay that everything in the optimizer moves.
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 0.1)
    total(model(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        stage = int(name.split('.')[1])
        assert torch.equal(value, before[name]) == (stage <= frozen), name
    for i, stage in enumerate(model.stages):
        assert stage.blocks[-1].training == (i > frozen)


@pytest.mark.parametrize('norm_eval', [True, False])
def test_batch_norm_and_norm_eval(norm_eval, device):
    model = build(norm_cfg=dict(type='BN'), norm_eval=norm_eval).train().to(device)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 64, 64, device=device))
    for name, value in model.state_dict().items():
        if 'running' in name:
            assert torch.equal(value, before[name]) == norm_eval, name


def test_group_norm_acts_on_channels():
    build(norm_cfg=dict(type='BN', affine=False)).init_weights()  # has no weights
    model = randomise(build(norm_cfg=dict(type='GN', num_groups=4))).double()
    out = model(torch.randn(2, 3, 64, 96, dtype=torch.double))[2]
    norm = model.stages[2].norm
    normalised = (out - norm.bias[:, None, None]) / norm.weight[:, None, None]
    groups = normalised.unflatten(1, (4, -1)).flatten(2)
    torch.testing.assert_close(groups.mean(2), torch.zeros_like(groups[..., 0]))


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_is_registered_once_for_all_toolboxes(scope):
    registry = importlib.import_module(f'{scope}.registry').MODELS
    assert registry.get('LaViT') is LaViT
    assert 'LaViT' not in registry.module_dict
    assert MODELS.get('LaViT') is LaViT


BAD = [
    (dict(arch='huge'), ValueError, "arch='huge'", "'tiny'"),
    (dict(arch=3), TypeError, 'arch=3', "'tiny'"),
    (dict(arch=dict(depths=(1, ))), ValueError, 'arch=', 'embed_dims'),
    (dict(arch={**ARCH, 'depth': 3}), ValueError, 'arch=', "'depth'"),
    (dict(arch={**ARCH, 'num_heads': (3, 2, 3, 4)}), ValueError,
     'num_heads=(3, 2, 3, 4)', '3 does not divide 8'),
    (dict(arch={**ARCH, 'depths': (2, 2, 2)}), ValueError, 'embed_dims=',
     '3 stages'),
    (dict(arch={**ARCH, 'depths': ()}), ValueError, 'depths=()', 'one stage'),
    (dict(arch={**ARCH, 'patch_sizes': (4, 3, 3, 3)}), ValueError,
     'patch_sizes=(4, 3, 3, 3)', 'odd'),
    (dict(num_va_layers=(2, 2, 4, 0)), ValueError,
     'num_va_layers=(2, 2, 4, 0)', 'depths=(2, 2, 3, 2)'),
    (dict(num_va_layers=(0, 1, 1, 0)), ValueError,
     'num_va_layers=(0, 1, 1, 0)', 'first stage'),
    (dict(num_va_layers=2), TypeError, 'num_va_layers=2', 'sequence'),
    (dict(sr_ratios=(8, 4, 2)), ValueError, 'sr_ratios=(8, 4, 2)', '4 stages'),
    (dict(sr_ratios=(8, 4, 2, 2)), ValueError, 'sr_ratios=(8, 4, 2, 2)',
     'stage 3 inherits'),
    (dict(sr_ratios=(8, 4, 2, 0)), ValueError, 'sr_ratios=0', 'at least 1'),
    (dict(out_indices=()), ValueError, 'out_indices=()', 'ascending'),
    (dict(out_indices=(1, 1)), ValueError, 'out_indices=(1, 1)', 'once'),
    (dict(out_indices=(0, 4)), ValueError, 'out_indices=4', 'at most 3'),
    (dict(out_indices=(-1, )), ValueError, 'out_indices=-1', 'at least 0'),
    (dict(out_indices=3), TypeError, 'out_indices=3', 'sequence'),
    (dict(frozen_stages=4), ValueError, 'frozen_stages=4', 'at most 3'),
    (dict(in_channels=0), ValueError, 'in_channels=0', 'at least 1'),
    (dict(in_channels='3'), TypeError, "in_channels='3'", 'integer'),
    (dict(max_query_grid=0), ValueError, 'max_query_grid=0', 'at least 1'),
    (dict(max_key_grid=0), ValueError, 'max_key_grid=0', 'at least 1'),
    (dict(value_reduction='mean'), ValueError, "value_reduction='mean'",
     "'pool'"),
    (dict(drop_path_rate=1.), ValueError, 'drop_path_rate=1.0', 'below 1'),
    (dict(score_path='fast'), ValueError, "score_path='fast'", "'factored'"),
    (dict(score_path=None), TypeError, 'score_path=None', "'factored'"),
    (dict(transform='reuse'), ValueError, "transform='reuse'", "'token_mix'"),
    (dict(mixing='half'), ValueError, "mixing='half'", "'low_rank'"),
    (dict(mixing=None), TypeError, 'mixing=None', "'low_rank'"),
    (dict(mixing_rank=0), ValueError, 'mixing_rank=0', 'at least 1'),
    (dict(mixing_rank=2.), TypeError, 'mixing_rank=2.0', 'integer'),
    (dict(trunk_norm=1), TypeError, 'trunk_norm=1', 'True or False'),
    (dict(drop_rate=float('nan')), ValueError, 'drop_rate=nan', 'below 1'),
    (dict(attn_drop_rate=True), TypeError, 'attn_drop_rate=True', 'number'),
    (dict(drop_rate='0.1'), TypeError, "drop_rate='0.1'", 'number'),
    (dict(pretrain_img_size=(64, 64)), TypeError,
     'pretrain_img_size=(64, 64)', 'integer'),
    (dict(in_channels=True), TypeError, 'in_channels=True', 'integer'),
    (dict(out_indices='012'), TypeError, "out_indices='012'", 'sequence'),
    (dict(frozen_stages=-2), ValueError, 'frozen_stages=-2', 'at least -1'),
    (dict(attn_residual=0), TypeError, 'attn_residual=0', 'True or False'),
    (dict(qkv_bias='no'), TypeError, "qkv_bias='no'", 'True or False'),
    (dict(with_cp=1), TypeError, 'with_cp=1', 'True or False'),
    (dict(norm_eval=None), TypeError, 'norm_eval=None', 'True or False'),
    (dict(norm_cfg='LN'), TypeError, "norm_cfg='LN'", 'a dict'),
    (dict(norm_cfg=dict(eps=1.)), ValueError, "norm_cfg={'eps': 1.0}", 'type'),
    (dict(norm_cfg=dict(type='Foo')), ValueError, "norm_cfg={'type': 'Foo'}",
     "'LN', 'BN'"),
    (dict(norm_cfg=dict(type='GN', num_groups=3)), ValueError, 'norm_cfg=',
     'fits 8 channels'),
    (dict(norm_cfg=dict(type='BN1d')), ValueError, 'norm_cfg=', '2D or 3D'),
    (dict(act_cfg=None), TypeError, 'act_cfg=None', 'a dict'),
    (dict(act_cfg=dict(type='Foo')), ValueError, "act_cfg={'type': 'Foo'}",
     "'GELU'"),
    (dict(act_cfg=dict(type='MaxPool2d', kernel_size=2)), ValueError,
     'act_cfg=', "'GELU'"),
    (dict(dp_loss=True), TypeError, 'dp_loss=True', 'a dict'),
    (dict(dp_loss=dict(), transform='identity'), ValueError, 'dp_loss={}',
     "form='bounded', with transform='identity'"),
    (dict(dp_loss=dict(weight=1)), ValueError, "dp_loss={'weight': 1}",
     'loss_weight'),
    (dict(init_cfg='weights.pth'), TypeError, "init_cfg='weights.pth'",
     "type='Pretrained'"),
    (dict(init_cfg=dict(type='Pretrained')), ValueError, 'init_cfg=',
     'checkpoint=PATH'),
    (dict(init_cfg=[dict(layer='Conv2d')]), ValueError, 'init_cfg=', 'type'),
    (dict(init_cfg=dict(type='Pretrained', checkpoint=None)), ValueError, 'init_cfg=',
     'checkpoint=PATH'),
    (dict(init_cfg=dict(type=PretrainedInit)), ValueError, 'init_cfg=',
     'checkpoint=PATH'),
    (dict(arch={**ARCH, 'mlp_ratios': (.1, 4, 4, 4)}), ValueError,
     'mlp_ratios=(0.1, 4, 4, 4)', '1 / embed_dims=(8, 16, 24, 32)'),
    (dict(arch={**ARCH, 'mlp_ratios': (float('inf'), 4, 4, 4)}), ValueError,
     'mlp_ratios=inf', 'number'),
    (dict(arch={**ARCH, 'mlp_ratios': (4, 4, 4, '4')}), TypeError,
     "mlp_ratios='4'", 'number'),
    (dict(arch={**ARCH, 'mlp_ratios': 4}), TypeError, 'mlp_ratios=4',
     'sequence'),
    (dict(arch={**ARCH, 'strides': '4222'}), TypeError, "strides='4222'",
     'sequence'),
    (dict(arch={**ARCH, 'patch_sizes': (3, 3, 3, 3)}), ValueError,
     'patch_sizes=(3, 3, 3, 3)', 'strides=(4, 2, 2, 2)'),
    (dict(arch={**ARCH, 'embed_dims': (8., 16, 24, 32)}), TypeError,
     'embed_dims=8.0', 'integer'),
]


@pytest.mark.parametrize('kwargs, error, argument, remedy', BAD)
def test_bad_arguments_are_named(kwargs, error, argument, remedy):
    with pytest.raises(error) as info:
        build(**kwargs)
    assert str(info.value).startswith('LaViT: ')
    assert argument in str(info.value)
    assert remedy in str(info.value)


def test_numbers_of_numpy_are_numbers():
    model = build(
        arch={key: tuple(np.array(v)) for key, v in ARCH.items()},
        in_channels=np.int64(3), pretrain_img_size=np.int32(64),
        out_indices=[np.int8(1)], drop_rate=np.float32(0.1))
    assert [out.shape[1] for out in model(torch.rand(1, 3, 64, 64))] == [16]


@pytest.mark.parametrize('x, error, argument, remedy', [
    (torch.rand(1, 4, 64, 64), ValueError, '(1, 4, 64, 64)', 'in_channels=3'),
    (torch.rand(3, 64, 64), ValueError, '(3, 64, 64)', '(B, 3, H, W)'),
    (torch.rand(1, 3, 0, 64), ValueError, '(1, 3, 0, 64)', 'at least 1'),
    (torch.zeros(1, 3, 64, 64).byte(), TypeError, 'torch.uint8',
     'normalised images'),
])
def test_bad_input_is_named(x, error, argument, remedy):
    with pytest.raises(error) as info:
        build()(x)
    assert str(info.value).startswith('LaViT: x.')
    assert argument in str(info.value) and remedy in str(info.value)


@pytest.mark.parametrize('path', SCORE_PATHS)
def test_empty_batch_gives_empty_maps_and_no_loss(path, device, monkeypatch):
    fused = F.scaled_dot_product_attention

    def with_images(q, *args, **kwargs):
        assert len(q), 'batch size must be positive'  # as GPUs of older torch say
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', with_images)
    model = build(score_path=path, dp_loss=dict()).train().to(device)
    outs = model(torch.rand(0, 3, 70, 45, device=device))
    assert [tuple(out.shape) for out in outs] == [
        (0, 8, 18, 12), (0, 16, 9, 6), (0, 24, 5, 3), (0, 32, 3, 2)]
    assert model.dp_loss.take() == 0
    total(outs).backward()
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize('path', SCORE_PATHS)
def test_not_finite_pixels_spoil_their_image_alone_and_visibly(path, device):
    model = randomise(build(score_path=path)).double().to(device)
    x = torch.randn(3, 3, 64, 48, dtype=torch.double, device=device)
    expected = model(x)
    x[1, 0, 5, 5], x[2, 2, 0, 0] = math.nan, math.inf
    for out, other in zip(model(x), expected):
        torch.testing.assert_close(out[0], other[0])
        assert out[1:].isnan().all()


def classifier_checkpoint(tmp_path, **kwargs) -> tuple:
    """A classifier's checkpoint, the backbone under its prefix, and that backbone."""
    model = randomise(build(out_indices=(3, ), **kwargs))
    path = tmp_path / 'classifier.pth'
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    torch.save(dict(state_dict={**state, 'head.fc.weight': torch.ones(1)}), path)
    return path, model


@pytest.fixture
def checkpoint(tmp_path):
    return classifier_checkpoint(tmp_path)


def pretrained(path, **kwargs) -> LaViT:
    return build(
        init_cfg=dict(
            type='Pretrained', checkpoint=str(path), prefix='backbone.'),
        **kwargs)


@pytest.fixture
def warnings_logged():
    with logged(logging.WARNING) as messages:
        yield messages


@pytest.mark.parametrize('within', [False, True])
def test_mmengines_log_says_how_each_parameter_was_initialised(within):
    model = LaViT(arch=ARCH, pretrain_img_size=64)
    names = [name for name, _ in model.named_parameters()]
    if within:
        outer = BaseModule()
        outer.backbone = model
        model, names = outer, [f'backbone.{name}' for name in names]
    with logged(logging.INFO) as messages:
        model.init_weights()
    report = {line.split(' - ')[0].strip(): line for line in messages
              if ' - torch.Size' in line}
    assert set(names) == set(report)
    assert all('LaViTInit' in line for line in report.values())


def test_a_classifiers_weights_bring_the_norms_of_all_maps(
        checkpoint, warnings_logged):
    path, source = checkpoint
    model = pretrained(path)
    assert model.state_dict().keys() == source.state_dict().keys()
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert 'missing keys' not in ''.join(warnings_logged)


def test_missing_keys_are_reported(tmp_path, warnings_logged):
    path, _ = classifier_checkpoint(tmp_path, trunk_norm=False)
    pretrained(path, trunk_norm=False)
    report = ''.join(warnings_logged)
    assert 'missing keys' in report and 'stages.0.norm.weight' in report


def test_unexpected_keys_are_reported(checkpoint, warnings_logged):
    pretrained(checkpoint[0], num_va_layers=(2, 2, 1, 0))
    report = ''.join(warnings_logged)
    assert 'unexpected key' in report
    assert 'stages.1.blocks.1.attn.theta.weight' in report
    assert 'stages.1.blocks.1.attn.kv.weight' in report  # missing


def test_weights_of_another_architecture_are_refused(checkpoint):
    with pytest.raises(ValueError) as info:
        pretrained(checkpoint[0], arch='tiny')
    assert 'stages.0.patch_embed.conv.weight is (8, 3, 7, 7) in the ' \
        'checkpoint, (64, 3, 7, 7) here' in str(info.value)


def test_missing_checkpoint_says_how_to_train_without():
    with pytest.raises(FileNotFoundError, match='init_cfg=None'):
        pretrained('no/such/file.pth')


@pytest.mark.parametrize('options', [
    dict(transform='re_attention'), dict(norm_cfg=dict(type='BN'))], ids=str)
def test_recomputing_counts_no_batch_twice(options, device):
    x, states = torch.randn(2, 3, 64, 64, device=device), []
    for with_cp in (False, True):
        model = randomise(build(with_cp=with_cp, **options)).train().to(device)
        total(model(x)).backward()
        states.append((model.state_dict(), [p.grad for p in model.parameters()]))
        assert {module.momentum for module in model.modules()
                if isinstance(module, nn.BatchNorm2d)} == {.1}
    torch.testing.assert_close(*states)
    assert any(name.endswith('num_batches_tracked') for name in states[0][0])


def test_recomputing_leaves_a_counter():
    """SyncBN asks for one, and runs on GPUs alone."""
    norm = nn.BatchNorm2d(2)
    count = norm.num_batches_tracked
    with keep_statistics(norm):
        norm(torch.randn(2, 2, 3, 3))
        assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked is count and count == 0
    assert norm.momentum == .1 and not norm.running_mean.any()


@pytest.mark.parametrize('layers', [
    ['stages.0.blocks.1'], ['stages.2.blocks.1'], ['stages.3.blocks.0']], ids=str)
def test_recomputation_by_others_is_refused(layers):
    """It would cut off the gradients that pass through scores."""
    model = build().train()
    turn_on_activation_checkpointing(model, layers)
    with pytest.raises(RuntimeError, match='lost their gradients.* use with_cp=True'):
        total(model(torch.randn(1, 3, 64, 64))).backward()


def test_scores_of_frozen_layers_need_no_gradients():
    model = build(frozen_stages=0).train()
    for name, parameter in model.named_parameters():
        if '.attn.q.' in name or '.attn.kv.' in name:
            parameter.requires_grad = False
    total(model(torch.randn(1, 3, 64, 64))).backward()
    assert model.stages[1].blocks[0].ffn.fc1.weight.grad.any()


def ddp_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    model = randomise(build(with_cp=True)).double()
    ddp = DistributedDataParallel(model)
    x = torch.load(f'{folder}/x.pt')
    # Twice: DDP reports unused parameters at the second pass.
    for _ in range(2):
        model.zero_grad()
        sum(out.square().mean() for out in ddp(x[rank::2])).backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f'{folder}/grads.pt')
    del ddp
    leave_process_group()


def test_a_checkpoint_of_this_release_gives_the_same_maps():
    saved = torch.load(ROOT / 'tests/fixtures/lavit_0.2.0.pth')
    model = build(**{k: saved['meta'][k] for k in ('arch', 'pretrain_img_size')})
    model.load_state_dict(saved['state_dict'])
    with torch.no_grad():
        maps = model.eval()(saved['image'])
    for found, kept in zip(maps, saved['maps'], strict=True):
        # Rounding differs between processors and versions of torch, no more.
        torch.testing.assert_close(found, kept, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_the_first_release_is_refused():
    saved = torch.load(ROOT / 'tests/fixtures/lavit_0.1.0.pth')
    model = build(**{k: saved['meta'][k] for k in ('arch', 'pretrain_img_size')})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='LaViT: checkpoint=.*norm0.* 0.2 or later'):
        model.load_state_dict(saved['state_dict'])
    torch.testing.assert_close(dict(model.state_dict()), dict(before))


def test_two_processes_give_the_gradients_of_one(tmp_path, free_port):
    x = torch.randn(4, 3, 64, 96, dtype=torch.double)
    torch.save(x, tmp_path / 'x.pt')
    mp.spawn(ddp_worker, (free_port, str(tmp_path)), nprocs=2)
    model = randomise(build()).double()
    sum(out.square().mean() for out in model(x)).backward()
    for p, grad in zip(model.parameters(), torch.load(tmp_path / 'grads.pt')):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-12)


def test_ddp_in_one_process_gives_the_gradients_without(free_port, device):
    x = torch.randn(2, 3, 64, 96, dtype=torch.double, device=device)
    model = randomise(build(with_cp=True)).double().to(device)
    expected = gradients(model, x)
    torch.distributed.init_process_group(
        'gloo' if device == 'cpu' else 'nccl', f'tcp://127.0.0.1:{free_port}',
        rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(model)
        for _ in range(2):  # DDP reports unused parameters at the second pass
            ddp.zero_grad()
            total(ddp(x)).backward()
        del ddp
    finally:
        leave_process_group()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, 'fully_shard'),
    reason='torch is too old: it has no torch.distributed.fsdp.fully_shard')
def test_layers_that_fsdp_shards_have_the_same_gradients(free_port):
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    model = randomise(build(dp_loss=dict(loss_weight=10.))).double().train()

    def step() -> None:
        (total(model(x)) + model.dp_loss.take()).backward()

    step()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # FSDP shards nothing else
            module.to(memory_format=torch.contiguous_format)
    torch.distributed.init_process_group(
        'gloo', f'tcp://127.0.0.1:{free_port}', rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh('cpu', (1, ))
        for block in [block for stage in model.stages for block in stage.blocks]:
            torch.distributed.fsdp.fully_shard(block, mesh=mesh)
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), expected[name])
    finally:
        leave_process_group()


def test_weights_and_optimizer_saved_on_a_device_go_on_on_the_cpu(tmp_path, device):
    """A step here and a step there are two steps here."""
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)

    def step(model, optimizer, where: str) -> None:
        optimizer.zero_grad()
        sum(out.square().mean() for out in model(x.to(where))).backward()
        optimizer.step()

    def begin(where: str) -> tuple:
        model = randomise(build()).double().to(where)
        return model, torch.optim.AdamW(model.parameters(), 1e-3)

    expected = begin('cpu')
    for _ in range(2):
        step(*expected, 'cpu')
    first = begin(device)
    step(*first, device)
    torch.save([part.state_dict() for part in first], tmp_path / 'checkpoint.pth')
    second = begin('cpu')
    for part, state in zip(second, torch.load(
            tmp_path / 'checkpoint.pth', map_location='cpu')):
        part.load_state_dict(state)
    step(*second, 'cpu')
    torch.testing.assert_close(dict(second[0].state_dict()),
                               dict(expected[0].state_dict()), rtol=1e-5, atol=1e-8)
