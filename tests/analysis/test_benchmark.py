"""What is compared, not how fast that is."""
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mmlavit.analysis import benchmark
from mmlavit.analysis.benchmark import (MODES, Workload, compare, compare_modes,
                                        comparison_rows, fastest, find_layer,
                                        mode_rows)
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
    # Without a head; the detector's backbone is the same.
    assert results['LaViT-T']['params_m'] == pytest.approx(10.53, abs=.01)
    assert results['LaViT-T']['params_m'] == results[names[1]]['params_m']
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


def test_a_model_that_cannot_be_built_is_left_out(capsys):
    def build(name: str) -> nn.Module:
        if name == 'absent':
            raise ModuleNotFoundError("No module named 'mmdet'")
        return Net(torch.contiguous_format)

    work = Workload((8, 8), batch_size=1, layout='contiguous')
    results = compare(['absent', 'there'], build, work, rounds=2, warmup=0, macs=False)
    assert list(results) == ['there'] and results['there']['ratio'] == 1
    assert "absent is left out: No module named 'mmdet'" in capsys.readouterr().err


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


def test_two_stages_have_their_classes_in_the_second():
    head = nn.Module()
    head.num_classes = 7
    one, two, three, none = (nn.Module() for _ in range(4))
    one.bbox_head = head
    two.roi_head, three.roi_head = nn.Module(), nn.Module()
    two.roi_head.bbox_head = head
    three.roi_head.bbox_head = nn.ModuleList([head, head])
    assert [benchmark.classes_of(model) for model in (one, two, three)] == [7, 7, 7]
    with pytest.raises(ValueError, match='Module: expected a detector with a bbox_head'):
        benchmark.classes_of(none)


class Net(nn.Module):
    """Runs in the layout alone that it is made for, and notes what it is given."""

    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.conv, self.layout, self.seen = nn.Conv2d(3, 4, 3), layout, []

    def forward(self, x):
        assert x.is_contiguous(memory_format=self.layout), 'of the wrong layout'
        if self.layout == torch.channels_last:
            assert self.conv.weight.is_contiguous(memory_format=self.layout)
        out = self.conv(x)
        self.seen.append(out.dtype)
        return [out]


NETS = {'first': torch.contiguous_format, 'last': torch.channels_last}


def test_every_model_has_the_layout_in_which_it_runs_best():
    results = compare(list(NETS), lambda name: Net(NETS[name]), SMALL, rounds=2,
                      warmup=0, macs=False)
    assert {name: r['layout'] for name, r in results.items()} == {
        'first': 'contiguous', 'last': 'channels-last'}
    # A given one is kept to.
    results = compare(list(NETS), lambda name: Net(NETS[name]),
                      SMALL._replace(layout='contiguous'), 2, 0, macs=False)
    assert list(results) == ['first']
    assert fastest({'slow': lambda: time.sleep(.05), 'fast': lambda: None},
                   'cpu') == 'fast'


def test_modes_stand_beside_each_other():
    nets = {name: Net(layout) for name, layout in NETS.items()}
    results = compare_modes(
        list(nets), nets.__getitem__,
        {mode: SMALL._replace(**MODES[mode]) for mode in ('eager', 'bfloat16')},
        rounds=3, warmup=0, macs=False)
    assert set(nets['first'].seen) == {torch.float32, torch.bfloat16}
    for mode, each in results.items():
        assert each['first']['ratio'] == 1
        assert (each['last']['gain'] == 1) == (mode == 'eager')
    rows = mode_rows(results, dict(last=81.25))
    assert [row['model'] for row in rows] == ['first', 'last']
    assert [row['top-1, published'] for row in rows] == ['', '81.2']
    assert list(rows[0])[4:] == ['eager, ms', 'eager, speed ratio', 'bfloat16, ms',
                                 'bfloat16, speed ratio', 'layout']
    assert rows[1]['bfloat16, speed ratio'] == (
        f"{results['bfloat16']['last']['ratio']:.2f}")
    assert rows[1]['layout'] == 'channels-last'


def test_a_model_that_fails_in_one_mode_has_an_empty_cell_there(capsys):
    def build(name: str) -> nn.Module:
        net = Net(torch.contiguous_format)
        if name == 'float only':
            net.conv.register_forward_hook(refuse_bfloat16)
        return net

    def refuse_bfloat16(module, args, out) -> None:
        if out.dtype == torch.bfloat16:
            raise RuntimeError('no such kernel')

    results = compare_modes(
        ['float only', 'other'], build,
        {mode: SMALL._replace(**MODES[mode]) for mode in ('eager', 'bfloat16')},
        rounds=2, warmup=0, macs=False)
    said = capsys.readouterr().err
    assert 'float only bfloat16 is left out: RuntimeError: no such kernel' in said
    assert 'bfloat16: ratios are over other.' in said
    assert list(results['eager']) == ['float only', 'other']
    assert list(results['bfloat16']) == ['other']
    assert results['bfloat16']['other']['ratio'] == 1
    assert mode_rows(results, {})[0]['bfloat16, ms'] == ''


def test_the_tool_knows_every_mode():
    text = (ROOT / 'tools/benchmark.py').read_text()
    assert all(f"'{mode}'" in text for mode in MODES)


def test_ratios_are_of_speeds(monkeypatch):
    """With known times: the second model takes half as long, bfloat16 a quarter."""
    def time(steps, *args):
        return {key: [{'a': 4., 'b': 2.}[key[1]] * {'one': 1., 'two': .25}[key[0]]] * 3
                for key in steps}

    monkeypatch.setattr(benchmark, 'time_in_turn', time)
    modes = {name: SMALL._replace(layout='contiguous') for name in ('one', 'two')}
    results = compare_modes(['a', 'b'], lambda name: nn.Conv2d(3, 1, 1), modes,
                            rounds=3, warmup=0, macs=False)
    one, two = results['one'], results['two']
    assert (one['a']['ratio'], one['b']['ratio'], two['b']['ratio']) == (1, 2, 2)
    assert (one['b']['gain'], two['a']['gain'], two['b']['gain']) == (1, 4, 4)
    assert (one['b']['ms'], one['b']['images_per_s']) == (2000, 1)
