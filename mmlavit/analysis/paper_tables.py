"""The paper's tables, and one of ours: published figures beside those of here."""
import json
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from mmengine.config import Config

from .building import build_model
from .complexity import count_macs, count_parameters
from .report import number
from .runs import Run, read_run

TOLERANCE = 0.05  # at which a count is said to agree with the published


class Table(NamedTuple):
    """What a table's rows have in common."""
    title: str
    sizes: Tuple[Tuple[int, int], ...]  # (height, width) of the input
    metrics: Dict[str, str]  # column: the toolbox's name for it
    note: str


TABLES = dict(
    classification=Table(
        'ImageNet-1K classification', ((224, 224), ),
        dict(top1='accuracy/top1'), ''),
    detection=Table(
        'COCO object detection, RetinaNet', ((800, 1280), ),
        {key: f'coco/bbox_mAP{suffix}' for key, suffix in (
            ('AP', ''), ('AP50', '_50'), ('AP75', '_75'), ('APs', '_s'),
            ('APm', '_m'), ('APl', '_l'))},
        'At which size the published figures were counted is not known.'),
    segmentation=Table(
        'ADE20K semantic segmentation', ((512, 512), (512, 2048)),
        dict(mIoU='mIoU', mIoU_ms='mIoU'),
        'mIoU_ms: several scales and flip (--result-ms). At which size the published '
        'figures were counted is not known.'),
    tiny_imagenet=Table(
        '100 classes of Tiny-ImageNet, small networks', ((128, 128), ),
        dict(top1='accuracy/top1'), 'No table of the paper.'))


class Row(NamedTuple):
    """A row of a table and what is known of it here."""
    published: dict  # of configs/published.yml
    config: Optional[Path] = None  # that trains it, if there is one
    work_dir: Optional[Path] = None
    run: Optional[Run] = None
    params: Optional[float] = None  # in millions
    macs: Tuple[float, ...] = ()  # in 1e9, at the table's sizes

    @property
    def model(self) -> str:
        return self.published['model']


def read_rows(table: Table, published: Sequence[dict], configs: Path,
              work_dirs: Path, results: Mapping[str, Path],
              results_ms: Mapping[str, Path]) -> List[Row]:
    """Rows with their trainings, as far as they have come.

    Args:
        table (Table): Theirs.
        published (Sequence[dict]): The rows of configs/published.yml.
        configs (Path): The folder in which their configs are.
        work_dirs (Path): With a work directory, named as the config, for each.
        results (Mapping[str, Path]): JSON of tests by the configs' names, instead
            of the last validation.
        results_ms (Mapping[str, Path]): The same of tests at several scales.
    """
    rows = []
    for row in published:
        if 'config' not in row:
            rows.append(Row(row))
            continue
        config = configs / row['config']
        work_dir, name = work_dirs / config.stem, config.stem
        run = read_run(
            Config.fromfile(config), work_dir,
            {column: metric for column, metric in table.metrics.items()
             if column != 'mIoU_ms'}, results.get(name))
        if name in results_ms:
            several = json.loads(results_ms[name].read_text())['mIoU']
            run = run._replace(figures=dict(run.figures, mIoU_ms=several))
        rows.append(Row(row, config, work_dir, run))
    return rows


def count(row: Row, table: Table) -> Row:
    """The row with parameters and multiply-adds of its model, if it has one."""
    if row.config is None:
        return row
    model = build_model(Config.fromfile(row.config))
    return row._replace(
        params=count_parameters(model) / 1e6,
        macs=tuple(count_macs(model, size) / 1e9 for size in table.sizes))


def make_cells(row: Row, table: Table) -> Dict[str, str]:
    """A counted row as it is written."""
    published = row.published
    # Nothing was trained here, but its weights are in the repository.
    known = (published.get('trained') if row.run is not None and not row.run.done
             and not row.run.figures else None)
    cells = {
        'model': row.model,
        'config': published.get('config', ''),
        'params, M (published)': number(published.get('params')),
        'params, M': number(row.params, 2),
        'MACs, G (published)': number(published.get('macs')),
    }
    for i, (height, width) in enumerate(table.sizes):
        cells[f'MACs, G at {height}x{width}'] = (
            number(row.macs[i], 2) if row.macs else '')
    for column in table.metrics:
        cells[f'{column} (published)'] = number(published.get(column))
        value = row.run.figures.get(column) if row.run else None
        # In per cent, as the tables are; mmdet's AP is a share of one.
        if value is not None and column[:2] == 'AP':
            value *= 100
        if value is None:
            value = (known or {}).get(column)
        cells[f'{column} trained here'] = number(value)
    cells['training'] = '' if row.run is None else str(row.run)
    if known:
        cells['training'] = 'of configs/published.yml'
    return cells


def compare_macs(row: Row, table: Table) -> Optional[str]:
    """With which input size the published count agrees, or that it does with none."""
    if 'macs' not in row.published or not row.macs:
        return None
    given = row.published['macs']
    published = f'{row.model}: the published {given} G'
    counts = [(f'{h}x{w}', macs) for (h, w), macs in zip(table.sizes, row.macs)]
    agree = [size for size, macs in counts if abs(macs / given - 1) <= TOLERANCE]
    if agree:
        return f'{published} agree with the count at {", ".join(agree)}.'
    counted = ', '.join(f'{macs:.4g} G at {size}' for size, macs in counts)
    return (f'{published} cannot be matched within {TOLERANCE:.0%}: counted '
            f'{counted}.')


class NextStep(NamedTuple):
    """What is to be done so that a row's training is complete."""
    title: str
    command: List[str]  # a script in tools and its arguments; empty: nothing


def next_step(row: Row, work_dirs: Path, gpus: Optional[int],
              train_args: Sequence[str]) -> NextStep:
    """Trains what is not complete, tests what was not validated.

    Args:
        row (Row): One with a config.
        work_dirs (Path): Where a config's pre-training is looked for, if it expects
            one in ``work_dirs``.
        gpus (int, optional): For the script. None: as many as the recipe has. With
            another number the learning rate is scaled.
        train_args (Sequence[str]): Further arguments of a training.
    """
    run = row.run
    gpus = gpus or recipe_gpus(row.config)
    if not run.complete:
        title = (f'resumed from {run.unit} {run.done} of {run.length}'
                 if run.done else 'started')
        command = ['dist_train.sh', row.config, gpus, '--work-dir', row.work_dir,
                   '--resume', '--auto-scale-lr', *train_args,
                   *pretraining_in(work_dirs, row.config)]
    elif run.figures_of != run.done:
        # Cut off between the last checkpoint and its validation.
        title = 'complete, tested'
        command = ['dist_test.sh', row.config, row.work_dir / run.checkpoint, gpus,
                   '--work-dir', row.work_dir / 'test']
    else:
        title, command = 'complete, skipped', []
    return NextStep(title, list(map(str, command)))


def recipe_gpus(config: Path) -> int:
    """On how many GPUs a config has the batch of its learning rate."""
    config = Config.fromfile(config)
    return config.auto_scale_lr.base_batch_size // config.train_dataloader.batch_size


def pretraining_in(work_dirs: Path, config: Path) -> List[str]:
    """Where ``work_dirs`` has the pre-training that a config expects in work_dirs."""
    init_cfg = Config.fromfile(config).model.get('backbone', {}).get('init_cfg')
    checkpoint = Path((init_cfg or {}).get('checkpoint', ''))
    if checkpoint.parts[:1] != ('work_dirs', ):
        return []
    return ['--cfg-options', 'model.backbone.init_cfg.checkpoint='
            f'{work_dirs.joinpath(*checkpoint.parts[1:])}']
