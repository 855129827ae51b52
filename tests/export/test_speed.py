"""The table of speeds: every runtime runs, and ratios are of the same numbers."""
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


def test_every_runtime_runs_each_kind_of_numbers(tmp_path, capsys):
    rows = speed.compare([MODEL], (2, 64, 96), tmp_path,
                         ('eager', 'onnxruntime', 'openvino'), rounds=2, warmup=0)
    assert 'left out' not in capsys.readouterr().err
    assert [(row['model'], row['numbers']) for row in rows] == [
        (MODEL, numbers) for numbers in ('float32', 'bfloat16', 'int8')]
    for row in rows:
        for runtime in ('eager', 'onnxruntime', 'openvino'):
            cell = row[f'{runtime}, ms']
            ran = row['numbers'] in speed.RUNTIMES[runtime]
            form = r'\d+' if runtime == 'eager' else r'\d+ \(\d+\.\d\d\)'
            assert re.fullmatch(form if ran else '', cell), (row['numbers'], cell)
    small = (tmp_path / 'mmdet_ResNet_depth_18__int8.onnx').stat().st_size
    assert small < (tmp_path / 'mmdet_ResNet_depth_18__float32.onnx').stat().st_size


def test_ratios_are_over_eager_of_the_same_numbers():
    times = {Way('x', 'float32', 'eager'): [.4, .6], Way('x', 'bfloat16', 'eager'): [.1, .3],
             Way('x', 'float32', 'openvino'): [.2, .2],
             Way('x', 'bfloat16', 'openvino'): [.1, .1],
             Way('x', 'int8', 'openvino'): [.1, .1]}
    cells = [speed.row('x', dtype, 'any', times, ['eager', 'openvino'])
             for dtype in speed.DTYPES]
    assert [(c['eager, ms'], c['openvino, ms']) for c in cells] == [
        ('500', '200 (2.50)'), ('200', '100 (2.00)'), ('', '100 (5.00)')]
