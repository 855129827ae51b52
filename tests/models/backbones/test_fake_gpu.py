"""Tensors on the wrong device or of the wrong type, found without a GPU.

torch's fake tensors have a device, a type and a shape but no values. An operator on
tensors of two devices refuses them as it would on a GPU. `OneType` refuses what
kernels of products would: tensors of two types.
"""
from contextlib import contextmanager
from inspect import signature
from typing import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmlavit import LaViT
from mmlavit.models.backbones.arch import ARCHS
from mmlavit.models.layers.attend import MAX_BUILT_SCORES
from mmlavit.models.layers.mixing import TokenMix

pytestmark = pytest.mark.skipif(
    not hasattr(torch, 'get_autocast_dtype'),
    reason='needs torch.get_autocast_dtype, which torch 2.1 has not')
ARCH = dict(  # a layer of each kind
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4),
    num_va_layers=(1, 1, 1, 0))
OPTIONS = [
    dict(),
    dict(arch={**ARCHS['pvtv2_b0'], 'depths': (1, 1, 2, 1),
               'num_va_layers': (1, 1, 1, 1)}),
    dict(num_va_layers=(1, 0, 0, 0)),
    dict(num_va_layers=ARCH['depths'], attn_residual=False),
    dict(score_path='factored'),
    dict(score_path='materialised'),
    dict(mixing='low_rank', mixing_rank=3),
    dict(transform='identity'),
    dict(transform='re_attention'),
    dict(trunk_norm=True, qkv_bias=False),
    dict(max_key_grid=2, max_query_grid=3, value_reduction='pool'),
    dict(norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU')),
    dict(norm_cfg=dict(type='GN', num_groups=2), norm_eval=True),
    dict(drop_rate=.1, attn_drop_rate=.1, drop_path_rate=.1, frozen_stages=0),
    dict(dp_loss=dict()),
    dict(dp_loss=dict(form='bounded', layers='all'), score_path='materialised'),
    dict(dp_loss=dict(form='paper'), with_cp=True),
    dict(out_indices=(1, 2), sr_ratios=(4, 2, 1, 1), num_va_layers=(1, 1, 1, 1)),
]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
PRODUCTS = ('aten.mm', 'aten.bmm', 'aten.addmm', 'aten.baddbmm', 'aten.convolution',
            'aten._scaled_dot_product')


class OneType(TorchDispatchMode):
    """Refuses products of tensors of two types, as their kernels do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = {x.dtype for x in args if isinstance(x, torch.Tensor)}
        if len(found) > 1 and str(func).startswith(PRODUCTS):
            raise RuntimeError(f'{func}: two dtypes: {found}')
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast_of_a_gpu(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast('cuda'), which does nothing where there is no GPU."""
    enabled = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    torch.set_autocast_enabled('cuda', dtype != torch.float32)
    torch.set_autocast_dtype('cuda', dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled('cuda', enabled[0])
        torch.set_autocast_dtype('cuda', enabled[1])
        torch.clear_autocast_cache()


def on_a_fake_gpu(model: nn.Module, size: tuple, dtype: torch.dtype) -> list:
    """All that the model computes there: its maps, and the DP loss if it has one."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with FakeTensorMode(), OneType(), autocast_of_a_gpu(dtype):
        fake = {name: torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype, device='cuda',
            requires_grad=x.requires_grad) for name, x in state.items()}
        images = torch.empty(2, 3, *size, device='cuda')
        outs = list(torch.func.functional_call(model, fake, images))
        if model.dp_loss is not None:
            outs.append(model.dp_loss.take())
        return outs


@pytest.mark.parametrize('dtype', TYPES, ids=str)
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_every_option_runs_on_a_fake_gpu(options, dtype, monkeypatch):
    model = LaViT(**{**dict(arch=ARCH, pretrain_img_size=64), **options}).train()
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    # All scores at once, and in pieces.
    for size, most in (((64, 64), MAX_BUILT_SCORES['gpu']), ((70, 45), 500)):
        monkeypatch.setitem(MAX_BUILT_SCORES, 'gpu', most)
        for out in on_a_fake_gpu(model, size, dtype):
            assert out.device.type == 'cuda'
            assert out.dtype in (torch.float32, dtype)
    assert seen == {dtype}


def test_every_argument_is_among_the_options():
    elsewhere = {'in_channels', 'pretrain_img_size', 'init_cfg'}  # sizes, weights
    tried = {name for options in OPTIONS for name in options}
    assert set(signature(LaViT).parameters) == tried | elsewhere


@pytest.mark.parametrize('wrong', [dict(device='cpu'), dict(dtype=torch.double)],
                         ids=str)
def test_a_mix_up_is_found(wrong, monkeypatch):
    right = TokenMix.matrix

    def matrix(self):
        return right(self).to(**wrong)

    monkeypatch.setattr(TokenMix, 'matrix', matrix)
    with pytest.raises(RuntimeError, match='device|dtype'):
        on_a_fake_gpu(LaViT(arch=ARCH, pretrain_img_size=64), (64, 64),
                      torch.float32)
