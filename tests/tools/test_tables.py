"""tools/tables.py, run as users run it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from builders import load_tool
from mmlavit.analysis import small_tables

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'


def write_log(work_dir: Path, run: str, *lines) -> None:
    folder = work_dir / run / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))


def test_run_starts_resumes_and_skips(tmp_path):
    """With a stand-in for bash, which would run the scripts."""
    (tmp_path / 'published.yml').write_text(
        'classification:\n  - {model: A, config: a.py}\n'
        '  - {model: B, config: b.py}\n  - {model: U, config: u.py}\n'
        '  - {model: C, config: c.py}\n')
    for name in 'abuc':
        (tmp_path / f'{name}.py').write_text(
            f"_base_ = {str(CONFIGS / 'lavit_t_in1k.py')!r}\n"
            'train_cfg = dict(max_epochs=4)\n')
    for name, epoch in (('a', 4), ('b', 3), ('u', 4)):
        folder = tmp_path / 'work' / name
        folder.mkdir(parents=True)
        (folder / 'last_checkpoint').write_text(f'epoch_{epoch}.pth')
        write_log(folder, '20250101_000000', {'accuracy/top1': 1., 'step': 3 + (name == 'a')})
    (tmp_path / 'c.py').write_text(
        f"_base_ = {str(CONFIGS / 'retinanet_lavit_t_coco.py')!r}\n")
    (tmp_path / 'bash').write_text(
        f'#!{sys.executable}\nimport sys\nprint("RAN", *sys.argv[1:])\n'
        'sys.exit("c.py" in sys.argv[2])\n')
    (tmp_path / 'bash').chmod(0o755)
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/tables.py', 'classification', '--run',
         '--gpus', '2', '--published', 'published.yml', '--work-dirs', 'work',
         '--train-args', '--amp'], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
    assert '[1/4] A (a.py): complete, skipped' in done.stdout
    assert '[2/4] B (b.py): resumed from epoch 3 of 4' in done.stdout
    assert ('dist_train.sh b.py 2 --work-dir work/b --resume --auto-scale-lr --amp\n'
            in done.stdout)
    # Cut off before its last validation: only tested.
    assert '[3/4] U (u.py): complete, tested' in done.stdout
    assert ('dist_test.sh u.py work/u/epoch_4.pth 2 --work-dir work/u/test\n'
            in done.stdout)
    # The pre-training is where this command trained it.
    assert '[4/4] C (c.py): started' in done.stdout
    assert ('--amp --cfg-options model.backbone.init_cfg.checkpoint='
            'work/lavit_t_in1k/epoch_300.pth' in done.stdout)
    # The last fails: said, and the exit code is not 0.
    assert done.returncode == 1
    assert 'exit code 1; its log is in work/c' in done.stderr


@pytest.mark.parametrize('item, named', [
    ('lavit_s_in1k', 'expected CONFIG=FILE'),
    ('lavit_s_in1k=gone.json', 'gone.json: no such file'),
    ('lavit_s_in1k.py=result.json', 'expected the name of a config'),
    # A config in a folder of its own is known: the next one is complained about.
    ('retinanet_pvt-t_coco=result.json --result x', 'x: expected CONFIG=FILE')])
def test_results_that_belong_to_no_row_are_named(item, named, tmp_path):
    (tmp_path / 'result.json').write_text('{}')
    item = item.replace('result.json', str(tmp_path / 'result.json'))
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/tables.py', 'all', '--result', *item.split()],
        capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr


def test_a_small_training_that_fails_leaves_a_gap(tmp_path, monkeypatch, capsys):
    tool = load_tool('tables')
    asked = []

    def train(configs, out, task, network, seed):
        asked.append((task, network, seed))
        out.mkdir(exist_ok=True)
        if network == 'PVT' and seed == 1:
            raise RuntimeError('training failed; see train.log')
        return 50. + seed

    monkeypatch.setattr(small_tables, 'train_network', train)
    monkeypatch.setattr(tool.subprocess, 'run',
                        lambda command: subprocess.CompletedProcess(command, 0))
    with pytest.raises(SystemExit) as stop:
        tool.small('PVT', ['classification'], [1, 2], tmp_path / 'small', CONFIGS)
    assert str(stop.value) == ('not complete:\n[1/4] classification, PVT, seed 1: '
                               'training failed; see train.log')
    assert [(name, seed) for _, name, seed in asked] == [
        ('PVT', 1), ('PVTv2-B0', 1), ('PVT', 2), ('PVTv2-B0', 2)]
    name = 'small/small_classification_PVT_seeds_1_2'  # a part of the table
    table = (tmp_path / f'{name}.md').read_text()
    cells = [line.split('|')[1:3] for line in table.splitlines() if '| PVT' in line]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ['PVT', '52.0'], ['PVTv2-B0', '51.5 ± 0.7']]
    assert table in capsys.readouterr().out
    scores = (tmp_path / f'{name}_scores.csv').read_text()
    assert scores.splitlines()[1:] == ['classification,PVTv2-B0,1,51.00',
                                       'classification,PVT,2,52.00',
                                       'classification,PVTv2-B0,2,52.00']
