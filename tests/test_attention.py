"""The attention against the formulas, written out independently."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from mmlavit.attention import (AttentionDownsample, FactoredScores,
                               LayerScores, LessAttention, MaterialisedScores,
                               TokenMix, VanillaAttention, merge_heads)

LN = dict(type='LN', eps=1e-6)
# (query grid, key grid): the base grids, larger, odd, non-square, tiny.
GRIDS = [((4, 4), (2, 2)), ((8, 8), (4, 4)), ((7, 5), (4, 3)),
         ((3, 11), (2, 6)), ((1, 1), (1, 1))]


def area_matrix(size: int, base: int) -> np.ndarray:
    """Area pooling of a row of ``size`` cells to ``base`` cells."""
    matrix = np.zeros((base, size))
    for i in range(base):
        start, end = i * size // base, math.ceil((i + 1) * size / base)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def bilinear_matrix(base: int, size: int) -> np.ndarray:
    """Linear interpolation of ``base`` cell centres at ``size`` centres."""
    matrix = np.zeros((size, base))
    for i in range(size):
        x = max((i + 0.5) * base / size - 0.5, 0)
        low = min(int(x), base - 1)
        high = min(low + 1, base - 1)
        matrix[i, low] += 1 - (x - low)
        matrix[i, high] += x - low
    return matrix


def dense_mix(mix: TokenMix, grid: tuple) -> torch.Tensor:
    """I + U W D as one (N, N) matrix."""
    down, up = (np.kron(*(matrix(*sizes) for sizes in pairs))
                for matrix, pairs in ((area_matrix,
                                       zip(grid, mix.base_grid)),
                                      (bilinear_matrix,
                                       zip(mix.base_grid, grid))))
    n = grid[0] * grid[1]
    return torch.eye(n).double() + torch.tensor(up) @ mix.weight @ torch.tensor(
        down)


def random_mix(base: tuple) -> TokenMix:
    mix = TokenMix(base).double()
    nn.init.normal_(mix.weight, std=0.3)
    return mix


def random_factors(heads: int, q_grid: tuple, k_grid: tuple, d: int = 3):
    q = torch.randn(2, math.prod(q_grid), heads * d, dtype=torch.double)
    k = torch.randn(2, math.prod(k_grid), heads * d, dtype=torch.double)
    return FactoredScores(q.requires_grad_(), k.requires_grad_(), heads)


def assert_same(actual, expected, tolerance=1e-10):
    scale = expected.abs().max().clamp(min=1e-3)
    assert ((actual - expected).abs().max() / scale).item() <= tolerance


@pytest.mark.parametrize('q_grid, k_grid', GRIDS)
def test_mixing_equals_the_formula_in_both_representations(q_grid, k_grid):
    """Psi(Theta(S)^T)^T with dense matrices, values and gradients."""
    torch.manual_seed(0)
    theta, psi = random_mix((2, 2)), random_mix((4, 4))
    factors = random_factors(2, q_grid, k_grid)
    leaves = [factors.q, factors.k, theta.weight, psi.weight]

    s = factors.dense()
    expected = dense_mix(psi, q_grid) @ (dense_mix(theta, k_grid) @ s.mT).mT
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weight).sum(), leaves)

    for scores in (factors, MaterialisedScores(factors.dense())):
        mixed = scores.mix_tokens(theta, psi, q_grid, k_grid).dense()
        assert_same(mixed, expected)
        for actual, grad in zip(
                torch.autograd.grad((mixed * weight).sum(), leaves), grads):
            assert_same(actual, grad)


def test_mixing_of_a_hand_computed_example():
    """2 queries, 2 keys: S = [[1, 2], [3, 4]].

    Theta = [[1, 1], [0, 1]] sends the rows of S to [s1 + s2, s2], so
    Theta(S) = [[3, 2], [7, 4]]; Psi = [[1, 0], [2, 1]] then acts on the
    columns: the second row becomes 2 * first + second = [13, 8].
    """
    theta, psi = TokenMix((1, 2)), TokenMix((1, 2))
    with torch.no_grad():
        theta.weight.copy_(torch.tensor([[0., 1.], [0., 0.]]))
        psi.weight.copy_(torch.tensor([[0., 0.], [2., 0.]]))
    s = torch.tensor([[[[1., 2.], [3., 4.]]]])
    expected = torch.tensor([[[[3., 2.], [13., 8.]]]])
    mixed = MaterialisedScores(s).mix_tokens(theta, psi, (1, 2), (1, 2))
    assert torch.equal(mixed.dense(), expected)
    # The same S as Q K^T with K = I.
    mixed = FactoredScores(s[0], torch.eye(2)[None], 1).mix_tokens(
        theta, psi, (1, 2), (1, 2))
    assert torch.equal(mixed.dense(), expected)


def test_downsampling_of_a_hand_computed_example():
    """Two heads to one, a 3 x 3 query grid of one key, stride 2.

    Head 0 counts 1..9, its kernel takes the centre: the corners 1, 3, 7, 9.
    Head 1 is all ones, its kernel sums the window: 4 of 9 cells lie inside at
    every corner. The new head is 10 * head 0 - head 1.
    """
    downsample = AttentionDownsample(2, 1, 2)
    with torch.no_grad():
        downsample.depthwise.zero_()
        downsample.depthwise[0, 0, 1, 1] = 1
        downsample.depthwise[1] = 1
        downsample.mix.copy_(torch.tensor([[10., -1.]]))
    heads = torch.stack([torch.arange(1., 10.), torch.ones(9)])
    expected = torch.tensor([6., 26., 66., 86.])
    # (B, heads, N, M) = (1, 2, 9, 1)
    scores = downsample(MaterialisedScores(heads[None, ..., None]), (3, 3))
    assert torch.equal(scores.dense(), expected[None, None, :, None])
    # Width 1 per head, all keys 1.
    factors = FactoredScores(heads.T[None], torch.ones(1, 1, 2), 2)
    assert torch.equal(
        downsample(factors, (3, 3)).dense(), expected[None, None, :, None])


@pytest.mark.parametrize('q_grid, k_grid', GRIDS)
def test_downsampling_is_the_same_in_both_representations(q_grid, k_grid):
    """Twice, so that scores with mixed heads are downsampled too."""
    torch.manual_seed(0)
    factors = random_factors(2, q_grid, k_grid)
    first, second = (AttentionDownsample(2, 3, 2).double(),
                     AttentionDownsample(3, 5, 2).double())
    for module in (first, second):
        nn.init.normal_(module.depthwise)
        nn.init.normal_(module.mix)
    leaves = [factors.q, factors.k, *first.parameters(), *second.parameters()]
    half = tuple(-(-size // 2) for size in q_grid)

    results = []
    for scores in (factors, MaterialisedScores(factors.dense())):
        out = second(first(scores, q_grid), half).dense()
        torch.manual_seed(1)
        results.append(
            (out,
             torch.autograd.grad((out * torch.randn_like(out)).sum(), leaves)))
    (actual, grads), (expected, expected_grads) = results
    assert actual.shape[1] == 5
    assert actual.shape[2] == math.prod(-(-size // 2) for size in half)
    assert_same(actual, expected)
    for grad, expected_grad in zip(grads, expected_grads):
        assert_same(grad, expected_grad)


def test_downsampling_starts_with_the_old_heads():
    """A constant map stays what it is, and no old head is lost."""
    downsample = AttentionDownsample(5, 7, 2)
    heads = torch.arange(5.)[None, :, None, None].expand(1, 5, 36, 2)
    scores = downsample(MaterialisedScores(heads), (6, 6)).dense()
    inner = scores.unflatten(2, (3, 3))[0, :, 1:, 1:]
    source = inner.amax((1, 2, 3))
    torch.testing.assert_close(source, torch.tensor([0., 0, 1, 2, 2, 3, 4]))
    torch.testing.assert_close(inner.amin((1, 2, 3)), source)


def build(cls, path='auto', **kwargs):
    return cls(
        12, 3, 2, None, 0., 0., LN, path, qkv_bias=True, **kwargs).double()


@pytest.mark.parametrize('path', ['auto', 'factored', 'materialised'])
def test_vanilla_attention_is_softmax_attention(path):
    """Against torch's own multi-head attention on the reduced tokens."""
    torch.manual_seed(0)
    attn = build(VanillaAttention, path)
    x = torch.randn(2, 35, 12, dtype=torch.double)
    reference = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(
            torch.cat([attn.q.weight, attn.kv.weight]))
        reference.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.kv.bias]))
        reference.out_proj.load_state_dict(attn.proj.state_dict())
        reduced = attn.reduce(x, (7, 5))
        # 7 x 5 queries are padded to 8 x 6 for ratio 2.
        assert reduced.shape == (2, 4 * 3, 12)
        expected = reference(x, reduced, reduced)[0]
        actual, _ = attn(x, (7, 5), LayerScores())
    assert_same(actual, expected)


def test_spatial_reduction_pads_with_zeros_at_the_bottom_and_right():
    attn = build(VanillaAttention)
    x = torch.randn(1, 35, 12, dtype=torch.double)
    padded = torch.zeros(1, 8, 6, 12, dtype=torch.double)
    padded[:, :7, :5] = x.view(1, 7, 5, 12)
    torch.testing.assert_close(
        attn.reduce(x, (7, 5)), attn.reduce(padded.flatten(1, 2), (8, 6)))


@pytest.mark.parametrize('path', ['auto', 'factored', 'materialised'])
@pytest.mark.parametrize('grid', [(4, 4), (8, 8), (7, 5)])
def test_fresh_less_attention_repeats_its_predecessor(path, grid):
    torch.manual_seed(0)
    x = torch.randn(2, math.prod(grid), 12, dtype=torch.double)
    va = build(VanillaAttention, path)
    la = build(LessAttention, path, q_base_grid=(4, 4), k_base_grid=(2, 2))
    with torch.no_grad():
        _, before = va(x, grid, LayerScores())
        out, after = la(torch.randn_like(x), grid, before)
    assert_same(after.dense(), before.dense(), 0)
    assert out.shape == x.shape

    nn.init.normal_(la.theta.weight)
    with torch.no_grad():
        _, after = la(x, grid, before)
    assert (after.dense() - before.dense()).abs().max() > 1e-2


def test_pooled_values_are_means_of_the_windows():
    la = build(LessAttention, q_base_grid=(4, 4), k_base_grid=(2, 2),
               reduction='pool')
    assert not any('reduction' in name for name, _ in la.named_parameters())
    x = torch.randn(1, 35, 12, dtype=torch.double)
    rows = x.view(7, 5, 12)
    expected = torch.stack([
        rows[i:i + 2, j:j + 2].mean((0, 1)) for i in range(0, 7, 2)
        for j in range(0, 5, 2)
    ])
    torch.testing.assert_close(la.reduce(x, (7, 5))[0], expected)


@pytest.mark.parametrize('grid, most, ratio', [
    ((14, 14), 7, 2), ((15, 3), 7, 4), ((28, 9), 7, 4), ((29, 9), 7, 6),
    ((50, 84), 14, 6), ((5, 5), 1, 6)])
def test_max_key_grid_pools_before_the_reduction(grid, most, ratio):
    """Square windows, the smallest multiple of the ratio that suffices."""
    attn = build(VanillaAttention)
    attn.max_key_grid = most
    assert attn.ratio(grid) == ratio
    assert max(attn.key_grid(grid)) <= most
    x = torch.randn(1, math.prod(grid), 12, dtype=torch.double)
    step = ratio // 2
    rows = x.view(*grid, 12)
    pooled = torch.stack([
        rows[i:i + step, j:j + step].mean((0, 1))
        for i in range(0, grid[0], step) for j in range(0, grid[1], step)
    ])[None]
    pooled_grid = tuple(math.ceil(size / step) for size in grid)
    reduced = attn.reduce(x, grid)
    assert reduced.shape[1] == math.prod(attn.key_grid(grid))
    torch.testing.assert_close(reduced, attn.reduction(pooled, pooled_grid))


def test_less_attention_projects_neither_q_nor_k():
    la = build(LessAttention, q_base_grid=(4, 4), k_base_grid=(2, 2))
    names = {name.split('.')[0] for name, _ in la.named_parameters()}
    assert names == {'reduction', 'proj', 'v', 'theta', 'psi'}


@pytest.mark.parametrize('path', ['auto', 'factored'])
def test_own_and_inherited_scores_are_summed(path):
    """softmax(S_own + S_inherited) V, whichever way it is computed."""
    torch.manual_seed(0)
    va = build(VanillaAttention, path)
    x = torch.randn(2, 16, 12, dtype=torch.double)
    source = random_factors(2, (8, 8), (2, 2))
    downsample = AttentionDownsample(2, 3, 2).double()
    nn.init.normal_(downsample.mix)
    with torch.no_grad():
        inherited = downsample(source, (8, 8))
        out, scores = va(x, (4, 4), LayerScores(inherited=inherited))
        v = va.kv(va.reduce(x, (4, 4)))[..., 12:].unflatten(2, (3, 4))
        probs = (scores.own.dense() + inherited.dense()).softmax(-1)
        expected = va.proj(merge_heads(probs @ v.transpose(1, 2)))
    assert_same(out, expected)
    assert scores.to_next_stage() is scores.own
