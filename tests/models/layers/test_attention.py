"""The attention against the formulas, written out independently."""
import math

import pytest
import torch
from torch import nn

from builders import check_mean
from literal import dense_mix, with_extra
from mmlavit.models.layers.attend import MAX_BUILT_SCORES
from mmlavit.models.layers.attention import LessAttention, VanillaAttention
from mmlavit.models.layers.grid import Grids, merge_heads
from mmlavit.models.layers.mixing import LowRankMix, TokenMix
from mmlavit.models.layers.scores import (AttentionDownsample, FactoredScores,
                                          LayerScores, MaterialisedScores)

LN = dict(type='LN', eps=1e-6)
# (query grid, key grid): the base grids, larger, odd, non-square, tiny.
GRIDS = [((4, 4), (2, 2)), ((8, 8), (4, 4)), ((7, 5), (4, 3)),
         ((3, 11), (2, 6)), ((1, 1), (1, 1))]  # two rows and columns to a key


def random_mix(base: tuple, kind: type = TokenMix) -> TokenMix:
    mix = kind(base).double()
    for weight in mix.parameters():
        nn.init.normal_(weight, std=0.7)
    return mix


def random_factors(heads: int, q_grid: tuple, k_grid: tuple, d: int = 3,
                   extra: int = 0):
    q = torch.randn(2, extra + math.prod(q_grid), heads * d, dtype=torch.double)
    k = torch.randn(2, extra + math.prod(k_grid), heads * d, dtype=torch.double)
    return FactoredScores(q.requires_grad_(), k.requires_grad_(), heads)


def assert_same(actual, expected, tolerance=1e-10):
    scale = expected.abs().max().clamp(min=1e-3)
    assert ((actual - expected).abs().max() / scale).item() <= tolerance


@pytest.mark.parametrize('extra', [0, 2])
@pytest.mark.parametrize('kind', [TokenMix, LowRankMix])
@pytest.mark.parametrize('q_grid, k_grid', GRIDS)
def test_mixing_equals_the_formula_in_both_representations(q_grid, k_grid, kind,
                                                           extra):
    """Psi(Theta(S)^T)^T with dense matrices, values and gradients."""
    torch.manual_seed(0)
    theta, psi = random_mix((2, 2), kind), random_mix((4, 4), kind)
    factors, grids = (random_factors(2, q_grid, k_grid, extra=extra),
                      Grids(q_grid, 2, extra))
    assert grids.keys == k_grid
    leaves = [factors.q, factors.k, *theta.parameters(), *psi.parameters()]

    s = factors.dense()
    expected = with_extra(dense_mix(psi, q_grid), extra) @ (
        with_extra(dense_mix(theta, k_grid), extra) @ s.mT).mT
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weight).sum(), leaves)

    for scores in (factors, MaterialisedScores(factors.dense())):
        mixed = scores.mix_tokens(theta, psi, grids).dense()
        assert_same(mixed, expected)
        for actual, grad in zip(
                torch.autograd.grad((mixed * weight).sum(), leaves), grads):
            assert_same(actual, grad)


def test_mixing_of_a_hand_computed_example():
    """2 queries, 2 keys: S = [[1, 2], [3, 4]].

    A row of W of (a, b) becomes ((a - b) / 2, (b - a) / 2) / sqrt(2). With
    c = sqrt(2), Theta's W = [[0, 0], [2c, 0]] gives rows (0, 0) and (1, -1), so
    Theta = [[1, 0], [1, 0]] with norms 1: both keys get the first one's scores,
    [[1, 1], [3, 3]]. Psi's W = [[0, 0], [-3c, 3c]] gives (0, 0), (-3, 3), so
    Psi = [[1, 0], [-.6, .8]]: the second query gets -.6 * 1 + .8 * 3 = 1.8.
    """
    theta, psi = TokenMix((1, 2)), TokenMix((1, 2))
    c = math.sqrt(2)
    with torch.no_grad():
        theta.weight.copy_(torch.tensor([[0., 0.], [2 * c, 0.]]))
        psi.weight.copy_(torch.tensor([[0., 0.], [-3 * c, 3 * c]]))
    torch.testing.assert_close(
        psi.matrix(), torch.tensor([[1., 0.], [-.6, .8]]))
    s = torch.tensor([[[[1., 2.], [3., 4.]]]])
    expected = torch.tensor([[[[1., 1.], [1.8, 1.8]]]])
    grids = Grids((1, 2), 1)
    mixed = MaterialisedScores(s).mix_tokens(theta, psi, grids)
    torch.testing.assert_close(mixed.dense(), expected)
    # The same S as Q K^T with K = I.
    mixed = FactoredScores(s[0], torch.eye(2)[None], 1).mix_tokens(
        theta, psi, grids)
    torch.testing.assert_close(mixed.dense(), expected)


@pytest.mark.parametrize('std', [1e-3, 1., 1e3])
def test_low_rank_mixing_bounds_the_size_of_scores_whatever_its_weights(std):
    mix = LowRankMix((7, 7), rank=4)
    for weight in mix.parameters():
        nn.init.normal_(weight, mean=std, std=std)
    with torch.no_grad():
        matrix = mix.matrix()
        x = torch.randn(4, 49, 64)
        torch.testing.assert_close(mix(x, (7, 7)), matrix @ x, rtol=1e-4, atol=1e-4)
        # Rows of U V^T have a mean of zero: the sum of a row is 1 over its scale.
        u, v = mix.u.double(), mix.v.double() / math.sqrt(49 * 4)
        rows = torch.eye(49) + u @ (v - v.mean(0)).T
    torch.testing.assert_close(
        matrix.sum(1).double(), 1 / scales(rows), rtol=1e-3, atol=1e-4)


def scales(rows: torch.Tensor) -> torch.Tensor:
    """What divides rows (n, m), to a norm of 1 and an absolute sum of at most 1.5."""
    norms = rows.norm(dim=1)
    return torch.maximum(norms, rows.abs().sum(1) / 1.5)


@pytest.mark.parametrize('rank', [1, 4, 49])
def test_equal_steps_change_low_rank_mixing_as_much_at_every_rank(rank):
    """And as much as the full mixing: a learning rate means the same to both."""
    full, low_rank = TokenMix((7, 7)), LowRankMix((7, 7), rank)
    nn.init.normal_(full.weight, std=.1)
    nn.init.normal_(low_rank.u, std=.1)
    full, low_rank = (mix.matrix().detach() - torch.eye(49) for mix in (full, low_rank))
    assert .6 < low_rank.norm() / full.norm() < 1.6


def test_low_rank_mixing_begins_as_the_identity_with_a_gradient():
    mix = LowRankMix((4, 4))
    assert mix.rank == 16 and LowRankMix((2, 2)).rank == 4
    x = torch.randn(2, 17, 8)
    assert torch.equal(mix(x, (4, 4), extra=1), x)
    (mix(x, (4, 4), extra=1) * torch.randn_like(x)).sum().backward()
    assert mix.u.grad.abs().min() > 0
    assert mix.v.grad.abs().max() == 0  # from the second step on
    nn.init.normal_(mix.u)
    mix.reset_to_identity()
    assert torch.equal(mix.matrix(), torch.eye(16))


@pytest.mark.parametrize('std', [1e-3, 1., 1e3])
def test_mixing_bounds_the_size_of_scores_whatever_its_weights(std):
    mix = TokenMix((7, 7))
    nn.init.normal_(mix.weight, mean=std, std=std)
    with torch.no_grad():
        matrix = mix.matrix()
        # Of a row at most: a norm of 1, and 1.5 times the largest score, which the
        # signs of the row itself find.
        assert matrix.norm(dim=1).max() < 1.001
        found = mix(matrix.sign().T[None], (7, 7))[0].diagonal()
        assert found.max() < 1.501
        torch.testing.assert_close(
            torch.maximum(matrix.norm(dim=1), found / 1.5), torch.ones(49))
        # What a softmax does not see stays as it is, up to the rows' scales.
        constant = mix(torch.full((1, 49, 1), 5.), (7, 7))[0, :, 0]
    centred = mix.weight - mix.weight.mean(1, keepdim=True)
    torch.testing.assert_close(
        5 / constant, scales(torch.eye(49) + centred.detach() / 7),
        rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize('diagonal', [0., -1e4])  # the second nearly attains the bound
def test_mixing_bounds_the_size_of_scores_on_another_grid(diagonal):
    mix = TokenMix((7, 7))
    nn.init.normal_(mix.weight)
    with torch.no_grad():
        mix.weight += diagonal * torch.eye(49)
        rows = mix(torch.eye(28 * 5)[None], (28, 5))[0]
    assert (2.8 if diagonal else 0) < rows.abs().sum(1).max() < 3.5


def test_downsampling_keeps_the_size_of_scores_and_cannot_vanish():
    downsample = AttentionDownsample(5, 7, 2)
    heads = torch.randn(2, 5, 64, 9)
    before = downsample(MaterialisedScores(heads), (8, 8)).dense()
    with torch.no_grad():
        downsample.depthwise *= 1e-6
        downsample.mix *= 1e4
    after = downsample(MaterialisedScores(heads), (8, 8)).dense()
    torch.testing.assert_close(after, before)


def test_downsampling_of_a_hand_computed_example():
    """Two heads to one, a 3 x 3 query grid of one key, stride 2.

    Head 0 counts 1..9, its kernel takes the centre: the corners 1, 3, 7, 9.
    Head 1 is all ones, its kernel is the mean of the window, of which 4 of 9 cells
    lie inside at every corner: 4 / 9. The new head is .6 * head 0 - .8 * head 1.
    """
    downsample = AttentionDownsample(2, 1, 2)
    with torch.no_grad():
        downsample.depthwise.zero_()
        downsample.depthwise[0, 0, 1, 1] = 2
        downsample.depthwise[1] = 3
        downsample.mix.copy_(torch.tensor([[6., -8.]]))
    heads = torch.stack([torch.arange(1., 10.), torch.ones(9)])
    expected = .6 * torch.tensor([1., 3., 7., 9.]) - .8 * 4 / 9
    # (B, heads, N, M) = (1, 2, 9, 1)
    scores = downsample(MaterialisedScores(heads[None, ..., None]), (3, 3))
    torch.testing.assert_close(scores.dense(), expected[None, None, :, None])
    # Width 1 per head, all keys 1.
    factors = FactoredScores(heads.T[None], torch.ones(1, 1, 2), 2)
    torch.testing.assert_close(
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


COMMON = dict(
    dims=12, num_heads=3, sr_ratio=2, attn_drop_rate=0., drop_rate=0.,
    norm_cfg=LN, qkv_bias=True)


def vanilla(path: str = 'auto') -> VanillaAttention:
    return VanillaAttention(**COMMON, score_path=path).double()


def less(value_reduction: str = 'conv') -> LessAttention:
    return LessAttention(
        **COMMON, value_reduction=value_reduction, transform='token_mix',
        mixing='full', mixing_rank=16,
        q_base_grid=(4, 4), k_base_grid=(2, 2)).double()


@pytest.mark.parametrize('path', ['auto', 'factored', 'materialised'])
def test_vanilla_attention_is_softmax_attention(path):
    """Against torch's own multi-head attention on the reduced tokens."""
    torch.manual_seed(0)
    attn = vanilla(path)
    x = torch.randn(2, 35, 12, dtype=torch.double)
    reference = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(
            torch.cat([attn.q.weight, attn.kv.weight]))
        reference.in_proj_bias.copy_(torch.cat([attn.q.bias, attn.kv.bias]))
        reference.out_proj.load_state_dict(attn.proj.state_dict())
        reduced = attn.reduce(x, Grids((7, 5), 2))
        # 7 x 5 queries are padded to 8 x 6 for ratio 2.
        assert reduced.shape == (2, 4 * 3, 12)
        expected = reference(x, reduced, reduced)[0]
        actual, _ = attn(x, Grids((7, 5), 2), LayerScores())
    assert_same(actual, expected)


def test_spatial_reduction_pads_with_zeros_at_the_bottom_and_right():
    attn = vanilla()
    x = torch.randn(1, 35, 12, dtype=torch.double)
    padded = torch.zeros(1, 8, 6, 12, dtype=torch.double)
    padded[:, :7, :5] = x.view(1, 7, 5, 12)
    torch.testing.assert_close(
        attn.reduce(x, Grids((7, 5), 2)), attn.reduce(padded.flatten(1, 2), Grids((8, 6), 2)))


@pytest.mark.parametrize('path', ['auto', 'factored', 'materialised'])
@pytest.mark.parametrize('grid', [(4, 4), (8, 8), (7, 5)])
def test_fresh_less_attention_repeats_its_predecessor(path, grid):
    torch.manual_seed(0)
    x = torch.randn(2, math.prod(grid), 12, dtype=torch.double)
    va = vanilla(path)
    la = less()
    with torch.no_grad():
        _, before = va(x, Grids(grid, 2), LayerScores())
        out, after = la(torch.randn_like(x), Grids(grid, 2), before)
    assert_same(after.dense(), before.dense(), 0)
    assert out.shape == x.shape

    nn.init.normal_(la.theta.weight)
    with torch.no_grad():
        _, after = la(x, Grids(grid, 2), before)
    assert (after.dense() - before.dense()).abs().max() > 1e-2


def test_pooled_values_are_means_of_the_windows():
    la = less('pool')
    assert not any('reduction' in name for name, _ in la.named_parameters())
    x = torch.randn(1, 35, 12, dtype=torch.double)
    rows = x.view(7, 5, 12)
    expected = torch.stack([
        rows[i:i + 2, j:j + 2].mean((0, 1)) for i in range(0, 7, 2)
        for j in range(0, 5, 2)
    ])
    torch.testing.assert_close(la.reduce(x, Grids((7, 5), 2))[0], expected)


@pytest.mark.parametrize('grid, most, ratio', [
    ((14, 14), 7, 2), ((15, 3), 7, 4), ((28, 9), 7, 4), ((29, 9), 7, 6),
    ((50, 84), 14, 6), ((5, 5), 1, 6)])
def test_max_key_grid_pools_before_the_reduction(grid, most, ratio):
    """Square windows, the smallest multiple of the ratio that suffices."""
    attn = vanilla()
    grids = Grids.of(grid, 2, most)
    assert grids.ratio == ratio
    assert max(grids.keys) <= most
    x = torch.randn(1, math.prod(grid), 12, dtype=torch.double)
    step = ratio // 2
    rows = x.view(*grid, 12)
    pooled = torch.stack([
        rows[i:i + step, j:j + step].mean((0, 1))
        for i in range(0, grid[0], step) for j in range(0, grid[1], step)
    ])[None]
    pooled_grid = tuple(math.ceil(size / step) for size in grid)
    reduced = attn.reduce(x, grids)
    assert reduced.shape[1] == math.prod(grids.keys)
    torch.testing.assert_close(reduced, attn.reduction(pooled, pooled_grid))


def test_less_attention_projects_neither_q_nor_k():
    la = less()
    names = {name.split('.')[0] for name, _ in la.named_parameters()}
    assert names == {'reduction', 'proj', 'v', 'theta', 'psi'}


@pytest.mark.parametrize('most', [1, 2**20], ids=['in pieces', 'at once'])
@pytest.mark.parametrize('form', ['factored', 'materialised'])
@pytest.mark.parametrize('parts', [('own', ), ('inherited', ), ('own', 'inherited')])
def test_dropout_has_the_mean_of_the_map(parts, form, most, monkeypatch):
    monkeypatch.setitem(MAX_BUILT_SCORES, 'cpu', most)
    made = {part: random_factors(2, (4, 4), (2, 2)) for part in parts}
    scores = LayerScores(**{
        part: x if form == 'factored' else MaterialisedScores(x.dense())
        for part, x in made.items()})
    v = torch.randn(2, 2, 4, 3, dtype=torch.double)
    with torch.no_grad():
        check_mean(torch.stack([scores.attend(v, .3) for _ in range(400)]),
                   scores.attend(v, 0.))


@pytest.mark.parametrize('path', ['auto', 'factored'])
def test_own_and_inherited_scores_are_summed(path):
    """softmax(S_own + S_inherited) V, whichever way it is computed."""
    torch.manual_seed(0)
    va = vanilla(path)
    x = torch.randn(2, 16, 12, dtype=torch.double)
    source = random_factors(2, (8, 8), (2, 2))
    downsample = AttentionDownsample(2, 3, 2).double()
    nn.init.normal_(downsample.mix)
    with torch.no_grad():
        inherited = downsample(source, (8, 8))
        out, scores = va(x, Grids((4, 4), 2), LayerScores(inherited=inherited))
        v = va.kv(va.reduce(x, Grids((4, 4), 2)))[..., 12:].unflatten(2, (3, 4))
        probs = (scores.own.dense() + inherited.dense()).softmax(-1)
        expected = va.proj(merge_heads(probs @ v.transpose(1, 2)))
    assert_same(out, expected)
    assert scores.to_next_stage() is scores.own
