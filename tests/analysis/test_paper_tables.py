"""The paper's tables, and the published figures in them."""
import json
from pathlib import Path

import pytest
import yaml

from mmlavit.analysis.paper_tables import (TABLES, Row, compare_macs, count,
                                           make_cells, next_step, read_rows)

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
PUBLISHED = yaml.safe_load((CONFIGS / 'published.yml').read_text())


def rows_of(name: str, model: str, work_dirs: Path, results={},
            results_ms={}) -> list:
    published = [row for row in PUBLISHED[name] if row['model'] == model]
    return read_rows(TABLES[name], published, CONFIGS, work_dirs, results, results_ms)


def write_log(work_dir: Path, *lines) -> None:
    folder = work_dir / '20250101_000000' / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))


def test_every_config_stands_in_one_row():
    configs = sorted(
        str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py')
        if not {'_base_', 'ablation'} & set(path.parts)
        and not any(data in path.name for data in ('digits', 'tin100')))
    papers = TABLES.keys() - {'tiny_imagenet'}
    assert sorted(row['config'] for name in papers
                  for row in PUBLISHED[name] if 'config' in row) == configs


def test_counts_and_trained_figures_stand_beside_the_published(tmp_path):
    work_dir, table = tmp_path / 'lavit_t_in1k', TABLES['classification']
    write_log(work_dir, {'accuracy/top1': 12.3, 'step': 2})
    (work_dir / 'last_checkpoint').write_text('epoch_2.pth')
    row, = rows_of('classification', 'LaViT-T', tmp_path)
    row = count(row, table)
    cells = make_cells(row, table)
    assert cells['top1 (published)'] == '79.2'
    assert cells['top1 trained here'] == '12.3'
    assert cells['training'] == 'epoch 2 of 300'
    assert float(cells['params, M']) == pytest.approx(10.97, abs=.01)
    assert float(cells['MACs, G at 224x224']) == pytest.approx(1.57, abs=.01)
    assert ('the published 1.6 G agree with the count at 224x224'
            in compare_macs(row, table))


def test_what_was_trained_elsewhere_stands_in_the_table(tmp_path):
    def cells() -> tuple:
        row, = rows_of('tiny_imagenet', 'LaViT-N', tmp_path)
        found = make_cells(row, TABLES['tiny_imagenet'])
        return found['top1 trained here'], found['training']

    assert cells() == ('51.0', 'of configs/published.yml')
    work_dir = tmp_path / 'lavit_n_tin100'
    work_dir.mkdir()
    (work_dir / 'last_checkpoint').write_text('epoch_2.pth')
    assert cells() == ('', 'epoch 2 of 20, not validated')
    write_log(work_dir, {'accuracy/top1': 12.3, 'step': 2})
    assert cells() == ('12.3', 'epoch 2 of 20')


def test_rows_without_a_config_have_published_figures_alone(tmp_path):
    row, = rows_of('detection', 'PVT-M 1x', tmp_path)
    table = TABLES['detection']
    cells = make_cells(count(row, table), table)
    assert {key: value for key, value in cells.items() if value} == {
        'model': 'PVT-M 1x', 'AP (published)': '41.9'}
    assert compare_macs(row, table) is None


def test_results_of_tests_stand_in_for_the_logs(tmp_path):
    """Several scales have a column of their own."""
    name = 'semantic_fpn_lavit_s_ade20k'
    write_log(tmp_path / name, dict(mIoU=40., step=80000))
    (tmp_path / 'a.json').write_text('{"mIoU": 41.0}')
    (tmp_path / 'ms.json').write_text('{"mIoU": 42.0}')
    model = next(row['model'] for row in PUBLISHED['segmentation']
                 if row.get('config') == f'{name}.py')
    several = {name: tmp_path / 'ms.json'}
    row, = rows_of('segmentation', model, tmp_path, {}, several)
    assert row.run.figures == dict(mIoU=40., mIoU_ms=42.)
    row, = rows_of('segmentation', model, tmp_path, {name: tmp_path / 'a.json'},
                   several)
    assert row.run.figures == dict(mIoU=41., mIoU_ms=42.)


def test_shares_of_one_are_shown_in_per_cent(tmp_path):
    write_log(tmp_path / 'retinanet_lavit_t_coco', {'coco/bbox_mAP': .462, 'step': 12})
    row, = rows_of('detection', 'LaViT-T 1x', tmp_path)
    assert make_cells(row, TABLES['detection'])['AP trained here'] == '46.2'


def test_counts_that_cannot_be_matched_are_said():
    row = Row(dict(model='X', macs=122), Path('x.py'), macs=(50.1, 200.))
    note = compare_macs(row, TABLES['segmentation'])
    assert '122 G cannot be matched' in note and '50.1 G at 512x512' in note


def test_what_is_left_to_do_is_done(tmp_path):
    config = CONFIGS / 'lavit_t_in1k.py'
    work_dir = tmp_path / 'lavit_t_in1k'

    def step() -> tuple:
        row, = rows_of('classification', 'LaViT-T', tmp_path)
        title, command = next_step(row, tmp_path, 2, ['--amp'])
        return title, ' '.join(command)

    train = (f'dist_train.sh {config} 2 --work-dir {work_dir} --resume '
             '--auto-scale-lr --amp')
    assert step() == ('started', train)
    write_log(work_dir, {'accuracy/top1': 1., 'step': 299})
    (work_dir / 'last_checkpoint').write_text('epoch_299.pth')
    assert step() == ('resumed from epoch 299 of 300', train)
    (work_dir / 'last_checkpoint').write_text('epoch_300.pth')
    # Cut off before its last validation: only tested.
    assert step() == ('complete, tested', f'dist_test.sh {config} '
                      f'{work_dir}/epoch_300.pth 2 --work-dir {work_dir}/test')
    (work_dir / 'test/20250102_000000').mkdir(parents=True)
    (work_dir / 'test/20250102_000000/x.json').write_text('{"accuracy/top1": 2.0}')
    assert step() == ('complete, skipped', '')
    # On as many GPUs as the recipe has, where none are asked for.
    for table, name, gpus in (('detection', 'LaViT-T 1x', '8'),
                              ('tiny_imagenet', 'LaViT-N', '1')):
        row, = rows_of(table, name, tmp_path)
        assert next_step(row, tmp_path, None, []).command[2] == gpus
    # The pre-training is where this command trained it.
    row, = rows_of('detection', 'LaViT-T 1x', tmp_path)
    assert next_step(row, tmp_path, 2, []).command[-2:] == [
        '--cfg-options', 'model.backbone.init_cfg.checkpoint='
        f'{work_dir}/epoch_300.pth']
