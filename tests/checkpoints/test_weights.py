"""The weights in checkpoints/, and what names them."""
import hashlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS
from mmpretrain import ModelHub, list_models

from mmlavit.analysis.building import build_model
from mmlavit.engine.safe_loading import load_from_local

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / 'checkpoints').glob('*.pth'))
PAGE = ROOT / 'docs/reports/tiny_imagenet.md'
ROWS = [row for table in yaml.safe_load(
    (ROOT / 'configs/published.yml').read_text()).values()
    if isinstance(table, list) for row in table
    if 'weights' in row.get('trained', {})]


def test_files_are_small_and_each_has_a_row():
    assert 0 < sum(path.stat().st_size for path in FILES) <= 8e6
    assert {f'checkpoints/{path.name}' for path in FILES} == {
        row['trained']['weights'] for row in ROWS}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_name_and_page_have_the_hash(path):
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stem.endswith(f'-{sha[:8]}')
    assert f'`{sha}`' in PAGE.read_text()


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row['model'])
def test_figures_are_those_of_the_file(row):
    meta = load_from_local(str(ROOT / row['trained']['weights']))['meta']
    top1 = row['trained']['top1']
    assert 'work_dir = ' not in meta['cfg']  # a path of somebody's machine
    # The figures are from before the weights were halved.
    assert top1 == pytest.approx(meta['figures']['accuracy/top1'], abs=.15)
    assert re.search(rf'\| {re.escape(row["model"])} \|.*\| {top1} \|', PAGE.read_text())
    model = build_model(Config.fromstring(meta['cfg'], '.py'))
    ours = build_model(Config.fromfile(ROOT / 'configs' / row['config']))
    assert str(model) == str(ours)


@pytest.mark.parametrize('path', [
    path for path in (ROOT / 'configs').glob('*.py')
    if 'checkpoints/' in path.read_text()], ids=lambda path: path.stem)
def test_configs_begin_from_the_weights(path):
    config = Config.fromfile(path)
    backbone = MODELS.build(config.model.backbone)
    backbone.init_weights()
    file = Path(config.model.backbone.init_cfg.checkpoint).resolve()
    assert file in FILES
    saved = load_from_local(str(file))['state_dict']
    own = backbone.state_dict()
    assert {f'backbone.{name}' for name in own} == {
        name for name in saved if name.startswith('backbone.')}
    for name, value in own.items():
        torch.testing.assert_close(value, saved[f'backbone.{name}'].float(), rtol=0,
                                   atol=0)


def test_mmpretrain_finds_them_by_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ModelHub, '_models_dict', dict(ModelHub._models_dict))
    code = next(code for code in re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.S)
                if 'ModelHub' in code)
    found = {}
    exec(code, found)
    assert 'lavit_n_tin100' in list_models('*lavit*')
    saved = load_from_local(ROWS[0]['trained']['weights'])['state_dict']
    for name, value in found['model'].state_dict().items():
        torch.testing.assert_close(value, saved[name].float(), rtol=0, atol=0)
