"""One training in a process of its own: begun, resumed, or found complete."""
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Sequence

from mmengine.config import Config

from .runs import Run, read_run


class Metric(NamedTuple):
    """What a toolbox's models are compared by."""
    title: str
    name: str  # the toolbox's
    factor: float  # to per cent


METRICS = dict(
    mmpretrain=Metric('top-1', 'accuracy/top1', 1),
    mmdet=Metric('AP', 'coco/bbox_mAP', 100),
    mmseg=Metric('mIoU', 'mIoU', 1))


def metric_of(config: Config) -> Metric:
    """Of the config's toolbox."""
    return METRICS[config.default_scope]


def set_schedule(config: Config, epochs: int) -> None:
    """Gives a config warm-up and cosine; one checkpoint, of every epoch the last; and
    one validation, at the end."""
    config.train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=50),
        dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, end=epochs,
             convert_to_iter_based=True)
    ]
    config.default_hooks.logger.interval = 10
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=1)


def train(config: Config, work_dir: Path) -> float:
    """Trains a config of `set_schedule`; what is there of the same one is resumed.

    Returns:
        float: The metric of its toolbox after the last epoch, in per cent.

    Raises:
        ValueError: If another configuration was trained there.
        RuntimeError: If the training fails, naming its log.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    config.work_dir = str(work_dir)
    # Beside the work directory: mmengine writes one of its own into it.
    path, text = work_dir.with_suffix('.py'), config.pretty_text
    if path.is_file() and path.read_text() != text:
        raise ValueError(f'{work_dir} is of another configuration or budget: '
                         'give another --out, or remove it')
    path.write_text(text)
    log = work_dir / 'train.log'
    if not progress(config, work_dir).complete:
        launch('train', [path, '--work-dir', work_dir, '--resume'], log)
    run = progress(config, work_dir)
    if run.complete and not run.figures:
        # It was cut off between the last checkpoint and its validation.
        launch('test', [path, last_checkpoint(config, work_dir), '--work-dir',
                        work_dir / 'test'], log)
    score = progress(config, work_dir).figures.get('score')
    if score is None:
        raise RuntimeError(f'{work_dir.name}: training failed; see {log}. Run this '
                           'again to go on.')
    return score


def progress(config: Config, work_dir: Path) -> Run:
    """Of a training, with its metric in per cent as ``score``."""
    metric = metric_of(config)
    run = read_run(config, work_dir, dict(score=metric.name))
    return run._replace(figures={
        name: value * metric.factor for name, value in run.figures.items()})


def last_checkpoint(config: Config, work_dir: Path) -> Path:
    """Of a complete training."""
    return work_dir / f'epoch_{config.train_cfg.max_epochs}.pth'


def launch(task: str, arguments: Sequence, log: Path) -> None:
    """Trains or tests in a process of its own; the work directory tells the end."""
    code = f'from mmlavit.launch import main; main({task!r})'
    with open(log, 'a') as file:
        subprocess.run([sys.executable, '-c', code, *map(str, arguments)],
                       stdout=file, stderr=subprocess.STDOUT)
