"""tools/tables.py and the published figures that it reads."""
import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmlavit.logs import read_scalars

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
PUBLISHED = yaml.safe_load((CONFIGS / 'published.yml').read_text())
tables = runpy.run_path(str(ROOT / 'tools/tables.py'))
METRICS = {
    'Top 1 Accuracy': 'top1', 'box AP': 'AP', 'mIoU': 'mIoU',
    'mIoU (ms+flip)': 'mIoU_ms'
}


def test_every_config_stands_in_one_row_and_one_metafile():
    configs = {
        str(path.relative_to(CONFIGS))
        for path in CONFIGS.rglob('*.py') if 'digits' not in path.name
    }
    rows = {row['config']: row for table in PUBLISHED.values()
            for row in table if 'config' in row}
    assert set(rows) == configs
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    models = [
        model for name in index['Import']
        for model in yaml.safe_load((ROOT / name).read_text())['Models']
    ]
    assert len({model['Name'] for model in models}) == len(models)
    assert {model['Config'] for model in models} == {
        f'configs/{config}' for config in configs}
    for model in models:
        row = rows[model['Config'][len('configs/'):]]
        figures = model.get('Results', [{}])[0].get('Metrics', {})
        assert all(name.endswith(' (published)') for name in figures)
        assert {METRICS[name[:-len(' (published)')]]: value
                for name, value in figures.items()} == {
                    key: row[key] for key in METRICS.values() if key in row}
        assert model['Metadata'].get('FLOPs (published)', 0) == round(
            row.get('macs', 0) * 1e9)


def write_log(work_dir: Path, run: str, *lines) -> None:
    folder = work_dir / run / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))


def read(work_dir: Path, config: str, **kwargs):
    name = 'classification' if 'in1k' in config else 'detection'
    return tables['read_training'](CONFIGS / config, work_dir,
                                   tables['TABLES'][name], **kwargs)


def test_trainings_are_read_from_their_work_directories(tmp_path):
    config = 'retinanet_lavit_t_coco.py'
    training = read(tmp_path, config)
    assert (training.done, training.length, training.complete) == (0, 12, False)
    write_log(tmp_path, '20250101_000000', dict(loss=1., step=9),
              {'coco/bbox_mAP': .1, 'coco/bbox_mAP_50': .2, 'step': 3})
    write_log(tmp_path, '20250102_000000', {'coco/bbox_mAP': .3, 'step': 12})
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_7.pth'))
    training = read(tmp_path, config)
    assert (training.done, training.complete) == (7, False)
    assert training.metrics == dict(AP=.3)  # not mixed with an earlier one
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_12.pth'))
    assert read(tmp_path, config).complete
    result = tmp_path / 'result.json'
    result.write_text(json.dumps({'coco/bbox_mAP': .4}))
    assert read(tmp_path, config, result=result).metrics == dict(AP=.4)


def test_figures_of_an_earlier_epoch_are_said_to_be(tmp_path):
    config = 'retinanet_lavit_t_coco.py'
    (tmp_path / 'last_checkpoint').write_text('epoch_12.pth')
    assert str(read(tmp_path, config)) == 'complete, not validated'
    write_log(tmp_path, '20250101_000000', {'coco/bbox_mAP': .1, 'step': 11})
    assert str(read(tmp_path, config)) == 'complete, validated at epoch 11'
    folder = tmp_path / 'test' / '20250102_000000'
    folder.mkdir(parents=True)
    (folder / '20250102_000000.json').write_text('{"coco/bbox_mAP": 0.2}')
    training = read(tmp_path, config)
    assert str(training) == 'complete' and training.metrics == dict(AP=.2)


def test_lines_that_a_kill_cut_off_are_left_out(tmp_path):
    for part, text in (('1', '{"a": 1}\n{"a": 2, "b'), ('2', '{"a": 3}\n')):
        log = tmp_path / part / 'vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text(text)
    assert read_scalars(tmp_path) == [dict(a=1), dict(a=3)]


def test_rows_that_are_not_there_are_an_error():
    with pytest.raises(SystemExit, match='--only nothing: expected a part of a name'):
        tables['main'](['all', '--only', 'nothing'])


def test_results_need_a_name(capsys):
    with pytest.raises(SystemExit):
        tables['parse_args'](['detection', '--result', 'x.json'])
    assert 'x.json: expected CONFIG=FILE' in capsys.readouterr().err


def test_several_scales_have_a_column_of_their_own(tmp_path):
    write_log(tmp_path, '20250101_000000', dict(mIoU=40., step=80000))
    result = tmp_path / 'ms.json'
    result.write_text('{"mIoU": 42.0}')
    training = tables['read_training'](
        CONFIGS / 'semantic_fpn_lavit_s_ade20k.py', tmp_path,
        tables['TABLES']['segmentation'], result_ms=result)
    assert training.metrics == dict(mIoU=40., mIoU_ms=42.)


def test_counts_and_trained_figures_stand_beside_the_published(tmp_path):
    write_log(tmp_path / 'lavit_t_in1k', '20250101_000000',
              {'accuracy/top1': 12.3, 'step': 2})
    work_dir = tmp_path / 'lavit_t_in1k'
    (work_dir / 'last_checkpoint').write_text('epoch_2.pth')
    tables['main'](['classification', '--only', 'LaViT-T', '--work-dirs',
                    str(tmp_path), '--out', str(tmp_path / 'out')])
    row, = csv.DictReader(open(tmp_path / 'out/classification.csv'))
    assert row['top1 (published)'] == '79.2'
    assert row['top1 trained here'] == '12.3'
    assert row['training'] == 'epoch 2 of 300'
    assert float(row['params, M']) == pytest.approx(10.97, abs=.01)
    assert float(row['MACs, G at 224x224']) == pytest.approx(1.57, abs=.01)
    text = (tmp_path / 'out/classification.md').read_text()
    assert 'the published 1.6 G agree with the count at 224x224' in text


def test_counts_that_cannot_be_matched_are_said():
    table = tables['TABLES']['segmentation']
    rows = [dict(model='X', macs=122, config='x.py', agrees=[],
                 counts=(50.1, 200.))]
    assert any('122 G cannot be matched' in note and '50.1 G at 512x512' in note
               for note in tables['agreement'](table, rows))


def test_run_starts_resumes_and_skips(tmp_path):
    """With a stand-in for the training script of the toolbox."""
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
    code = f"""if True:
        import runpy, subprocess
        tool = runpy.run_path({str(ROOT / 'tools/tables.py')!r})
        def run(command):
            print('RAN', *command[1:])
            code = int('c.py' in command[2])
            return subprocess.CompletedProcess(command, code)
        subprocess.run = run
        tool['main'](['classification', '--run', '--gpus', '2', '--published',
                      'published.yml', '--work-dirs', 'work', '--train-args', '--amp'])
    """
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert '[1/4] A (a.py): complete, skipped' in done.stdout
    assert '[2/4] B (b.py): resumed from epoch 3 of 4' in done.stdout
    assert ('dist_train.sh b.py 2 --work-dir work/b --resume --amp\n'
            in done.stdout)
    # Cut off before its last validation: only tested.
    assert '[3/4] U (u.py): complete, tested' in done.stdout
    assert ('dist_test.sh u.py epoch_4.pth 2 --work-dir work/u/test\n'
            in done.stdout)
    # The pre-training is where this command trained it.
    assert '[4/4] C (c.py): started' in done.stdout
    assert ('--amp --cfg-options model.backbone.init_cfg.checkpoint='
            'work/lavit_t_in1k/epoch_300.pth' in done.stdout)
    # The last fails: said, and the exit code is not 0.
    assert done.returncode == 1
    assert 'exit code 1; its log is in work/c' in done.stderr
