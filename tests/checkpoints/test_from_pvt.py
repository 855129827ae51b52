"""tools/convert_pvt.py: PVTv2's weights written as a LaViT's."""
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from builders import authors_names, stock_pvt
from mmlavit import LaViT
from mmlavit.checkpoints.from_pvt import convert, convert_file
from mmlavit.models.backbones.arch import ARCHS

ROOT = Path(__file__).parents[2]
SMALL = dict(
    ARCHS['pvtv2_b0'],
    embed_dims=(8, 16, 40, 64),
    depths=(1, 2, 3, 2),
    num_va_layers=(1, 2, 1, 1))


@pytest.fixture
def weights() -> dict:
    """The authors', small."""
    pvt = stock_pvt(SMALL).float().state_dict()
    return dict(authors_names(pvt), **{'head.weight': torch.ones(3, 64)})


def test_what_is_converted_is_what_loading_converts(weights):
    model = LaViT(SMALL)
    found = convert(weights, model)
    model.load_state_dict(weights, strict=False)
    assert found.naming == 'the authors'
    assert found.dropped == {'stages.2.blocks.1', 'stages.2.blocks.2',
                             'stages.3.blocks.1'}
    assert found.missing == {f'{layer}.attn.{mix}.weight' for layer in
                             found.dropped for mix in ('theta', 'psi')}
    assert found.unused == {
        f'{layer}.attn.{part}.{kind}' for layer in found.dropped
        for part in ('q', 'kv') for kind in ('weight', 'bias')}
    for name, x in found.weights.items():
        assert torch.equal(model.state_dict()[name], x), name


def test_without_less_attention_nothing_is_lost(weights):
    model = LaViT(SMALL, num_va_layers=SMALL['depths'])
    found = convert(weights, model)
    assert found.weights.keys() == model.state_dict().keys()
    assert not found.dropped and not found.missing and not found.unused


def test_what_differs_in_size_is_cropped_or_initial_and_reported(weights):
    """As in T, S and B: other widths, other depths, no VA layer in stage 4."""
    arch = dict(embed_dims=(12, 16, 40, 56), num_heads=(1, 2, 5, 7),
                depths=(1, 2, 4, 2), num_va_layers=(1, 2, 2, 0))
    model = LaViT(arch, out_indices=(3, ))
    own = model.state_dict()
    found = convert(weights, model)
    for name, x in found.weights.items():
        assert x.shape == own[name].shape, name
    assert found.missing == {
        name for name in own if 'theta' in name or 'psi' in name
        or 'downsample' in name}
    # Keys and values are cropped each for itself; what is new begins as it would.
    name = 'stages.0.blocks.0.attn.kv.weight'
    kv, ours = weights['block1.0.attn.kv.weight'], found.weights[name]
    assert torch.equal(ours[:8, :8], kv[:8])
    assert torch.equal(ours[12:20, :8], kv[8:])
    assert torch.equal(ours[8:12], own[name][8:12])
    assert torch.equal(ours[:, 8:], own[name][:, 8:]) and own[name][:, 8:].all()
    # Four layers from three, spread evenly; those of less attention without Q and K.
    for layer, source in enumerate((0, 1, 1, 2)):
        assert torch.equal(found.weights[f'stages.2.blocks.{layer}.ffn.fc2.bias'],
                           weights[f'block3.{source}.mlp.fc2.bias'])
    assert torch.equal(found.weights['stages.2.blocks.3.attn.v.weight'],
                       weights['block3.2.attn.kv.weight'].chunk(2)[1])
    assert torch.equal(found.weights['stages.3.blocks.0.attn.v.weight'],
                       weights['block4.0.attn.kv.weight'].chunk(2)[1][:56, :56])
    assert {'stages.2.blocks.2.attn.q.weight', 'stages.2.blocks.2.attn.kv.weight',
            'stages.3.norm.weight', 'stages.0.norm.weight'} <= found.unused
    assert 'stages.2.blocks.0.attn.kv.weight' not in found.unused


def test_what_is_no_pvtv2_is_refused(weights):
    first_version = {k: x for k, x in weights.items() if 'dwconv' not in k}
    for given in (first_version, LaViT(SMALL).state_dict(), {}):
        with pytest.raises(ValueError, match='expected PVTv2 weights by the names '
                           'of the authors, timm, mmdet or mmpretrain'):
            convert(given, LaViT(SMALL))


@pytest.mark.parametrize('arch, message', [
    ('pvtv2_b1', 'sizes differ: patch_embeds|sizes differ: stages'),
    ('pvtv2_b2', r'has \[2, 2, 2, 2\] layers in its stages: expected \[3, 4, 6, 3\]')])
def test_another_presets_weights_are_refused(arch, message, tmp_path):
    source = tmp_path / 'pvt.pth'
    torch.save(authors_names(stock_pvt(ARCHS['pvtv2_b0']).float().state_dict()), source)
    with pytest.raises(ValueError, match=f'pvt.pth: .*({message})'):
        convert_file(source, tmp_path / 'x.pth', arch)
    assert not (tmp_path / 'x.pth').exists()


@pytest.mark.parametrize('content', [b'', b'text', None])
def test_files_that_cannot_be_converted_are_named(content, tmp_path):
    if content is not None:
        (tmp_path / 'pvt.pth').write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match='pvt.pth: '):
        convert_file(tmp_path / 'pvt.pth', tmp_path / 'x.pth', SMALL)
    assert not (tmp_path / 'x.pth').exists()


@pytest.mark.parametrize('arch', [SMALL, 'tiny'], ids=['its layout', 'tiny'])
@pytest.mark.parametrize('wrap', ['bare', 'model', 'state_dict'])
def test_converted_file_loads_as_a_pre_training(arch, wrap, weights, tmp_path):
    source, target = tmp_path / 'pvt.pth', tmp_path / 'out' / 'lavit.pth'
    torch.save(weights if wrap == 'bare' else {wrap: weights, 'epoch': 1}, source)
    found, total = convert_file(source, target, arch)
    assert len(found.weights) == total - len(found.missing)
    model = LaViT(arch, init_cfg=dict(
        type='Pretrained', checkpoint=str(target), prefix='backbone.'))
    model.init_weights()
    own = model.state_dict()
    assert all(torch.equal(own[name], x) for name, x in found.weights.items())
    assert torch.equal(own['stages.0.blocks.0.ffn.fc2.bias'][:8],
                       weights['block1.0.mlp.fc2.bias'])


def test_the_tool_says_what_it_drops(tmp_path):
    arch = dict(ARCHS['pvtv2_b0'])
    source, target = tmp_path / 'pvt.pth', tmp_path / 'lavit.pth'
    torch.save(authors_names(stock_pvt(arch).float().state_dict()), source)
    command = [sys.executable, ROOT / 'tools/convert_pvt.py', source, target,
               '--arch', 'pvtv2_b0']
    out = subprocess.run(command, check=True, text=True,
                         stdout=subprocess.PIPE).stdout
    assert 'lavit.pth: 172 of 176 tensors; names as those of the authors\n' in out
    assert ('Q and K dropped, Theta and Psi at the identity (2):\n'
            '  stages.2.blocks.1\n  stages.3.blocks.1\n') in out
    assert torch.load(target)['meta'] == dict(
        source='pvt.pth', arch='pvtv2_b0', num_va_layers=(2, 2, 1, 1))


def test_the_tool_fits_what_it_drops(tmp_path):
    source, target = tmp_path / 'pvt.pth', tmp_path / 'lavit.pth'
    torch.save(stock_pvt(ARCHS['pvtv2_b0']).float().state_dict(), source)
    for i, image in enumerate(np.random.randint(0, 255, (9, 32, 32, 3), np.uint8)):
        cv2.imwrite(str(tmp_path / f'{i}.png'), image)
    command = [sys.executable, ROOT / 'tools/convert_pvt.py', source, target,
               '--num-va-layers', '2', '2', '2', '1', '--fit', tmp_path, '--arch']
    done = subprocess.run([*command, 'tiny'], text=True, stderr=subprocess.PIPE)
    assert done.returncode == 2 and '--fit with --arch tiny: expected' in done.stderr
    out = subprocess.run([*command, 'pvtv2_b0'], check=True, text=True,
                         stdout=subprocess.PIPE).stdout
    assert 'Q and K dropped, Theta and Psi fitted (1):\n  stages.3.blocks.1\n' in out
    before, after = map(float, re.search(
        r'stages.3.blocks.1: KL divergence of its attention (\S+) before, (\S+) after',
        out).groups())
    assert after < before
    weights = torch.load(target)['state_dict']
    assert weights['backbone.stages.3.blocks.1.attn.psi.weight'].any()
