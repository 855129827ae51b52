"""The report of a GPU, its parts in small on the CPU."""
import json
from pathlib import Path

import pytest
import torch

from mmlavit.analysis import gpu_report
from mmlavit.analysis.gpu_report_parts import (FULL, SMALL, compare_devices,
                                               focal_loss, parts_of,
                                               peak_by_data_sheet)
from mmlavit.analysis.peers import PEERS


@pytest.fixture
def result(request, tmp_path) -> dict:
    """What a part gives on the CPU."""
    (tmp_path / 'parts').mkdir()
    found = parts_of(SMALL)[request.param](SMALL, tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found['markdown'].startswith('## ')
    return found


def of(part: str):
    return pytest.mark.parametrize('result', [part], indirect=True)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert gpu_report.main(['--out', str(tmp_path)]) == 2
    assert 'No GPU' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_results_are_kept_and_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    names, ran = list(parts_of(SMALL)), []

    def run_part(name: str, plan, out: Path, seconds: float) -> str:
        ran.append(name)
        if name == 'profile':
            return 'failed'
        gpu_report.write_json(gpu_report.result_path(out, name),
                              dict(markdown=f'## Of {name}'))
        return 'done'

    monkeypatch.setattr(gpu_report, 'run_part', run_part)
    arguments = ['--try-on-cpu', '--out', str(tmp_path)]
    assert gpu_report.main([*arguments, '--minutes', '0']) == 1
    assert not ran
    assert gpu_report.main(arguments) == 1
    assert ran == names
    assert 'Without a result: profile.' in capsys.readouterr().out
    page = (tmp_path / 'gpu_report.md').read_text()
    for name in names:
        assert (f'## {name}\n\n**Not yet run**' if name == 'profile'
                else f'## Of {name}') in page
    ran.clear()
    assert gpu_report.main(arguments) == 1
    assert ran == ['profile']
    assert set(json.loads((tmp_path / 'gpu_report.json').read_text())['parts']) == (
        set(names) - {'profile'})


def test_a_part_has_a_process_with_a_time_and_a_log(tmp_path):
    pytest.importorskip('mmcv._ext')
    assert gpu_report.run_part('operators', SMALL, tmp_path, 1e3).startswith('done')
    assert gpu_report.result_path(tmp_path, 'operators').is_file()
    assert gpu_report.run_part('no such part', SMALL, tmp_path, 1e3).startswith(
        'failed')
    assert 'KeyError' in (tmp_path / 'parts/no such part.log').read_text()
    assert gpu_report.run_part('profile', SMALL, tmp_path, .1).startswith('stopped')
    assert not gpu_report.result_path(tmp_path, 'profile').exists()


@of('operators')
def test_operators_run(result):
    assert [row['runs'] for row in result['rows']] == ['yes'] * 5
    # On the CPU the operators are compared with themselves.
    results = dict(cpu=torch.tensor([1., 2.]), other=torch.tensor([1.25, 1.5]))
    assert compare_devices(results.get, 'other') == .5


def test_focal_loss_is_that_of_mmdet():
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
    logits = torch.randn(20, 4)
    classes = torch.arange(20) % 4
    expected = py_sigmoid_focal_loss(
        logits, torch.nn.functional.one_hot(classes, 4), reduction='none')
    torch.testing.assert_close(focal_loss(logits), expected)


@of('tests')
def test_tests_are_counted(result):
    assert result['tests'] >= 2 and not result['failed']


@of('inference-64')
def test_benchmark_has_every_model_in_every_mode(result):
    assert not result['left_out']
    for mode in ('eager', 'bfloat16'):
        assert list(result['results'][mode]) == ['LaViT-T', 'FastViT-SA24']
        assert f'{mode}, MB' in result['markdown']


@of('profile')
def test_profile_adds_up(result):
    for kernels in result['kernels'].values():
        shares = [float(row['share, %']) for row in kernels]
        assert shares == sorted(shares, reverse=True) and sum(shares) < 101
    operators = {row['kernel'] for row in result['kernels']['LaViT-T, inference, 64']}
    assert 'aten::addmm' in operators
    for row in result['rows']:
        # 0.14 G multiply-adds an image; of two, three times as many in training.
        flops = 1e9 * float(row['TFLOP/s']) * float(row['ms'])
        factor = 3 if 'training' in row['step'] else 1
        assert flops == pytest.approx(2 * 2 * .14e9 * factor, rel=.1)


@of('pieces')
def test_pieces_take_turns_and_the_default_comes_back(result):
    from mmlavit.models.layers.attend import MAX_BUILT_SCORES
    assert MAX_BUILT_SCORES['cpu'] == result['default'] == 2**20
    assert [row['scores at once'] for row in result['rows']] == ['2^8', '2^20']


@of('retinanet')
def test_a_retinanet_is_trained_on_made_images(result):
    assert len(result['scalars']) == 2
    for line in result['scalars']:
        assert line['loss'] > 0 and 'loss_dp' not in line


def test_the_full_plan_is_of_what_there_is(monkeypatch):
    for bench in (*FULL.benches.values(), *FULL.profiles.values(), FULL.pieces):
        assert set(bench.models) <= set(PEERS)
    for name, peak in (('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756),
                       ('NVIDIA A100-SXM4-40GB', 312), ('NVIDIA L40', None),
                       ('NVIDIA L4', 121), ('NVIDIA RTX A1000', None)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda name=name: name)
        assert peak_by_data_sheet('cuda') == peak
