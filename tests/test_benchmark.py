"""tools/benchmark.py: what it compares, not how fast that is."""
import argparse
import json
import runpy
from pathlib import Path

import cv2
import pytest
import torch

ROOT = Path(__file__).parents[1]
tool = runpy.run_path(str(ROOT / 'tools/benchmark.py'))


@pytest.mark.parametrize('options', [[], ['--train']])
def test_models_are_compared_in_one_run(options, tmp_path, capsys):
    names = ['LaViT-T', str(ROOT / 'configs/retinanet_lavit_t_coco.py'),
             'ConvNeXt-T']
    tool['main']([*names, '--size', '64', '64', '--batch-size', '2', '--rounds',
                  '2', '--warmup', '0', '--device', 'cpu', '--out',
                  str(tmp_path), *options])
    saved = json.loads((tmp_path / 'benchmark.json').read_text())
    results = saved['results']['64x64']
    assert list(results) == names
    for result in results.values():
        assert result['ms_p10'] <= result['ms'] <= result['ms_p90']
        assert result['ratio_p10'] <= result['ratio'] <= result['ratio_p90']
        assert result['images_per_s'] == pytest.approx(2e3 / result['ms'])
    assert results['LaViT-T']['ratio'] == 1
    # Without a head; the detector's backbone lacks the first stage's norm.
    assert results['LaViT-T']['params_m'] == pytest.approx(10.53, abs=.01)
    assert 0 < results['LaViT-T']['params_m'] - results[names[1]]['params_m'] < (
        1e-3)
    assert results['LaViT-T']['gmacs'] > .1
    assert cv2.imread(str(tmp_path / 'benchmark.png')).std() > 10
    assert 'speed ratio' in capsys.readouterr().out


def test_model_that_fails_is_left_out(tmp_path, capsys):
    fails = tmp_path / 'fails.py'
    fails.write_text(f"_base_ = {str(ROOT / 'configs/retinanet_lavit_t_coco.py')!r}\n"
                     'model = dict(backbone=dict(in_channels=4))')
    options = ['--size', '64', '64', '--batch-size', '1', '--rounds', '2', '--warmup',
               '0', '--no-macs', '--device', 'cpu', '--out', str(tmp_path)]
    tool['main']([str(fails), 'LaViT-T', 'LaViT-T-twin', *options])
    printed = capsys.readouterr().err
    assert 'fails.py is left out: ValueError: LaViT: x.shape=' in printed
    assert 'Ratios are over LaViT-T.' in printed
    saved = json.loads((tmp_path / 'benchmark.json').read_text())
    results = saved['results']['64x64']
    assert list(results) == ['LaViT-T', 'LaViT-T-twin']
    assert results['LaViT-T']['ratio'] == 1
    with pytest.raises(SystemExit, match='No model is left'):
        tool['main']([str(fails), *options])


def test_layer_alone_is_given_what_it_gets_in_the_model():
    model = tool['build']('LaViT-T', argparse.Namespace(
        whole=False, device='cpu', train=False))
    images, seen = torch.rand(1, 3, 64, 96), []
    last = model.stages[3].blocks[1]
    handle = last.register_forward_hook(lambda *_: seen.append(_[2][0]))
    model(images)
    handle.remove()
    layer, inputs = tool['find_layer'](model, 'stages.3.blocks.1', images)
    assert layer is last and torch.allclose(
        layer(*inputs)[0], seen[0], atol=1e-4)
    assert not layer._forward_pre_hooks
    for name, why in (('stages.9', 'has no attribute'),
                      ('stages.3.blocks', 'is not called')):
        with pytest.raises(SystemExit, match=f'--layer {name}: .*{why}'):
            tool['find_layer'](model, name, images)


def test_memory_is_that_of_the_tensors_alive_at_once():
    def step():
        first = torch.ones(1000, 250)  # 1 MB
        second = first + 1
        del first
        third = second * 2  # in place of the first
        return third

    step()
    assert tool['peak_memory'](step, 'cpu') == pytest.approx(2, rel=.01)


@pytest.mark.parametrize('options', [[], ['--train']])
def test_whole_detectors_are_compared(options, tmp_path, capsys):
    configs = [str(ROOT / 'configs' / name) for name in (
        'retinanet_lavit_t_coco.py', 'baselines/retinanet_r50_coco.py')]
    tool['main']([*configs, '--whole', '--size', '64', '96', '--batch-size', '1',
                  '--rounds', '2', '--warmup', '0', '--device', 'cpu', '--out',
                  str(tmp_path), *options])
    results = json.loads(
        (tmp_path / 'benchmark.json').read_text())['results']['64x96']
    # The neck and the head too.
    assert results[configs[0]]['params_m'] > 17
    assert 'retinanet_r50_coco ' in capsys.readouterr().out


def test_names_are_no_whole_detectors(capsys):
    with pytest.raises(SystemExit):
        tool['parse_args'](['LaViT-S', '--whole'])
    assert 'expected the paths of configs' in capsys.readouterr().err


def test_twins_have_vanilla_attention_alone():
    for arch in ('T', 'S', 'B'):
        args = tool['parse_args'](['--device', 'cpu'])
        model = tool['build'](f'LaViT-{arch}-twin', args)
        kinds = {type(block.attn).__name__ for stage in model.stages
                 for block in stage.blocks}
        assert kinds == {'VanillaAttention'}
        assert all(stage.downsample is None for stage in model.stages)


def test_unknown_models_are_named():
    args = tool['parse_args'](['--device', 'cpu'])
    for name in ('NoNet', 'mmdet.NoNet(depth=1)', 'two words'):
        with pytest.raises(SystemExit, match='expected the path.*LaViT-S') as error:
            tool['build'](name, args)
        assert str(error.value).startswith(f'{name}: ')


def test_registered_classes_are_taken_with_their_arguments():
    args = tool['parse_args'](['--device', 'cpu'])
    model = tool['build']('mmdet.ResNet(depth=18, out_indices=(2, ))', args)
    assert model.depth == 18 and model.out_indices == (2, )
    assert type(tool['build']('mmpretrain.LeNet5', args)).__name__ == 'LeNet5'
