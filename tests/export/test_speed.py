"""The table of speeds: every runtime runs, and ratios are of the same precision."""
import re

import pytest
import torch

if not hasattr(torch.compiler, 'is_exporting'):
    pytest.skip('torch is too old to export', allow_module_level=True)
for name in ('onnx', 'onnxscript', 'onnxruntime', 'openvino'):
    pytest.importorskip(name)

from mmlavit.export import speed  # noqa: E402
from mmlavit.export.speed import Way  # noqa: E402

MODEL = 'mmdet.ResNet(depth=18)'


def test_every_runtime_runs_each_precision(tmp_path, capsys):
    rows = speed.compare([MODEL], (2, 64, 96), tmp_path,
                         ('eager', 'onnxruntime', 'openvino'), rounds=2, warmup=0)
    assert 'left out' not in capsys.readouterr().err
    assert [(row['model'], row['precision']) for row in rows] == [
        (MODEL, dtype) for dtype in ('float32', 'bfloat16', 'int8')]
    for row in rows:
        for runtime in ('eager', 'onnxruntime', 'openvino'):
            cell = row[f'{runtime}, ms']
            ran = row['precision'] in speed.RUNTIMES[runtime]
            form = r'\d+ \(\d+-\d+\)' + ('' if runtime == 'eager' else r', x\d+\.\d\d')
            assert re.fullmatch(form if ran else '', cell), (row['precision'], cell)
    small = (tmp_path / 'mmdet_ResNet_depth_18__int8.onnx').stat().st_size
    assert small < (tmp_path / 'mmdet_ResNet_depth_18__float32.onnx').stat().st_size


def test_ratios_are_over_eager_in_the_same_precision():
    times = {Way('x', 'float32', 'eager'): [.4, .6], Way('x', 'bfloat16', 'eager'): [.1, .3],
             Way('x', 'float32', 'openvino'): [.2, .2],
             Way('x', 'bfloat16', 'openvino'): [.1, .1],
             Way('x', 'int8', 'openvino'): [.1, .1]}
    cells = [speed.row('x', dtype, 'any', times, ['eager', 'openvino'])
             for dtype in speed.DTYPES]
    assert [(c['eager, ms'], c['openvino, ms']) for c in cells] == [
        ('500 (420-580)', '200 (200-200), x2.50'),
        ('200 (120-280)', '100 (100-100), x2.00'), ('', '100 (100-100), x5.00')]


def test_a_model_that_does_not_export_is_left_out(tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError('no such operator')

    monkeypatch.setattr(speed, 'to_fixed_onnx', fail)
    assert speed.compare([MODEL], (1, 64, 64), tmp_path, ('openvino', ), rounds=2) == []
    assert f'{MODEL} is left out: no such operator' in capsys.readouterr().err
    with pytest.raises(ValueError, match='NoNet: expected'):  # before any is exported
        speed.compare([MODEL, 'NoNet'], (1, 64, 64), tmp_path, ('openvino', ))
    assert not capsys.readouterr().err
    # Nothing is exported where nothing that is exported is timed.
    row, = speed.compare([MODEL], (1, 64, 64), tmp_path, ('eager', ), ('float32', ),
                         rounds=2, warmup=0)
    assert row['eager, ms'] and not list(tmp_path.iterdir())
