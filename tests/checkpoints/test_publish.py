"""Published files."""
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope

from builders import ARCH, randomise
from mmlavit import LaViT
from mmlavit.analysis.building import build_model
from mmlavit.checkpoints.publish import MAX_CHANGE, publish
from mmlavit.engine.safe_loading import load_from_local


ROOT = Path(__file__).parents[2]


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
            meta=dict(cfg="a = 1\nload_from = '/home/me/x.pth'\nwork_dir = '/home/me'\n",
                      epoch=3, iter=9,
                      dataset_meta=dict(classes=('x', 'y'))),
            state_dict=weights,
            message_hub=dict(log_scalars=dict(loss=history)),
            optimizer=dict(state={0: torch.rand(1000, 1000)})), path)
    return path


def test_published_file_is_small_hashed_and_plain(trained, tmp_path):
    log = trained.parent / '20250101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('\n'.join(map(json.dumps, (
        {'accuracy/top1': 40., 'step': 2}, {'accuracy/top1': 50., 'step': 3},
        {'loss': 1., 'step': 3}, {'accuracy/top1': 60., 'step': 4}))))
    written = publish(trained, tmp_path / 'out' / 'lavit.pth')
    final, = (tmp_path / 'out').iterdir()
    assert final.samefile(written)
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
    assert '/home/me' not in out
    for word in ("['meta', 'state_dict']", r"'cfg': 'a = 1\n'", "('x', 'y')",
                 "'figures': {'accuracy/top1': 50.0}", "'epoch': 3"):
        assert word in out
    model = LaViT(arch=ARCH, init_cfg=dict(
        type='Pretrained', checkpoint=str(final), prefix='backbone.'))
    model.init_weights()
    state = load_from_local(str(trained))['state_dict']
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f'backbone.{name}'])


def test_mmdetections_inferencer_takes_the_file_alone(digits, tmp_path):
    from mmdet.apis import DetInferencer
    config = Config.fromfile(ROOT / 'configs/retinanet_lavit_n_digits.py')
    config.val_dataloader.dataset.data_root = '/home/me/data/'
    init_default_scope('mmdet')
    model = build_model(config)
    model.init_weights()
    source = tmp_path / 'epoch_1.pth'
    classes = tuple('abcdefghij')
    torch.save(dict(meta=dict(cfg=config.pretty_text, dataset_meta=dict(classes=classes)),
                    state_dict=model.state_dict()), source)
    final = publish(source, tmp_path / 'x.pth')
    text = torch.load(final, weights_only=True)['meta']['cfg']
    assert '/home/me' not in text and str(ROOT) not in text
    assert "data_root='data/'" in text and "'lavit_n_tin100-" in text
    image = str(digits / 'images/val/00000.png')
    alone = DetInferencer(weights=str(final), device='cpu')
    assert alone.visualizer.dataset_meta['classes'] == classes
    given = DetInferencer(str(ROOT / 'configs/retinanet_lavit_n_digits.py'), str(source),
                          device='cpu')
    for each in (alone, given):
        each.model.test_cfg.score_thr = each.model.bbox_head.test_cfg.score_thr = 0.
    ours, theirs = (each(image, no_save_vis=True)['predictions'][0]
                    for each in (alone, given))
    assert len(ours['scores']) > 10 and ours == theirs


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
    final = publish(source, tmp_path / 'x.pth')
    published = torch.load(final, weights_only=True)['state_dict']
    assert set(published) == set(averaged)
    assert all(torch.equal(published[k], averaged[k]) for k in averaged)


def test_results_of_a_test_take_precedence(trained, tmp_path):
    final = publish(trained, tmp_path / 'x.pth', {'AP': .5})
    meta = torch.load(final, weights_only=True)['meta']
    assert meta['figures'] == {'AP': .5}


def test_half_precision_is_half_the_size_and_nearly_the_same(tmp_path):
    config = Config(dict(default_scope='mmpretrain', model=dict(
        type='ImageClassifier', backbone=dict(type='LaViT', arch=ARCH))))
    model = LaViT(arch=ARCH)
    source = tmp_path / 'epoch_1.pth'

    def save() -> dict:
        weights = {f'backbone.{k}': v for k, v in model.state_dict().items()}
        torch.save(dict(meta=dict(cfg=config.pretty_text), state_dict=weights), source)

    save()
    whole, half = (publish(source, tmp_path / 'x.pth', {}, half) for half in (False, True))
    assert .45 < half.stat().st_size / whole.stat().st_size < .7
    loaded = LaViT(arch=ARCH, init_cfg=dict(
        type='Pretrained', checkpoint=str(half), prefix='backbone.'))
    loaded.init_weights()
    assert {x.dtype for x in loaded.parameters()} == {torch.float32}
    x = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(loaded.eval()(x), model.eval()(x)):
        change = (ours - theirs).abs().max() / theirs.abs().max()
        assert 0 < change < MAX_CHANGE
    # In the last stage, so that the other maps stay as they are.
    norm = model.state_dict()['stages.3.norm.weight']
    norm *= 1e-9  # 0 in float16
    save()
    with pytest.raises(ValueError, match='half: float16 weights change the maps by 1 of'):
        publish(source, tmp_path / 'y.pth', {}, half=True)
    norm[0] = 1e9
    save()
    with pytest.raises(ValueError, match='half: backbone.stages.3.norm.weight has values '
                       'of up to 1e[+]09, beyond float16'):
        publish(source, tmp_path / 'y.pth', {}, half=True)


def test_half_precision_asks_for_a_config_that_builds_the_model(trained, tmp_path):
    with pytest.raises(ValueError, match='half: the maps cannot be compared'):
        publish(trained, tmp_path / 'y.pth', half=True)


def test_files_that_cannot_be_published_are_named(tmp_path):
    path = tmp_path / 'x.pth'
    path.write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match='x.pth: this is no checkpoint'):
        publish(path, tmp_path / 'y.pth')
    torch.save(dict(a=1), path)
    with pytest.raises(ValueError, match='x.pth: no state_dict'):
        publish(path, tmp_path / 'y.pth')
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']


def test_results_that_are_no_json_are_named(trained, tmp_path):
    (tmp_path / 'result.json').write_text('accuracy: 1')
    tool = Path(__file__).parents[2] / 'tools/publish_model.py'
    done = subprocess.run(
        [sys.executable, tool, trained, tmp_path / 'y.pth', '--results',
         tmp_path / 'result.json'], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'result.json: expected JSON of tools/test.py' in done.stderr.splitlines()[-1]
