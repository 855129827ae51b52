"""A trained model converted, fine-tuned and tested: tools/less_attention.py."""
import csv
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import mmlavit.analysis.conversion as conversion
from builders import digits_config, make_runner, train
from mmlavit.analysis.conversion import (Conversion, convert_and_tune,
                                         with_less_attention)

TOOL = Path(__file__).parents[2] / 'tools/less_attention.py'
VIT = dict(
    type='VisionTransformer', img_size=32, patch_size=8,
    arch=dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=32))
HOW = Conversion(layers=[2, 3], num_layers=None, min_similarity=.8, mixing='full',
                 epochs=1, lr=1e-4, rounds=2, control=True)


def vit_config(digits) -> Config:
    config = digits_config(
        digits, model__backbone=VIT, model__neck=None,
        train_cfg__max_epochs=1)
    loader = config.train_dataloader.copy()
    loader.sampler = dict(type='DefaultSampler', shuffle=False)
    evaluator = dict(type='Accuracy', topk=(1, ))
    config.update(
        model=dict(config.model, head=dict(
            type='VisionTransformerClsHead', num_classes=10, in_channels=32, topk=(1, ))),
        val_dataloader=loader, test_dataloader=loader, val_cfg=dict(), test_cfg=dict(),
        val_evaluator=evaluator, test_evaluator=evaluator)
    config.model.backbone.pop('pretrain_img_size', None)
    config.model.backbone.pop('out_indices', None)
    return config


@pytest.fixture
def initial(digits, tmp_path) -> tuple:
    """Paths of a config and of initial weights."""
    config = vit_config(digits)
    model = make_runner(config, tmp_path / 'initial').model
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'initial.pth')
    config.dump(tmp_path / 'stock.py')
    return tmp_path / 'stock.py', tmp_path / 'initial.pth'


def call(monkeypatch, *args) -> None:
    """The tool, in this process."""
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, args)])
    runpy.run_path(str(TOOL), run_name='__main__')


def test_accuracy_before_and_after(digits, tmp_path):
    config = vit_config(digits)
    weights = train(config, tmp_path / 'train')
    rows = convert_and_tune(config, str(tmp_path / 'train/epoch_1.pth'), tmp_path / 'la',
                            HOW)
    assert [row['model'] for row in rows] == [
        'trained', 'trained on, 1 epochs', 'converted', 'fine-tuned, 1 epochs']
    assert all(0 <= float(row['accuracy/top1']) <= 100 for row in rows)
    assert rows[0]['speed ratio'] == rows[1]['speed ratio'] == '1.00'
    assert float(rows[2]['backbone, ms']) > 0
    # What was written is the model that was measured, from the trained weights.
    converted = Config.fromfile(tmp_path / 'la/config.py')
    assert converted.custom_imports['imports'][-1].endswith('la_vit')
    model = MODELS.build(converted.model.backbone)
    model.load_state_dict({n[9:]: x for n, x in weights.items()
                           if n.startswith('backbone.')})
    q = weights['backbone.layers.3.attn.qkv.weight']
    assert torch.equal(model.layers[3].attn.qkv.v.weight, q[64:])
    assert torch.equal(model.layers[3].attn.qkv.psi.matrix(), torch.eye(16))
    tuned = torch.load(tmp_path / 'la/tuned/epoch_1.pth', weights_only=False)
    assert tuned['state_dict']['backbone.layers.3.attn.qkv.theta.weight'].abs().max() > 0


def test_tool_chooses_layers_and_writes_a_table(initial, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    call(monkeypatch, *initial, '--out', out, '--num-layers', 1, '--min-similarity', 0,
         '--epochs', 0, '--rounds', 0, '--seed', 7, '--mixing', 'low_rank')
    printed = capsys.readouterr().out
    assert 'chosen: 3 (' in printed
    config = Config.fromfile(out / 'config.py')
    assert config.model.backbone.la_layers == [3] and config.randomness.seed == 7
    assert config.model.backbone.mixing == 'low_rank'
    trained, converted = csv.DictReader(open(out / 'table.csv'))
    assert (trained['model'], converted['model']) == ('trained', 'converted')
    assert float(converted['parameters, M']) <= float(trained['parameters, M'])
    assert re.search(fr"\| trained +\| {trained['accuracy/top1']} ", printed)
    assert not (out / 'tuned').exists() and not (out / 'control').exists()
    # A model that has less attention already is given other layers.
    assert with_less_attention(config, [1], 'full').model.backbone.la_layers == [1]


@pytest.mark.parametrize('args, message', [
    (['no.py', 'x.pth'], 'no.py: no such config'),
    ([TOOL, 'x.pth', '--rounds', 1], '--rounds 1: at least 2, or 0'),
    ([TOOL, 'x.pth', '--epochs', -1], '--epochs -1: at least 0'),
    ([TOOL, 'x.pth', '--epochs', 0, '--control'], '--control takes --epochs of at least'),
])
def test_tool_names_wrong_arguments(args, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        call(monkeypatch, *args)
    assert done.value.code == 2 and message in capsys.readouterr().err


def test_what_cannot_work_ends_before_anything_is_tested_or_trained(
        initial, tmp_path, monkeypatch):
    for name in ('test', 'train'):
        monkeypatch.setattr(conversion.Runner, name, None)
    path, weights = initial
    for options, message in (
        (['--layers', 0], r'layers.0 \(0\) is the first of its stage'),
        (['--layers', 9], 'at most 3'),
        (['--min-similarity', 1.5], 'the largest similarity of a layer'),
        (['--num-layers', 0], 'num_layers=0')):
        with pytest.raises(SystemExit, match=message):
            call(monkeypatch, path, weights, '--control', '--out', tmp_path / 'out',
                 *options)
    path.write_text(path.read_text() + '\ntrain_cfg = dict(max_iters=4)\n')
    with pytest.raises(SystemExit, match='train_cfg=.*max_iters.*training of max_epochs'):
        call(monkeypatch, path, weights, '--out', tmp_path / 'out')


def test_a_config_without_training_is_named(digits, tmp_path):
    config = vit_config(digits)
    config.pop('train_cfg')
    with pytest.raises(ValueError, match='train_cfg=None: expected a config with a tra'):
        convert_and_tune(config, 'x.pth', tmp_path, HOW)


@pytest.mark.parametrize('backbone', [
    'LaViT', 'mmdet.PyramidVisionTransformerV2', 'DistilledVisionTransformer', 'DeiT3',
    'NoNet'])
def test_backbones_that_cannot_be_converted_are_named(backbone, digits):
    """Subclasses of a stock class would become another network."""
    config = digits_config(digits, model__backbone__type=backbone)
    with pytest.raises(ValueError, match=f"type='{backbone}'.*SwinTransformer of mmpretr"
                       ".*LaViT's presets pvtv2_b0"):
        with_less_attention(config, [1], 'full')
