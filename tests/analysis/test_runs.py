"""Progress and figures of trainings, by their work directories."""
import json
from pathlib import Path

from mmengine.config import Config

from mmlavit.analysis.runs import read_run

CONFIG = Config(dict(train_cfg=dict(max_epochs=12)))


def write_log(work_dir: Path, run: str, *lines) -> None:
    folder = work_dir / run / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))


def read(work_dir: Path, **kwargs):
    names = dict(AP='coco/bbox_mAP', AP50='coco/bbox_mAP_50')
    return read_run(CONFIG, work_dir, names, **kwargs)


def test_trainings_are_read_from_their_work_directories(tmp_path):
    run = read(tmp_path)
    assert (run.done, run.length, run.complete) == (0, 12, False)
    write_log(tmp_path, '20250101_000000', dict(loss=1., step=9),
              {'coco/bbox_mAP': .1, 'coco/bbox_mAP_50': .2, 'step': 3})
    write_log(tmp_path, '20250102_000000', {'coco/bbox_mAP': .3, 'step': 12})
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_7.pth'))
    run = read(tmp_path)
    assert (run.done, run.complete) == (7, False)
    assert run.figures == dict(AP=.3)  # not mixed with an earlier one
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_12.pth'))
    assert read(tmp_path).complete
    result = tmp_path / 'result.json'
    result.write_text(json.dumps({'coco/bbox_mAP': .4}))
    assert read(tmp_path, result=result).figures == dict(AP=.4)


def test_figures_of_an_earlier_epoch_are_said_to_be(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('epoch_12.pth')
    assert str(read(tmp_path)) == 'complete, not validated'
    write_log(tmp_path, '20250101_000000', {'coco/bbox_mAP': .1, 'step': 11})
    assert str(read(tmp_path)) == 'complete, validated at epoch 11'
    folder = tmp_path / 'test' / '20250102_000000'
    folder.mkdir(parents=True)
    (folder / '20250102_000000.json').write_text('{"coco/bbox_mAP": 0.2}')
    run = read(tmp_path)
    assert str(run) == 'complete' and run.figures == dict(AP=.2)


def test_a_test_does_not_take_the_place_of_the_last_validation(tmp_path):
    """It may be of an earlier checkpoint."""
    (tmp_path / 'last_checkpoint').write_text('epoch_12.pth')
    write_log(tmp_path, '20250101_000000', {'coco/bbox_mAP': .3, 'step': 12})
    (tmp_path / 'test/1').mkdir(parents=True)
    (tmp_path / 'test/1/1.json').write_text('{"coco/bbox_mAP": 0.2}')
    assert read(tmp_path).figures == dict(AP=.3)


def test_progress_by_iterations_has_their_unit(tmp_path):
    config = Config(dict(train_cfg=dict(type='IterBasedTrainLoop', max_iters=80)))
    (tmp_path / 'last_checkpoint').write_text('iter_40.pth')
    run = read_run(config, tmp_path, {})
    assert str(run) == 'iter 40 of 80, not validated' and not run.complete
