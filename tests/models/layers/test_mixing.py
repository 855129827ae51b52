"""The switches of ablations: Re-Attention, and every transform in training."""
import pytest
import torch

from builders import randomise, small_lavit
from mmlavit.models.layers.attention import LessAttention
from mmlavit.models.layers.grid import Grids
from mmlavit.models.layers.mixing import ReAttention
from mmlavit.models.layers.scores import FactoredScores, LayerScores


def test_re_attention_of_a_hand_computed_example():
    """Head mixing on the probabilities, then a norm over heads."""
    layer = ReAttention(2)
    layer.mix.data = torch.tensor([[1., 2.], [0., -1.]])
    layer.norm.running_mean.copy_(torch.tensor([1., 0.]))
    layer.norm.running_var.copy_(torch.tensor([4., 1.]))
    layer.norm.eps = 1e-12
    attn = torch.tensor([[[[.75, .25]], [[.5, .5]]]])
    # .75 + 2 * .5 = 1.75 and .25 + 1 = 1.25; minus 1, over 2
    expected = torch.tensor([[[[.375, .125]], [[-.5, -.5]]]])
    torch.testing.assert_close(layer.eval()(attn), expected)


def test_re_attention_layer_is_its_formula_and_starts_as_the_identity():
    attn = LessAttention(
        dims=6, num_heads=2, sr_ratio=1, attn_drop_rate=0., drop_rate=0.,
        norm_cfg=dict(type='LN'), qkv_bias=True, value_reduction='conv',
        q_base_grid=(2, 3), k_base_grid=(2, 3),
        mixing='full', mixing_rank=16, transform='re_attention').double().eval()
    q, k, x = (torch.randn(2, 6, 6).double() for _ in range(3))
    scores = LayerScores(FactoredScores(q, k, 2))
    plain = scores.dense().softmax(-1)
    torch.testing.assert_close(
        attn.probabilities(scores), plain / (1 + 1e-5)**.5)
    randomise(attn)
    out, passed_on = attn(x, Grids((2, 3), 1), scores)
    assert passed_on is scores
    mixed = torch.einsum('hg,bgnm->bhnm', attn.re_attention.mix, plain)
    norm = attn.re_attention.norm
    mixed = (mixed / (1 + norm.eps)**.5 * norm.weight[:, None, None] +
             norm.bias[:, None, None])
    v = attn.v(x).unflatten(2, (2, 3)).transpose(1, 2)
    expected = attn.proj((mixed @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)


BOUNDED = dict(form='bounded')


@pytest.mark.parametrize('options', [
    dict(transform='token_mix', dp_loss=dict()),
    dict(transform='identity', dp_loss=BOUNDED),
    dict(transform='re_attention', dp_loss=BOUNDED),
    dict(mixing='low_rank', mixing_rank=3, dp_loss=dict())])
def test_every_transform_trains_with_dp_loss_and_no_unused_parameters(options):
    model = small_lavit(**options).train()
    outs = model(torch.rand(2, 3, 64, 80))
    (sum(out.square().mean() for out in outs) + model.dp_loss.take()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('size', [(64, 64), (37, 61)])
def test_paths_agree_with_low_rank_mixing(size):
    """The literal N x M matrices of all stages, downsampled ones too."""
    x, outs = torch.rand(2, 3, *size).double(), []
    for path in ('materialised', 'auto', 'factored'):
        model = small_lavit(mixing='low_rank', mixing_rank=3, score_path=path).double()
        assert {len(p.T) for n, p in model.named_parameters()
                if n.endswith(('psi.u', 'theta.v'))} == {3}
        outs.append(model(x))
    for maps in zip(*outs):
        for one in maps[1:]:
            torch.testing.assert_close(one, maps[0], rtol=1e-10, atol=1e-10)
