"""One training in a process of its own: begun, resumed, or found complete."""
import fcntl
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

from mmengine.config import Config

from ..version import __version__
from .runs import Run, read_run

# How images are loaded makes no other training of it.
LOADING = re.compile(r'\s*\b(num_workers|persistent_workers)=\w+,?')


class Metric(NamedTuple):
    """What a toolbox's models are compared by."""
    title: str
    name: str  # the toolbox's
    evaluator: str  # of which it is
    factor: float  # to per cent


METRICS = dict(
    mmpretrain=Metric('top-1', 'accuracy/top1', 'Accuracy', 1),
    mmdet=Metric('AP', 'coco/bbox_mAP', 'CocoMetric', 100),
    mmseg=Metric('mIoU', 'mIoU', 'IoUMetric', 1))


def metric_of(config: Config) -> Metric:
    """That of the config's toolbox, its ``default_scope``."""
    return METRICS[config.default_scope]


def set_schedule(config: Config, epochs: int) -> None:
    """Gives a config the schedule that `train` expects, in place of its own.

    The learning rate warms up in 50 steps and falls along a cosine. There is a
    checkpoint after every epoch, of which the last is kept, and one validation, after
    the last epoch.

    Args:
        config (Config): Of any toolbox; it is changed.
        epochs (int): Of the training.
    """
    config.train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=50),
        dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, end=epochs,
             convert_to_iter_based=True)
    ]
    config.default_hooks.logger.interval = 10
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=1)


def from_scratch(config: Config) -> None:
    """Takes the fine-tuning out of a config of any toolbox; it is changed.

    No pre-training, nothing frozen, and one learning rate for all layers.
    """
    config.load_from = None
    backbone = config.model.backbone
    backbone.init_cfg = None
    if 'frozen_stages' in backbone:
        backbone.frozen_stages = -1
    (config.optim_wrapper.get('paramwise_cfg') or {}).pop('layer_decay_rate', None)


def train(config: Config, work_dir: Path) -> float:
    """Trains a config of `set_schedule`; what is there of the same one is resumed.

    Args:
        config (Config): What is trained.
        work_dir (Path): Where.

    Returns:
        float: The metric of its toolbox after the last epoch, in per cent.

    Raises:
        ValueError: If another configuration, or another version of mmlavit or of the
            data, was trained there.
        RuntimeError: If the training fails, naming its log, or if another process
            trains there.
    """
    with alone(work_dir):
        path = record(config, work_dir)
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


@contextmanager
def alone(work_dir: Path) -> Iterator[None]:
    """Keeps other processes out of a work directory.

    Raises:
        RuntimeError: If one is in it.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with open(work_dir / 'lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f'{work_dir}: another process trains there: wait for '
                               'it, or give another --out') from None
        # What is launched holds the lock too: it may go on without this process.
        os.set_inheritable(file.fileno(), True)
        yield


def record(config: Config, work_dir: Path) -> Path:
    """Writes down what is trained in a work directory; returns the file.

    Raises:
        ValueError: If it was something else.
    """
    # In a folder: mmengine writes a file of the same name into the work directory.
    path = work_dir / 'asked' / 'config.py'
    text = f'# mmlavit {__version__}{data_stamp(config)}\n{config.pretty_text}'
    before = path.read_text() if path.is_file() else None
    if before is None and (work_dir / 'last_checkpoint').is_file():
        before = ''  # of something that is not known
    if before is not None and LOADING.sub('', before) != LOADING.sub('', text):
        raise ValueError(f'{work_dir} is of another configuration, budget, data set or '
                         'version of mmlavit: give another --out, or remove it')
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def data_stamp(config: Config) -> str:
    """What the tools that make data write beside it, as a comment."""
    root = Path(config.train_dataloader.dataset.get('data_root', ''))
    stamps = [folder / 'dataset.json' for folder in (root, *root.parents)]
    return next((f', data {stamp.read_text()}' for stamp in stamps if stamp.is_file()),
                '')


def progress(config: Config, work_dir: Path) -> Run:
    """Of a training, with its metric in per cent as ``score``."""
    metric = metric_of(config)
    run = read_run(config, work_dir, dict(score=metric.name))
    if (config.default_scope == 'mmdet' and run.complete and not run.figures
            and any(map(found_nothing, work_dir.glob('test/*/*.json')))):
        # mmdet gives no figure where a detector finds nothing in any image.
        run = run._replace(figures=dict(score=0.), figures_of=run.done)
    return run._replace(figures={
        name: value * metric.factor for name, value in run.figures.items()})


def found_nothing(result: Path) -> bool:
    """Whether the JSON of a test has no metric at all."""
    return json.loads(result.read_text()).keys() <= {'time', 'data_time'}


def last_checkpoint(config: Config, work_dir: Path) -> Path:
    """Of a complete training."""
    return work_dir / f'epoch_{config.train_cfg.max_epochs}.pth'


def launch(task: str, arguments: Sequence, log: Path) -> None:
    """Trains or tests in a process of its own; the work directory tells the end."""
    code = f'from mmlavit.launch import main; main({task!r})'
    with open(log, 'a') as file:
        subprocess.run([sys.executable, '-c', code, *map(str, arguments)],
                       stdout=file, stderr=subprocess.STDOUT, close_fds=False)
