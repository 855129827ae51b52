"""What is compared, not how fast that is."""
from pathlib import Path

import pytest
import torch

from mmlavit.analysis.benchmark import (Workload, compare, comparison_rows,
                                        find_layer)
from mmlavit.analysis.peers import build_backbone, build_detector

ROOT = Path(__file__).parents[2]
SMALL = Workload((64, 64), batch_size=2)


@pytest.mark.parametrize('train', [False, True])
def test_models_are_compared_in_one_run(train):
    names = ['LaViT-T', str(ROOT / 'configs/retinanet_lavit_t_coco.py'),
             'ConvNeXt-T']
    results = compare(names, build_backbone, SMALL._replace(train=train), rounds=2,
                      warmup=0, macs=not train)
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
    assert train or results['LaViT-T']['gmacs'] > .1
    rows = comparison_rows(results)
    assert [row['model'] for row in rows] == ['LaViT-T', 'retinanet_lavit_t_coco',
                                              'ConvNeXt-T']
    assert rows[0]['speed ratio'] == '1.00 (1.00-1.00)'
    assert rows[0]['parameters, M'] == '10.53'
    assert (rows[0]['MACs, G'] == '') == train


def test_model_that_fails_is_left_out(tmp_path, capsys):
    fails = tmp_path / 'fails.py'
    fails.write_text(f"_base_ = {str(ROOT / 'configs/retinanet_lavit_t_coco.py')!r}\n"
                     'model = dict(backbone=dict(in_channels=4))')
    work = SMALL._replace(batch_size=1)
    results = compare([str(fails), 'LaViT-T', 'LaViT-T-twin'], build_backbone, work,
                      rounds=2, warmup=0, macs=False)
    printed = capsys.readouterr().err
    assert 'fails.py is left out: ValueError: LaViT: x.shape=' in printed
    assert 'Ratios are over LaViT-T.' in printed
    assert list(results) == ['LaViT-T', 'LaViT-T-twin']
    assert results['LaViT-T']['ratio'] == 1
    assert compare([str(fails)], build_backbone, work, 2, 0) == {}


def test_layer_alone_is_given_what_it_gets_in_the_model():
    model = build_backbone('LaViT-T').eval()
    images, seen = torch.rand(1, 3, 64, 96), []
    last = model.stages[3].blocks[1]
    handle = last.register_forward_hook(lambda *_: seen.append(_[2][0]))
    model(images)
    handle.remove()
    layer, inputs = find_layer(model, 'stages.3.blocks.1', images)
    assert layer is last and torch.allclose(
        layer(*inputs)[0], seen[0], atol=1e-4)
    assert not layer._forward_pre_hooks
    for name, why in (('stages.9', 'has no attribute'),
                      ('stages.3.blocks', 'is not called')):
        with pytest.raises(ValueError, match=f'layer={name}: .*{why}'):
            find_layer(model, name, images)
    result = compare(['LaViT-T'], lambda name: model,
                     SMALL._replace(layer='stages.3.blocks.1'), 2, 0)['LaViT-T']
    assert result['params_m'] == sum(p.numel() for p in last.parameters()) / 1e6


@pytest.mark.parametrize('train', [False, True])
def test_whole_detectors_are_compared(train):
    configs = [str(ROOT / 'configs' / name) for name in (
        'retinanet_lavit_t_coco.py', 'baselines/retinanet_r50_coco.py')]
    work = Workload((64, 96), batch_size=1, train=train, whole=True)
    results = compare(configs, build_detector, work, rounds=2, warmup=0)
    # The neck and the head too.
    assert list(results) == configs
    assert results[configs[0]]['params_m'] > 17
