"""Small models of the stock classes, and what less attention is in them, literally."""
import copy
from typing import Callable, Dict, List, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from builders import randomise
from literal import dense_mix, with_extra


class Case(NamedTuple):
    """A stock class.

    Args:
        make (Callable): The model in float64, in eval mode, with weights at which
            everything matters.
        layers (tuple): Layers that are given less attention.
        count (int): Number of layers.
        sizes (list): Of images, that of the pre-training first.
        literal (Callable): Sets literal attentions in a converted model.
    """
    make: Callable[[], nn.Module]
    layers: tuple
    count: int
    sizes: list
    literal: Callable


def ready(model: nn.Module) -> nn.Module:
    randomise(model, 0.3)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data += 1
    model.double().eval()  # mmpretrain's returns nothing
    return model


VIT = dict(embed_dims=12, num_layers=5, num_heads=3, feedforward_channels=24)
PVT = dict(pretrain_img_size=64, embed_dims=6, num_layers=[2, 1, 3, 2],
           num_heads=[1, 2, 3, 4], mlp_ratios=[2, 2, 2, 2], drop_path_rate=0.)
SWIN = dict(embed_dims=8, depths=(2, 4, 3), num_heads=(1, 2, 2))


def make_vit() -> nn.Module:
    from mmpretrain.models import VisionTransformer
    return ready(VisionTransformer(VIT, img_size=64, patch_size=16, out_type='raw'))


def make_distilled() -> nn.Module:
    from mmpretrain.models import DistilledVisionTransformer
    return ready(DistilledVisionTransformer(
        VIT, img_size=64, patch_size=16, out_type='raw'))


def make_timm() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer
    return ready(VisionTransformer(
        img_size=64, patch_size=16, embed_dim=12, depth=5, num_heads=3, mlp_ratio=2,
        num_classes=7, reg_tokens=2, dynamic_img_size=True, init_values=0.5,
        global_pool='avg'))


def make_pvt() -> nn.Module:
    from mmdet.models.backbones.pvt import PyramidVisionTransformer
    return ready(PyramidVisionTransformer(**PVT))


def make_pvtv2() -> nn.Module:
    from mmdet.models.backbones.pvt import PyramidVisionTransformerV2
    options = {k: v for k, v in PVT.items() if k != 'pretrain_img_size'}
    return ready(PyramidVisionTransformerV2(**options))


def make_swin() -> nn.Module:
    from mmdet.models.backbones.swin import SwinTransformer
    return ready(SwinTransformer(
        **SWIN, window_size=4, strides=(4, 2, 2), out_indices=(0, 1, 2),
        drop_path_rate=0.))


def make_swin_cls() -> nn.Module:
    from mmpretrain.models import SwinTransformer
    return ready(SwinTransformer(
        SWIN, img_size=64, window_size=4, out_indices=(0, 1, 2), drop_path_rate=0.))


def literal_mix(part: nn.Module, scores: Tensor, q_grid: tuple, k_grid: tuple,
                extra: int) -> Tensor:
    """Psi(Theta(S)^T)^T of (B, heads, N, M) with dense matrices."""
    psi = with_extra(dense_mix(part.psi, q_grid), extra)
    theta = with_extra(dense_mix(part.theta, k_grid), extra)
    return psi @ (theta @ scores.mT).mT


def own_scores(qkv: Tensor, heads: int) -> tuple:
    """S and V of a projection (B, N, 3 C), heads apart."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2)
               for x in qkv.chunk(3, dim=-1))
    return q @ k.mT / q.shape[-1]**.5, v


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def literal_vit(model: nn.Module, size: tuple) -> None:
    """mmpretrain's and timm's attention."""
    layers = model.layers if hasattr(model, 'layers') else model.blocks
    extra = getattr(model, 'num_prefix_tokens', None) or model.num_extra_tokens
    grid, last = tuple(side // 16 for side in size), []

    def attend(attn, x, **kwargs):
        heads = attn.num_heads
        if hasattr(attn.qkv, 'v'):
            s = literal_mix(attn.qkv, last[-1], grid, grid, extra)
            v = attn.qkv.v(x).unflatten(2, (heads, -1)).transpose(1, 2)
        else:
            s, v = own_scores(attn.qkv(x), heads)
        last.append(s)
        return attn.proj(joined(s.softmax(-1) @ v))

    for layer in layers:
        be_stock(layer)
        layer.attn.forward = lambda x, attn=layer.attn, **kwargs: attend(
            attn, x, **kwargs)


def literal_swin(model: nn.Module, size: tuple) -> None:
    for stage in model.stages:
        last: Dict[bool, Tensor] = {}

        def attend(msa, shifted, x, mask=None, last=last):
            heads, n = msa.num_heads, x.shape[1]
            if hasattr(msa.qkv, 'v'):
                s = literal_mix(msa.qkv, last[shifted], msa.window_size,
                                msa.window_size, 0)
                v = msa.qkv.v(x).unflatten(2, (heads, -1)).transpose(1, 2)
            else:
                s, v = own_scores(msa.qkv(x), heads)
            last[shifted] = s
            bias = msa.relative_position_bias_table[msa.relative_position_index.view(-1)]
            s = s + bias.view(n, n, heads).permute(2, 0, 1)
            if mask is not None:
                s = s + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
            return msa.proj(joined(s.softmax(-1) @ v))

        for block in stage.blocks:
            be_stock(block)
            block.attn.w_msa.forward = (
                lambda x, mask=None, msa=block.attn.w_msa, attend=attend,
                shifted=block.attn.shift_size > 0: attend(msa, shifted, x, mask))


def literal_downsample(part: nn.Module, scores: Tensor, grid: tuple) -> Tensor:
    """Each key's map over the queries convolved, then heads mixed."""
    b, heads, n, m = scores.shape
    kernels = part.depthwise / part.depthwise.abs().sum((1, 2, 3), keepdim=True)
    mix = part.mix / part.mix.square().sum().sqrt() * len(part.mix)**.5
    maps = scores.permute(0, 3, 1, 2).reshape(b * m, heads, *grid)
    maps = F.conv2d(maps, kernels, stride=part.stride, padding=1, groups=heads)
    maps = torch.einsum('hg,bgyx->bhyx', mix, maps)
    return maps.flatten(2).unflatten(0, (b, m)).permute(0, 2, 3, 1)


def literal_pvt(model: nn.Module, size: tuple) -> None:
    """Inherited scores of the stage before are a part of their own, as in LaViT."""
    parts, grids, stride = [], [], 1  # (own, inherited) of each layer
    for i, (_, layers, _) in enumerate(model.layers):
        stride *= model.strides[i]
        grid = tuple(side // stride for side in size)
        for layer in layers:
            if hasattr(layer, 'pos_embed'):
                continue
            be_stock(layer)
            ratio = layer.attn.sr_ratio
            keys = tuple(side // ratio for side in grid)

            def attend(query, key, value, attn=layer.attn.attn, grid=grid, keys=keys):
                query, value = query.transpose(0, 1), value.transpose(0, 1)
                own = inherited = None
                if getattr(attn, 'downsample', None) is not None:
                    own, inherited = parts[-1]
                    inherited = literal_downsample(
                        attn.downsample, inherited if own is None else own, grids[-1])
                    own = None
                heads = attn.num_heads
                if hasattr(attn, 'v'):
                    if attn.downsample is None:
                        own, inherited = parts[-1]
                    own, inherited = (
                        s if s is None else literal_mix(attn, s, grid, keys, 0)
                        for s in (own, inherited))
                    v = attn.v(value)
                else:
                    wq, wk, wv = attn.in_proj_weight.chunk(3)
                    bq, bk, bv = attn.in_proj_bias.chunk(3)
                    q, k, v = (F.linear(query, wq, bq), F.linear(value, wk, bk),
                               F.linear(value, wv, bv))
                    q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
                    own = q @ k.mT / q.shape[-1]**.5
                parts.append((own, inherited))
                grids.append(grid)
                s = sum(x for x in (own, inherited) if x is not None)
                v = v.unflatten(2, (heads, -1)).transpose(1, 2)
                return attn.out_proj(joined(s.softmax(-1) @ v)).transpose(0, 1), None

            layer.attn.attn.forward = attend


def be_stock(layer: nn.Module) -> None:
    """The stock's forward, without any hand-over."""
    layer.__class__ = next(
        base for base in type(layer).__mro__
        if issubclass(base, nn.Module) and not base.__module__.startswith('mmlavit'))


CASES: Dict[str, Case] = {
    'vit': Case(make_vit, (2, 3, 4), 5, [(64, 64), (48, 96)], literal_vit),
    'distilled': Case(make_distilled, (1, 3), 5, [(64, 64)], literal_vit),
    'timm': Case(make_timm, (1, 2, 4), 5, [(64, 64), (48, 96)], literal_vit),
    'pvt': Case(make_pvt, (1, 3, 4, 5, 7), 8, [(64, 64), (64, 96)], literal_pvt),
    'pvtv2': Case(make_pvtv2, (4, 5, 6, 7), 8, [(64, 64)], literal_pvt),
    'swin': Case(make_swin, (4, 5, 8), 9, [(64, 64), (50, 76)], literal_swin),
    'swin_cls': Case(make_swin_cls, (4, 5, 8), 9, [(64, 64), (96, 64)], literal_swin),
}


def outputs(model: nn.Module, x: Tensor) -> List[Tensor]:
    """Whatever the model returns, as a list."""
    out = model(x)
    return [out] if isinstance(out, Tensor) else list(out)


def total(outs: List[Tensor]) -> Tensor:
    """A scalar in which no output element has the same weight as another."""
    generator = torch.Generator().manual_seed(2)
    return sum((out * torch.randn(out.shape, generator=generator).to(out)).sum()
               for out in outs)


def gradients(model: nn.Module, x: Tensor) -> Dict[str, Tensor]:
    model.zero_grad()
    total(outputs(model, x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def literally(model: nn.Module, case: Case, size: tuple) -> nn.Module:
    """A copy with the formulas written out in place of the attentions."""
    copied = copy.deepcopy(model)
    case.literal(copied, size)
    return copied
