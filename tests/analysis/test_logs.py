"""What mmengine logged."""
import json

from mmlavit.analysis.logs import read_scalars, read_validation


def test_lines_that_a_kill_cut_off_are_left_out(tmp_path):
    for part, text in (('1', '{"a": 1}\n{"a": 2, "b'), ('2', '{"a": 3}\n')):
        log = tmp_path / part / 'vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text(text)
    assert read_scalars(tmp_path) == [dict(a=1), dict(a=3)]


def test_a_validation_is_found_by_its_step(tmp_path):
    log = tmp_path / '20250101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('\n'.join(map(json.dumps, (
        {'acc': 1., 'time': .1, 'data_time': .2, 'step': 1}, {'acc': 2., 'step': 2},
        {'loss': 3., 'step': 2}, {'acc': 4., 'step': 3}))))
    assert read_validation(tmp_path, 1) == dict(acc=1.)
    assert read_validation(tmp_path, 2) == dict(acc=2.)
    assert read_validation(tmp_path, 9) == {}
