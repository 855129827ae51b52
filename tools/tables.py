"""The paper's tables: published figures beside those measured and trained here.

    python tools/tables.py classification            # or detection, segmentation, all
    python tools/tables.py detection --only LaViT-S --run --gpus 8

Every row has the published figures of configs/published.yml, the parameters and
multiply-adds of this implementation, counted now at the tables' input sizes with
attention products included, and what was trained here, read from the work
directories. Writes Markdown and CSV to work_dirs/tables.

``--run`` trains the rows whose training is not complete, one after the other,
through tools/dist_train.sh; what was cut off is resumed, what is done skipped.
"""
import argparse
import csv
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import yaml
from mmengine.config import Config
from tqdm import tqdm

import mmlavit  # noqa: F401  (registers LaViT)
from mmlavit.building import build_model
from mmlavit.complexity import count_macs
from mmlavit.logs import read_scalars

ROOT = Path(__file__).resolve().parents[1]


class Table(NamedTuple):
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
        'figures were counted is not known.'))
TOLERANCE = 0.05  # at which a count is said to agree with the published


def measure(config: Path, sizes: Tuple[Tuple[int, int], ...]) -> dict:
    """Parameters in millions and multiply-adds in G at every input size."""
    model = build_model(Config.fromfile(config))
    return dict(
        params=sum(p.numel() for p in model.parameters()) / 1e6,
        macs=[count_macs(model, size) / 1e9 for size in sizes])


class Training(NamedTuple):
    """How far the training in a work directory has come."""
    done: int
    length: int
    unit: str
    metrics: Dict[str, float]
    metrics_of: int  # epoch or iteration of the validation

    @property
    def complete(self) -> bool:
        return self.done >= self.length

    def __str__(self) -> str:
        if not self.done:
            return 'not yet run'
        text = ('complete' if self.complete else
                f'{self.unit} {self.done} of {self.length}')
        if self.metrics_of != self.done:
            text += (f', validated at {self.unit} {self.metrics_of}'
                     if self.metrics else ', not validated')
        return text


def read_training(config: Path, work_dir: Path, table: Table,
                  result: Optional[Path] = None,
                  result_ms: Optional[Path] = None) -> Training:
    """Progress by the last checkpoint; figures of the last validation, or of
    ``result``, a JSON file of tools/test.py (``result_ms``: with --tta)."""
    train_cfg = Config.fromfile(config).train_cfg
    if 'max_iters' in train_cfg:
        unit, length = 'iter', train_cfg.max_iters
    else:
        unit, length = 'epoch', train_cfg.max_epochs
    last = work_dir / 'last_checkpoint'
    match = last.is_file() and re.search(rf'{unit}_(\d+)\.pth',
                                         last.read_text())
    done = int(match[1]) if match else 0
    lines = read_scalars(work_dir)
    # Tests through --run end in a folder of their own, of the last checkpoint.
    lines += [dict(json.loads(path.read_text()), step=done)
              for path in sorted(work_dir.glob('test/*/*.json'))]
    if result is not None:
        lines = [dict(json.loads(result.read_text()), step=done)]
    columns = {column: name for column, name in table.metrics.items()
               if column != 'mIoU_ms'}
    metrics, metrics_of = {}, 0
    for values in lines:
        found = {column: values[name] for column, name in columns.items()
                 if name in values}
        if found:
            metrics, metrics_of = found, values.get('step', 0)
    if result_ms is not None:
        metrics['mIoU_ms'] = json.loads(result_ms.read_text())['mIoU']
    return Training(done, length, unit, metrics, metrics_of)


def number(value: Optional[float], digits: int = 1) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def scaled(column: str, value: Optional[float]) -> Optional[float]:
    """In per cent, as the tables are; mmdet's AP is a share of one."""
    return value * 100 if value is not None and column[:2] == 'AP' else value


def make_rows(table: Table, rows: List[dict], trainings: dict) -> List[dict]:
    """The table's cells as text."""
    cells = []
    for row in tqdm(rows, 'counting', disable=None):
        counted = {}
        if 'config' in row:
            counted = measure(row['path'], table.sizes)
        training = trainings.get(row['model'])
        cell = {
            'model': row['model'],
            'config': row.get('config', ''),
            'params, M (published)': number(row.get('params')),
            'params, M': number(counted.get('params'), 2),
            'MACs, G (published)': number(row.get('macs')),
        }
        for i, size in enumerate(table.sizes):
            cell[f'MACs, G at {size[0]}x{size[1]}'] = (
                number(counted['macs'][i], 2) if counted else '')
        for column in table.metrics:
            cell[f'{column} (published)'] = number(row.get(column))
            value = training and training.metrics.get(column)
            cell[f'{column} trained here'] = number(scaled(column, value))
        cell['training'] = '' if training is None else str(training)
        row['agrees'] = [
            size for size, macs in zip(table.sizes, counted.get('macs', ()))
            if 'macs' in row and abs(macs / row['macs'] - 1) <= TOLERANCE
        ]
        row['counts'] = counted.get('macs', ())
        cells.append(cell)
    return cells


def agreement(table: Table, rows: List[dict]) -> List[str]:
    """Which published counts agree with which input size, and which do not."""
    notes = [table.note] if table.note else []
    for row in rows:
        if 'macs' not in row or 'config' not in row:
            continue
        published = f"{row['model']}: the published {row['macs']} G"
        if row['agrees']:
            where = ', '.join(f'{h}x{w}' for h, w in row['agrees'])
            notes.append(f'{published} agree with the count at {where}.')
        else:
            counts = ', '.join(
                f'{count:.4g} G at {h}x{w}'
                for count, (h, w) in zip(row['counts'], table.sizes))
            notes.append(f'{published} cannot be matched within '
                         f'{TOLERANCE:.0%}: counted {counts}.')
    return notes


def write(name: str, cells: List[dict], notes: List[str], out: Path) -> str:
    """Writes OUT/NAME.md and .csv; returns the Markdown."""
    # Without columns in which nothing stands.
    columns = [key for key in cells[0] if any(cell[key] for cell in cells)]
    lines = [f'## {TABLES[name].title}', '', ' | '.join(['', *columns, '']),
             ' | '.join(['', *('---' for _ in columns), ''])]
    lines += [' | '.join(['', *(c[key] for key in columns), '']) for c in cells]
    lines += ['', *(f'- {note}' for note in notes), '']
    text = '\n'.join(line.strip() for line in lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / f'{name}.md').write_text(text + '\n')
    with open(out / f'{name}.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(cells)
    return text


def run(rows: List[dict], trainings: dict, args: argparse.Namespace) -> None:
    """Trains what is not complete; stops at the first that fails."""
    for i, row in enumerate(rows, 1):
        training = trainings[row['model']]
        title = f"[{i}/{len(rows)}] {row['model']} ({row['config']})"
        if not training.complete:
            print(f'{title}: ' + (
                f'resumed from {training.unit} {training.done} of '
                f'{training.length}' if training.done else 'started'),
                flush=True)
            command = [
                'dist_train.sh', row['path'], args.gpus, '--work-dir',
                row['work_dir'], '--resume', *args.train_args,
                *pretrained_in(row['path'], args)
            ]
        elif training.metrics_of != training.done:
            # Cut off between the last checkpoint and its validation.
            print(f'{title}: complete, tested', flush=True)
            last = (row['work_dir'] / 'last_checkpoint').read_text()
            command = ['dist_test.sh', row['path'], last, args.gpus,
                       '--work-dir', row['work_dir'] / 'test']
        else:
            print(f'{title}: complete, skipped', flush=True)
            continue
        tool, *arguments = map(str, command)
        code = subprocess.run(
            ['bash', str(ROOT / 'tools' / tool), *arguments]).returncode
        if code:
            sys.exit(f"{title}: failed with exit code {code}; its log is in "
                     f"{row['work_dir']}. Run this again to go on.")


def pretrained_in(config: Path, args: argparse.Namespace) -> List[str]:
    """Where --work-dirs has the pre-training that a config expects in work_dirs."""
    init_cfg = Config.fromfile(config).model.get('backbone', {}).get('init_cfg')
    checkpoint = Path((init_cfg or {}).get('checkpoint', ''))
    if checkpoint.parts[:1] != ('work_dirs', ):
        return []
    return ['--cfg-options', 'model.backbone.init_cfg.checkpoint='
            f'{args.work_dirs.joinpath(*checkpoint.parts[1:])}']


def parse_args(args: Optional[list]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', choices=[*TABLES, 'all'])
    parser.add_argument(
        '--published', type=Path, default=ROOT / 'configs/published.yml',
        help='the rows and their published figures')
    parser.add_argument(
        '--work-dirs', type=Path, default=Path('work_dirs'),
        help='folder with a work directory for every config, default work_dirs')
    parser.add_argument(
        '--result', action='append', default=[], metavar='CONFIG=FILE',
        help="JSON of tools/test.py for a row, by its config's name")
    parser.add_argument(
        '--result-ms', action='append', default=[], metavar='CONFIG=FILE',
        help='the same of a test with --tta')
    parser.add_argument(
        '--only', default='', help='rows whose model contains this')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/tables'))
    parser.add_argument(
        '--run', action='store_true', help='train what is not complete')
    parser.add_argument('--gpus', type=int, default=8, help='default 8')
    parser.add_argument(
        '--train-args', nargs=argparse.REMAINDER, default=[],
        help='the rest of the line, for tools/train.py: --amp ...')
    args = parser.parse_args(args)
    for item in args.result + args.result_ms:
        if '=' not in item:
            parser.error(f'{item}: expected CONFIG=FILE')
    return args


def main(args: Optional[list] = None) -> None:
    args = parse_args(args)
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    published = yaml.safe_load(args.published.read_text())
    results, results_ms = (
        {config: Path(file) for config, file in
         (item.split('=', 1) for item in items)}
        for items in (args.result, args.result_ms))
    found = False
    for name in TABLES if args.table == 'all' else [args.table]:
        table, trainings = TABLES[name], {}
        rows = [row for row in published.get(name, [])
                if args.only in row['model']]
        if not rows:
            print(f'{name}: no row with {args.only!r}')
            continue
        found = True
        trainable = [row for row in rows if 'config' in row]

        def look():
            for row in trainable:
                row['path'] = args.published.parent / row['config']
                row['work_dir'] = args.work_dirs / row['path'].stem
                name = row['path'].stem
                trainings[row['model']] = read_training(
                    row['path'], row['work_dir'], table, results.get(name),
                    results_ms.get(name))

        look()
        if args.run:
            run(trainable, trainings, args)
            look()
        cells = make_rows(table, rows, trainings)
        print(write(name, cells, agreement(table, rows), args.out))
        print(f'\nwritten to {args.out}/{name}.md and .csv\n')
    if not found:
        sys.exit(f'--only {args.only}: expected a part of a name such as LaViT-S')


if __name__ == '__main__':
    main()
