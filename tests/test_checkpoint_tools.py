"""tools/publish_model.py and tools/convert_pvt.py."""
import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.backbones.pvt import PyramidVisionTransformerV2
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer

from builders import ARCH, randomise
from mmlavit import LaViT
from mmlavit.attention import to_map
from mmlavit.checkpoints import load_from_local

ROOT = Path(__file__).parents[1]
publish = runpy.run_path(str(ROOT / 'tools/publish_model.py'))
pvt_tool = runpy.run_path(str(ROOT / 'tools/convert_pvt.py'))


@pytest.fixture
def trained(tmp_path) -> Path:
    """A checkpoint as mmengine's training writes it."""
    model = LaViT(arch=ARCH)
    history = HistoryBuffer()
    history.update(1.)
    path = tmp_path / 'run' / 'epoch_3.pth'
    path.parent.mkdir()
    weights = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    torch.save(
        dict(
            meta=dict(cfg='a = 1', epoch=3, iter=9,
                      dataset_meta=dict(classes=('x', 'y'))),
            state_dict=weights,
            message_hub=dict(log_scalars=dict(loss=history)),
            optimizer=dict(state={0: torch.rand(1000, 1000)})), path)
    return path


def test_published_file_is_small_hashed_and_plain(trained, tmp_path, capsys):
    log = trained.parent / '20250101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('\n'.join(map(json.dumps, (
        {'accuracy/top1': 40., 'step': 2}, {'accuracy/top1': 50., 'step': 3},
        {'loss': 1., 'step': 3}, {'accuracy/top1': 60., 'step': 4}))))
    publish['main']([str(trained), str(tmp_path / 'out' / 'lavit.pth')])
    final, = (tmp_path / 'out').iterdir()
    sha = hashlib.sha256(final.read_bytes()).hexdigest()
    assert final.name == f'lavit-{sha[:8]}.pth'
    assert final.stat().st_size < trained.stat().st_size / 2
    # In a process that knows neither mmengine nor mmlavit.
    code = ('import sys, torch; '
            f'x = torch.load({str(final)!r}, weights_only=True); '
            "assert not {'mmengine', 'mmlavit'} & set(sys.modules); "
            "print(sorted(x), x['meta'])")
    out = subprocess.run([sys.executable, '-c', code], check=True, text=True,
                         stdout=subprocess.PIPE).stdout
    for word in ("['meta', 'state_dict']", "'cfg': 'a = 1'", "('x', 'y')",
                 "'accuracy/top1': 50.0", "'epoch': 3"):
        assert word in out
    assert '50.0' in capsys.readouterr().out
    model = LaViT(arch=ARCH, init_cfg=dict(
        type='Pretrained', checkpoint=str(final), prefix='backbone.'))
    model.init_weights()
    state = load_from_local(str(trained))['state_dict']
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f'backbone.{name}'])


def test_the_moving_average_is_published(tmp_path):
    """mmengine's hook puts it where the weights are, for it was validated."""
    model = LaViT(arch=ARCH)
    hook = EMAHook()
    hook.before_run(SimpleNamespace(model=model))
    randomise(model)
    averaged = {k: v + 1 for k, v in model.state_dict().items()}
    hook.ema_model.module.load_state_dict(averaged)
    checkpoint = dict(state_dict=dict(model.state_dict()))
    hook.before_save_checkpoint(SimpleNamespace(model=model), checkpoint)
    source = tmp_path / 'epoch_1.pth'
    torch.save(checkpoint, source)
    final = publish['publish'](source, tmp_path / 'x.pth')
    published = torch.load(final, weights_only=True)['state_dict']
    assert set(published) == set(averaged)
    assert all(torch.equal(published[k], averaged[k]) for k in averaged)


def test_results_of_a_test_take_precedence(trained, tmp_path):
    final = publish['publish'](trained, tmp_path / 'x.pth', {'AP': .5})
    meta = torch.load(final, weights_only=True)['meta']
    assert meta['figures'] == {'AP': .5}


def test_files_that_cannot_be_published_are_named(tmp_path):
    path = tmp_path / 'x.pth'
    path.write_bytes(b'no checkpoint')
    with pytest.raises(SystemExit, match='x.pth: this is no checkpoint'):
        publish['publish'](path, tmp_path / 'y.pth')
    torch.save(dict(a=1), path)
    with pytest.raises(SystemExit, match='x.pth: no state_dict'):
        publish['publish'](path, tmp_path / 'y.pth')
    with pytest.raises(SystemExit, match='z.pth: no such file'):
        publish['main']([str(tmp_path / 'z.pth'), 'out.pth'])
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']


def official_names(model: PyramidVisionTransformerV2) -> dict:
    """mmdet's PVTv2 weights under the names of the official release."""
    out = {}
    for name, value in model.state_dict().items():
        _, stage, part, *rest = name.split('.')
        stage, rest = int(stage) + 1, '.'.join(rest)
        if part == '0':
            out[f'patch_embed{stage}.{rest}'.replace('projection', 'proj')] = (
                value)
        elif part == '2':
            out[f'norm{stage}.{rest}'] = value
        elif 'attn.attn.in_proj' in rest:
            kind = rest.rsplit('_', 1)[1]
            layer = rest.split('.')[0]
            q, k, v = value.chunk(3)
            out[f'block{stage}.{layer}.attn.q.{kind}'] = q
            out[f'block{stage}.{layer}.attn.kv.{kind}'] = torch.cat([k, v])
        else:
            for ours, theirs in (('attn.attn.out_proj', 'attn.proj'),
                                 ('ffn.layers.0', 'mlp.fc1'),
                                 ('ffn.layers.1', 'mlp.dwconv.dwconv'),
                                 ('ffn.layers.4', 'mlp.fc2')):
                rest = rest.replace(ours, theirs)
            if rest.startswith(tuple('0123456789')):
                layer, rest = rest.split('.', 1)
                if 'mlp.fc' in rest and rest.endswith('weight'):
                    value = value.flatten(1)  # 1x1 convolutions in mmdet
                out[f'block{stage}.{layer}.{rest}'] = value
    return out


@pytest.fixture
def pvt() -> PyramidVisionTransformerV2:
    return randomise(
        PyramidVisionTransformerV2(
            embed_dims=8, num_layers=[2, 2, 2, 2], num_heads=[1, 2, 4, 4],
            mlp_ratios=(4, 4, 4, 4), drop_path_rate=0.), std=.1).eval()


def test_converted_stages_compute_what_pvt_computes(pvt):
    """Stage by stage, for PVTv2 normalises between them and LaViT does not."""
    arch = dict(embed_dims=(8, 16, 32, 32), depths=(2, 2, 2, 2),
                num_heads=(1, 2, 4, 4), num_va_layers=(2, 2, 2, 2))
    widths = [layer[2].normalized_shape[0] for layer in pvt.layers]
    arch['embed_dims'] = tuple(widths)
    model = LaViT(arch=arch, attn_residual=False).eval()
    weights = official_names(pvt)
    converted, missing, unused = pvt_tool['convert'](weights, model)
    assert not missing and not unused
    model.load_state_dict(converted)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = pvt(x)
        for i, stage in enumerate(model.stages):
            tokens, _, grid, _ = stage(x, None, None)
            out = to_map(getattr(model, f'norm{i}')(tokens), grid)
            torch.testing.assert_close(out, maps[i], rtol=1e-4, atol=1e-5)
            x = maps[i]


def test_what_differs_is_cropped_or_initial_and_reported(pvt):
    weights = official_names(pvt)
    widths = [layer[2].normalized_shape[0] for layer in pvt.layers]
    arch = dict(embed_dims=(widths[0] + 4, *widths[1:3], widths[3] - 8),
                depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 4),
                num_va_layers=(2, 2, 1, 0))
    model = LaViT(arch=arch)
    converted, missing, unused = pvt_tool['convert'](weights, model)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in converted.items()} == {
        name: shape for name, shape in shapes.items() if name not in missing}
    assert missing == {
        name for name in shapes if 'theta' in name or 'psi' in name
        or 'downsample' in name}
    # Keys and values are cropped each for itself.
    c = widths[0]
    kv, ours = (w[k] for w, k in (
        (weights, 'block1.0.attn.kv.weight'),
        (converted, 'stages.0.blocks.0.attn.kv.weight')))
    assert torch.equal(ours[:c, :c], kv[:c])
    assert torch.equal(ours[c + 4:2 * c + 4, :c], kv[c:])
    initial = model.state_dict()['stages.0.blocks.0.attn.kv.weight']
    assert torch.equal(ours[c:c + 4], initial[c:c + 4])
    assert torch.equal(ours[:, c:], initial[:, c:]) and initial[:, c:].all()
    # A less-attention layer takes the values; its source's keys are unused.
    assert torch.equal(converted['stages.2.blocks.2.attn.v.weight'],
                       weights['block3.1.attn.kv.weight'].chunk(2)[1])
    assert {'block3.1.attn.q.weight', 'block3.1.attn.kv.weight',
            'block4.0.mlp.fc1.weight'} <= unused
    assert 'block3.0.attn.kv.weight' not in unused


@pytest.mark.parametrize('content', [b'', b'text', None])
def test_files_that_cannot_be_converted_are_named(content, tmp_path):
    if content is not None:
        (tmp_path / 'pvt.pth').write_bytes(content)
    with pytest.raises(SystemExit, match='pvt.pth: '):
        pvt_tool['main']([str(tmp_path / 'pvt.pth'), str(tmp_path / 'x.pth')])
    assert not (tmp_path / 'x.pth').exists()


def test_converted_file_loads_as_a_pre_training(pvt, tmp_path, capsys):
    source, target = tmp_path / 'pvt.pth', tmp_path / 'out' / 'lavit.pth'
    torch.save(official_names(pvt), source)
    pvt_tool['main']([str(source), str(target), '--arch', 'tiny'])
    assert 'not used, or only in part' in capsys.readouterr().out
    model = LaViT(arch='tiny', init_cfg=dict(
        type='Pretrained', checkpoint=str(target), prefix='backbone.'))
    model.init_weights()
    assert torch.equal(
        model.stages[0].blocks[0].ffn.fc2.bias[:8],
        official_names(pvt)['block1.0.mlp.fc2.bias'])
    torch.save(dict(a=torch.zeros(1)), source)
    with pytest.raises(SystemExit, match='official PVTv2'):
        pvt_tool['main']([str(source), str(target)])
