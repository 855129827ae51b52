"""The ablation switches, and the measures of attention collapse."""
import csv
import json
import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmpretrain.models import VisionTransformer

from builders import ARCH, randomise
from mmlavit import LaViT
from mmlavit.analysis import (Similarity, asymmetry, diagonal_largest,
                              head_similarity, map_similarity,
                              mean_pairwise_cosine, observe_layers)
from mmlavit.attention import (FactoredScores, LayerScores, LessAttention,
                               ReAttention)

ROOT = Path(__file__).parents[1]
tool = runpy.run_path(str(ROOT / 'tools/analyze_attention.py'))


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / 'images' / 'class'
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        cv2.imwrite(str(path / f'{i}.png'),
                    rng.integers(0, 255, (50, 60, 3), np.uint8))
    return path.parent


def build(**kwargs) -> LaViT:
    return randomise(
        LaViT(**{**dict(arch=ARCH, pretrain_img_size=64), **kwargs})).eval()


def observe(model, x) -> list:
    layers = []
    with observe_layers(model, layers.append), torch.no_grad():
        model(x)
    return layers


@pytest.mark.parametrize('path', ['factored', 'materialised'])
def test_identity_repeats_the_map_exactly(path):
    model = build(transform='identity', score_path=path)
    assert not [n for n, _ in model.named_parameters()
                if 'theta' in n or 'psi' in n]
    layers = observe(model, torch.rand(2, 3, 72, 90))
    for before, layer in zip(layers, layers[1:]):
        if layer.kind == 'LA' and layer.stage == before.stage:
            queries = range(layer.grid[0] * layer.grid[1])
            assert torch.equal(
                layer.attention_of(queries), before.attention_of(queries))
    assert sum(layer.kind == 'LA' for layer in layers) == 5


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
        6, 2, 1, None, 0., 0., dict(type='LN'), 'auto', qkv_bias=True,
        q_base_grid=(2, 3), k_base_grid=(2, 3),
        transform='re_attention').double().eval()
    q, k, x = (torch.randn(2, 6, 6).double() for _ in range(3))
    scores = LayerScores(FactoredScores(q, k, 2))
    plain = scores.dense().softmax(-1)
    torch.testing.assert_close(
        attn.probabilities(scores), plain / (1 + 1e-5)**.5)
    randomise(attn)
    out, passed_on = attn(x, (2, 3), scores)
    assert passed_on is scores
    mixed = torch.einsum('hg,bgnm->bhnm', attn.re_attention.mix, plain)
    norm = attn.re_attention.norm
    mixed = (mixed / (1 + norm.eps)**.5 * norm.weight[:, None, None] +
             norm.bias[:, None, None])
    v = attn.v(x).unflatten(2, (2, 3)).transpose(1, 2)
    expected = attn.proj((mixed @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('transform', ['token_mix', 'identity', 're_attention'])
def test_every_transform_trains_with_dp_loss_and_no_unused_parameters(transform):
    model = build(transform=transform, dp_loss=dict()).train()
    outs = model(torch.rand(2, 3, 64, 80))
    (sum(out.square().mean() for out in outs) + model.dp_loss.take()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('path', ['auto', 'factored', 'materialised'])
@pytest.mark.parametrize('transform', ['token_mix', 're_attention'])
def test_observed_maps_are_the_ones_used(path, transform, monkeypatch):
    """Against the literal N x M map of every layer."""
    model = build(score_path=path, transform=transform).double()
    x = torch.rand(2, 3, 100, 75, dtype=torch.double)
    layers = observe(model, x)
    assert [layer.name for layer in layers] == [
        f'stages.{i}.blocks.{j}' for i, n in enumerate(ARCH['depths'])
        for j in range(n)]
    assert [layer.kind for layer in layers if layer.stage == 2] == [
        'VA', 'LA', 'LA']
    for layer in layers:
        attn = model.get_submodule(layer.name).attn
        (h, w), (kh, kw), r = layer.grid, layer.key_grid, layer.ratio
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
    model, x = build(), torch.rand(1, 3, 64, 64)
    before = model(x)
    with observe_layers(model, lambda layer: layer.region_map()):
        during = model(x)
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
    layers, inputs = [], []
    handles = [layer.attn.register_forward_hook(
        lambda m, args, out: inputs.append((m, args[0], out)))
        for layer in vit.layers]
    with observe_layers(vit, layers.append), torch.no_grad():
        vit(torch.rand(2, 3, 64, 64))
    assert [layer.kind for layer in layers] == ['ViT'] * 3
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
        assert layer.grid == (h, w)
        assert layer.tokens.shape == (1, h * w, 8)
        assert layer.region_map().shape == (1, 2, h * w, h * w)


def test_measures_of_hand_computed_examples():
    a = torch.tensor([[[[.6, .4], [.8, .2]]]])
    b = torch.tensor([[[[.8, .2], [.6, .4]]]])
    # columns (.6, .8), (.8, .6): .96; (.4, .2), (.2, .4): .16 / .2 = .8
    assert map_similarity(a, b).item() == pytest.approx((.96 + .8) / 2)
    assert map_similarity(a, a).item() == pytest.approx(1)
    unseen = torch.tensor([[[[1., 0.], [1., 0.]]]])
    assert map_similarity(unseen, unseen).item() == pytest.approx(1)
    both = torch.cat([a, b], 1)
    assert head_similarity(both).item() == pytest.approx((.96 + .8) / 2)
    assert head_similarity(a).isnan()
    # with another number of heads: of the means over heads
    assert map_similarity(both, both.mean(1, keepdim=True)).item() == (
        pytest.approx(1))
    assert asymmetry(a).item() == pytest.approx(.4)
    assert diagonal_largest(a).item() == .5
    tokens = torch.tensor([[1., 0.], [0., 2.], [3., 3.]])
    assert mean_pairwise_cosine(tokens).item() == pytest.approx(
        (0 + .5**.5 + .5**.5) / 3)


def test_similarity_is_averaged_over_images_and_sees_collapse():
    model = randomise(build(transform='identity'), std=1.)
    x = torch.rand(3, 3, 64, 64)
    whole, parts = Similarity(), Similarity()
    with whole.observe(model), torch.no_grad():
        model(x)
    for part in (x[:2], x[2:]):
        with parts.observe(model), torch.no_grad():
            model(part)
    a, b = whole.result(), parts.result()
    assert a['images'] == b['images'] == 3
    for u, v in zip(a['layers'], b['layers']):
        assert u == pytest.approx(v, rel=1e-4, nan_ok=True)
    for i, layer in enumerate(a['layers']):
        collapsed = layer['map_similarity_to_previous']
        if layer['kind'] == 'LA' and a['layers'][i - 1]['stage'] == (
                layer['stage']):
            assert collapsed == pytest.approx(1, abs=1e-5)
    assert min(layer['map_similarity_to_previous'] for layer in a['layers']
               if layer['map_similarity_to_previous'] is not None) < .99
    matrix = np.array(a['map_similarity'], dtype=float)
    assert np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1)


@pytest.mark.parametrize('name, head', [
    ('lavit_t_in1k', 'head=dict(in_channels=32)'),
    ('retinanet_lavit_t_coco', 'neck=dict(in_channels=[16, 24, 32])'),
    ('semantic_fpn_lavit_t_ade20k', 'neck=dict(in_channels=[8, 16, 24, 32])'),
])
def test_tool_writes_measures_and_pictures_of_two_models(
        name, head, folder, tmp_path, capsys):
    """Of every toolbox; one model from a checkpoint, one from none."""
    outs = {'lavit_t_in1k': (3, ), 'retinanet_lavit_t_coco': (1, 2, 3)}.get(
        name, (0, 1, 2, 3))
    for variant, layers in (('la', None), ('va', list(ARCH['depths']))):
        (tmp_path / f'{variant}.py').write_text(
            f"_base_ = {str(ROOT / f'configs/{name}.py')!r}\n"
            "model = dict(backbone=dict(_delete_=True, type='LaViT', "
            f'arch={ARCH}, out_indices={outs}, num_va_layers={layers}), '
            f'{head})\n')
    model = tool['build'](str(tmp_path / 'la.py'), 'none', 'cpu')
    torch.save(dict(state_dict=randomise(model).state_dict()),
               tmp_path / 'la.pth')
    out = tmp_path / 'out'
    tool['main']([
        str(tmp_path / 'la.py'), str(tmp_path / 'la.pth'), str(folder),
        '--compare', str(tmp_path / 'va.py'), 'none', '--size', '64', '90',
        '--out', str(out), '--batch-size', '2', '--heads', '--device', 'cpu'])
    results = json.loads((out / 'similarity.json').read_text())
    assert [results[k]['images'] for k in ('la', 'va')] == [3, 3]
    rows = list(csv.DictReader(open(out / 'similarity.csv')))
    assert [row['kind'] for row in rows] == (
        [layer['kind'] for layer in results['la']['layers']] + ['VA'] * 9)
    # The checkpoint was loaded: its weights' measures, not the initial ones.
    with torch.no_grad():
        similarity = Similarity()
        inputs = tool['prepare'](model, tool['find_images'](folder, 9),
                                 (64, 96))
        with similarity.observe(model):
            model.backbone(inputs)
    assert similarity.result()['layers'][3]['token_similarity'] == (
        pytest.approx(results['la']['layers'][3]['token_similarity'], rel=1e-3))
    for picture in ('similarity', 'attention', 'features'):
        assert cv2.imread(str(out / f'{picture}.png')).std() > 10
    assert 'la: means over 3 images' in capsys.readouterr().out


def test_tool_takes_a_plain_vit(folder, tmp_path):
    (tmp_path / 'deit.py').write_text(
        f"_base_ = {str(ROOT / 'configs/baselines/deit-s_in1k.py')!r}\n"
        'model = dict(backbone=dict(_delete_=True, type="VisionTransformer", '
        'img_size=64, arch=dict(embed_dims=8, num_layers=3, num_heads=2, '
        'feedforward_channels=16)), head=dict(in_channels=8))\n')
    tool['main']([str(tmp_path / 'deit.py'), 'none', str(folder), '--size',
                  '64', '64', '--out', str(tmp_path / 'out'), '--device',
                  'cpu'])
    rows = list(csv.DictReader(open(tmp_path / 'out/similarity.csv')))
    assert [row['kind'] for row in rows] == ['ViT'] * 3
    assert all(float(row['map_similarity_to_previous']) > 0 for row in rows[1:])


def test_tool_names_weights_and_labels_that_do_not_fit(folder, tmp_path, capsys):
    config = str(ROOT / 'configs/lavit_t_in1k.py')
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / 'x.pth')
    with pytest.raises(SystemExit, match='x.pth: none of its weights'):
        tool['build'](config, str(tmp_path / 'x.pth'), 'cpu')
    torch.save({f'backbone.{name}': value for name, value in
                build().state_dict().items()}, tmp_path / 'y.pth')
    with pytest.raises(SystemExit, match='y.pth: LaViT: these are not'):
        tool['build'](config, str(tmp_path / 'y.pth'), 'cpu')
    for labels in (['a'], ['a', 'b', 'c']):
        with pytest.raises(SystemExit):
            tool['parse_args']([config, 'none', str(folder), '--compare', config,
                                'none', '--labels', *labels])
        assert 'expected one for each of the 2' in capsys.readouterr().err


def test_images_are_spread_over_the_folder_and_missing_ones_named(tmp_path):
    for i in range(10):
        (tmp_path / f'{i}.png').touch()
    names = [path.stem for path in tool['find_images'](tmp_path, 6)]
    assert names == ['0', '1', '3', '5', '6', '8']
    assert len(tool['find_images'](tmp_path, 64)) == 10
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit, match='empty: no images there'):
        tool['find_images'](tmp_path / 'empty', 6)
    with pytest.raises(SystemExit, match='0.png: not a readable image'):
        tool['prepare'](None, [tmp_path / '0.png'], (8, 8))
