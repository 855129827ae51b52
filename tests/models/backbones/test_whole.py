"""The whole network against the formulas of docs/method.md, matrix by matrix."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from builders import ARCH, check_mean, randomise
from literal import dense_mix
from mmlavit import LaViT

ARCH = dict(ARCH, mlp_ratios=(2, 2, 2, 2))


def build(**options) -> LaViT:
    return randomise(LaViT(**{
        **dict(arch=ARCH, pretrain_img_size=64), **options}), std=.1).double().eval()


def norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def heads_of(x: torch.Tensor, count: int) -> torch.Tensor:
    """(B, N, C) -> (B, heads, N, d)."""
    return torch.stack(x.chunk(count, dim=2), dim=1)


def means(x: torch.Tensor, grid: tuple, ratio: int) -> tuple:
    """Tokens, averaged over windows of ratio x ratio, and their grid."""
    rows = [slice(i, i + ratio) for i in range(0, grid[0], ratio)]
    columns = [slice(i, i + ratio) for i in range(0, grid[1], ratio)]
    image = x.reshape(len(x), *grid, -1)
    return torch.stack([image[:, r, c].mean((1, 2)) for r in rows for c in columns],
                       dim=1), (len(rows), len(columns))


def reduced(attn: nn.Module, y: torch.Tensor, grid: tuple, ratio: int) -> torch.Tensor:
    """What keys and values are projected from."""
    if attn.reduction is None:
        return means(y, grid, ratio)[0]
    y, grid = means(y, grid, ratio // attn.sr_ratio)
    image = y.transpose(1, 2).reshape(len(y), -1, *grid)
    bottom, right = (-side % attn.sr_ratio for side in grid)
    conv = attn.reduction.conv
    image = F.conv2d(F.pad(image, (0, right, 0, bottom)), conv.weight, conv.bias,
                     stride=attn.sr_ratio)
    return norm(attn.reduction.norm, image.flatten(2).transpose(1, 2))


def downsampled(layer: nn.Module, scores: torch.Tensor, grid: tuple) -> torch.Tensor:
    """(B, heads, N, M) -> (B, heads', N', M): each key's map over the queries."""
    kernels = layer.depthwise / layer.depthwise.abs().sum((1, 2, 3), keepdim=True)
    mix = layer.mix / layer.mix.square().sum(1).mean().sqrt()
    keys = [F.conv2d(key.reshape(len(key), -1, *grid), kernels, stride=layer.stride,
                     padding=1, groups=len(kernels)).flatten(2)
            for key in scores.unbind(3)]
    return torch.einsum('gh,bhnm->bgnm', mix, torch.stack(keys, dim=3))


def ffn(layer: nn.Module, y: torch.Tensor, grid: tuple) -> torch.Tensor:
    y = layer.fc1(y).transpose(1, 2)
    y = layer.dwconv(y.reshape(*y.shape[:2], *grid)).flatten(2).transpose(1, 2)
    return layer.fc2(F.gelu(y))


def literal_maps(model: LaViT, image: torch.Tensor, num_va_layers: tuple,
                 attn_residual: bool) -> list:
    """The four maps; every score matrix is built."""
    maps, own, inherited, last_grid = [], None, None, None
    for stage, num_va in zip(model.stages, num_va_layers):
        image = stage.patch_embed.conv(image)
        grid = tuple(image.shape[2:])
        x = norm(stage.patch_embed.norm, image.flatten(2).transpose(1, 2))
        ratio = stage.sr_ratio
        if stage.max_key_grid is not None:
            while math.ceil(max(grid) / ratio) > stage.max_key_grid:
                ratio += stage.sr_ratio
        keys = tuple(math.ceil(side / ratio) for side in grid)
        handed = inherited if own is None else own
        own = inherited = None
        if handed is not None and (attn_residual or num_va == 0):
            inherited = downsampled(stage.downsample, handed, last_grid)
        for i, block in enumerate(stage.blocks):
            attn, y = block.attn, norm(block.norm1, x)
            source = reduced(attn, y, grid, ratio)
            if i < num_va:
                k, v = attn.kv(source).chunk(2, dim=2)
                q, k = heads_of(attn.q(y), attn.num_heads), heads_of(k, attn.num_heads)
                own = q @ k.mT / math.sqrt(q.shape[3])
                if i:
                    inherited = None  # the first layer alone adds them
            else:
                v = attn.v(source)
                theta, psi = dense_mix(attn.theta, keys), dense_mix(attn.psi, grid)
                own, inherited = (None if s is None else psi @ s @ theta.T
                                  for s in (own, inherited))
            scores = sum(s for s in (own, inherited) if s is not None)
            z = scores.softmax(3) @ heads_of(v, attn.num_heads)
            x = x + attn.proj(torch.cat(z.unbind(1), dim=2))
            x = x + ffn(block.ffn, norm(block.norm2, x), grid)
        output = norm(stage.norm, x)
        maps.append(output.transpose(1, 2).reshape(len(x), -1, *grid))
        image = maps[-1] if stage.norm_in_trunk else x.transpose(1, 2).reshape(
            len(x), -1, *grid)
        last_grid = grid
    return maps


@pytest.mark.parametrize('options', [
    dict(), dict(attn_residual=False), dict(trunk_norm=False), dict(max_key_grid=2),
    dict(mixing='low_rank', mixing_rank=3), dict(value_reduction='pool'),
    dict(num_va_layers=(2, 0, 0, 0)), dict(num_va_layers=(1, 2, 3, 1))], ids=str)
def test_maps_are_those_of_the_formulas(options):
    model = build(**options)
    image = torch.randn(2, 3, 72, 96, dtype=torch.double)
    expected = literal_maps(
        model, image, options.get('num_va_layers', ARCH['num_va_layers']),
        options.get('attn_residual', True))
    for ours, theirs in zip(model(image), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# Dropout --------------------------------------------------------------------
@pytest.mark.parametrize('layer, options', [
    (0, dict(score_path='factored')), (0, dict(score_path='materialised')),
    (1, dict()), (1, dict(transform='re_attention'))], ids=str)
@pytest.mark.parametrize('name', ['attn_drop_rate', 'drop_rate'])
def test_dropout_is_random_in_training_alone_and_right_on_average(name, layer, options):
    """Of a VA layer and of an LA layer."""
    image = torch.randn(1, 3, 32, 32, dtype=torch.double)
    arch = dict(embed_dims=(8, ), depths=(2, ), num_heads=(2, ), num_va_layers=(1, ))
    options = dict(options, arch=arch, sr_ratios=(2, ), out_indices=(0, ))
    model, plain = build(**options, **{name: .3}), build(**options)
    torch.testing.assert_close(model(image), plain(image))  # of eval mode
    seen = []
    for x in model, plain:
        attn = x.stages[0].blocks[layer].attn.train()
        attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        for _ in range(400):
            model(image)
        plain(image)
    # The attention's output is linear in the dropped values, so it has their mean.
    check_mean(torch.stack(seen[:-1]), seen[-1])


def test_dropped_paths_leave_the_block_out():
    model = build(arch=dict(embed_dims=(8, ), depths=(2, ), num_heads=(2, ),
                            num_va_layers=(1, )),
                  sr_ratios=(2, ), out_indices=(0, ), drop_path_rate=.5)
    block, seen = model.stages[0].blocks[1], []  # the rate of the first is 0
    block.drop_path.drop_prob = 1 - 1e-9
    block.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    image = torch.randn(2, 3, 32, 32, dtype=torch.double)
    model.train()(image)
    model.eval()(image)
    (into, out), (into_eval, out_eval) = seen
    assert torch.equal(into, out)
    assert not torch.equal(into_eval, out_eval)
