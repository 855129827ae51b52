"""Layers at work, observed without changing them."""
import math

import pytest
import torch
from mmpretrain.models import VisionTransformer

from builders import ARCH, randomise, small_lavit
from mmlavit.analysis.observe import observe_layers


def observe(model, x) -> list:
    layers = []
    with observe_layers(model, layers.append), torch.no_grad():
        model(x)
    return layers


@pytest.mark.parametrize('path', ['factored', 'materialised'])
def test_identity_repeats_the_map_exactly(path):
    model = small_lavit(transform='identity', score_path=path)
    assert not [n for n, _ in model.named_parameters()
                if 'theta' in n or 'psi' in n]
    layers = observe(model, torch.rand(2, 3, 72, 90))
    for before, layer in zip(layers, layers[1:]):
        if layer.kind == 'LA' and layer.stage == before.stage:
            queries = range(math.prod(layer.grids.queries))
            assert torch.equal(
                layer.attention_of(queries), before.attention_of(queries))
    assert sum(layer.kind == 'LA' for layer in layers) == 5


@pytest.mark.parametrize('path', ['auto', 'factored', 'materialised'])
@pytest.mark.parametrize('transform', ['token_mix', 're_attention'])
def test_observed_maps_are_the_ones_used(path, transform, monkeypatch):
    """Against the literal N x M map of every layer."""
    model = small_lavit(score_path=path, transform=transform).double()
    x = torch.rand(2, 3, 100, 75, dtype=torch.double)
    layers = observe(model, x)
    assert [layer.name for layer in layers] == [
        f'stages.{i}.blocks.{j}' for i, n in enumerate(ARCH['depths'])
        for j in range(n)]
    assert [layer.kind for layer in layers if layer.stage == 2] == [
        'VA', 'LA', 'LA']
    for layer in layers:
        attn = model.get_submodule(layer.name).attn
        (h, w), (kh, kw) = layer.grids.queries, layer.grids.keys
        r = layer.grids.ratio
        full = attn.probabilities(layer.scores).detach()
        assert full.shape[2:] == (h * w, kh * kw)
        torch.testing.assert_close(layer.attention_of([0, w + 1]),
                                   full[:, :, [0, w + 1]])
        images = full.unflatten(2, (h, w))
        pooled = torch.stack([
            images[:, :, y * r:(y + 1) * r, i * r:(i + 1) * r].mean((2, 3))
            for y in range(kh) for i in range(kw)], 2)
        torch.testing.assert_close(layer.region_map(), pooled)


def test_observation_changes_nothing():
    model, x = small_lavit(), torch.rand(1, 3, 64, 64)
    before = model(x)
    attributes = [list(vars(module)) for module in model.modules()]
    with observe_layers(model, lambda layer: layer.region_map()):
        during = model(x)
    assert [list(vars(module)) for module in model.modules()] == attributes
    for a, b, c in zip(before, during, model(x)):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not any(m._forward_hooks or m._forward_pre_hooks
                   for m in model.modules())
    with pytest.raises(TypeError, match='Linear has no layer'):
        with observe_layers(torch.nn.Linear(1, 1), print):
            pass


def test_plain_vit_is_observed():
    vit = randomise(VisionTransformer(
        dict(embed_dims=8, num_layers=3, num_heads=2, feedforward_channels=16),
        img_size=64, patch_size=16, out_type='featmap'))
    vit.eval()  # returns None there
    attributes = [list(vars(module)) for module in vit.modules()]
    layers, inputs = [], []
    handles = [layer.attn.register_forward_hook(
        lambda m, args, out: inputs.append((m, args[0], out)))
        for layer in vit.layers]
    with observe_layers(vit, layers.append), torch.no_grad():
        vit(torch.rand(2, 3, 64, 64))
    assert [list(vars(module)) for module in vit.modules()] == attributes
    assert [layer.kind for layer in layers] == ['VA'] * 3
    for layer, (attn, x, out) in zip(layers, inputs):
        q, k, v = attn.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 2
        whole = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, whole)  # the formula is the module's
        torch.testing.assert_close(layer.region_scores(), scores[..., 1:, 1:])
        torch.testing.assert_close(layer.region_map(),
                                   scores.softmax(-1)[..., 1:, 1:])
        assert layer.tokens.shape == (2, 16, 8)
    [handle.remove() for handle in handles]


@pytest.mark.parametrize('size', [(48, 80), (32, 128)])
def test_plain_vit_is_observed_on_its_own_grid(size):
    """3 x 5 patches and the class token are 16 tokens, but no 4 x 4."""
    vit = VisionTransformer(
        dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=16),
        img_size=size, patch_size=16, out_type='featmap')
    vit.eval()
    layers = []
    with observe_layers(vit, layers.append), torch.no_grad():
        vit(torch.rand(1, 3, *size))
    h, w = (side // 16 for side in size)
    assert [layer.name for layer in layers] == ['layers.0', 'layers.1']
    for layer in layers:
        assert layer.grids.queries == (h, w)
        assert layer.tokens.shape == (1, h * w, 8)
        assert layer.region_map().shape == (1, 2, h * w, h * w)
