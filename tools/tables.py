"""The paper's tables: published figures beside those measured and trained here.

    python tools/tables.py classification            # or detection, segmentation, all
    python tools/tables.py detection --only LaViT-S --run --gpus 8
    python tools/tables.py tiny_imagenet
    python tools/tables.py small --seeds 0 1 2

Every row has the published figures of configs/published.yml, the parameters and
multiply-adds of this implementation, counted now at the tables' input sizes with
attention products included, and what was trained here, read from the work
directories. Writes Markdown and CSV to work_dirs/tables.

``--run`` trains the rows whose training is not complete, one after the other,
through tools/dist_train.sh; what was cut off is resumed, what is done skipped.

``tiny_imagenet`` is no table of the paper: the small networks that were trained on 100
classes of Tiny-ImageNet. ``all`` are the paper's three.

``small`` is the three tables on scanned digits with LaViT-N and its peers, all trained from
scratch here and now: hours on a laptop. What is done is skipped, what was cut off is
resumed.
"""
import argparse
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Sequence

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLES = ('classification', 'detection', 'segmentation')
SEEDS = [0, 1, 2]


def by_config(items: List[str]) -> Dict[str, Path]:
    """CONFIG=FILE ... as a dict."""
    return {config: Path(file) for config, _, file in
            (item.partition('=') for item in items)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'table', choices=[*TABLES, 'all', 'tiny_imagenet', 'small'],
        help='e.g. classification')
    parser.add_argument(
        '--published', type=Path, default=ROOT / 'configs/published.yml',
        metavar='FILE',
        help='the rows and their published figures, beside the configs; default: '
        'configs/published.yml; e.g. --published mine/published.yml')
    parser.add_argument(
        '--work-dirs', type=Path, default=Path('work_dirs'), metavar='DIR',
        help='folder with a work directory for every config; default: '
        '%(default)s; e.g. --work-dirs /data/work_dirs')
    parser.add_argument(
        '--result', action='append', default=[], metavar='CONFIG=FILE',
        help="JSON of tools/test.py for a row, by its config's name; default: the "
        'last validation; e.g. --result retinanet_lavit_s_coco=result.json')
    parser.add_argument(
        '--result-ms', action='append', default=[], metavar='CONFIG=FILE',
        help='the same of a test with --tta; default: none; e.g. --result-ms '
        'upernet_lavit_s_ade20k=result.json')
    parser.add_argument(
        '--only', default='', metavar='TEXT',
        help='rows whose model contains this; default: all; e.g. --only LaViT-S')
    parser.add_argument(
        '--seeds', type=int, nargs='+', metavar='SEED',
        help='of small: a training of every network for each; default: 0 1 2; e.g. '
        '--seeds 0')
    parser.add_argument(
        '--tasks', nargs='+', choices=TABLES, metavar='TABLE',
        help='of small: some of the three tables; default: all; e.g. --tasks '
        'classification')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/tables'), metavar='DIR',
        help='folder that is written to; default: %(default)s; e.g. --out tables')
    parser.add_argument(
        '--run', action='store_true',
        help='train what is not complete; default: off; e.g. --run')
    parser.add_argument(
        '--gpus', type=int, metavar='N',
        help="of a training; default: the recipe's, 8 in the paper's tables; with "
        'another number the learning rate is scaled; e.g. --gpus 4')
    parser.add_argument(
        '--train-args', nargs=argparse.REMAINDER, default=[],
        help='the rest of the line, for tools/train.py; default: none; e.g. '
        '--train-args --amp')
    args = parser.parse_args()
    for item in args.result + args.result_ms:
        config, _, file = item.partition('=')
        if not file:
            parser.error(f'{item}: expected CONFIG=FILE')
        if not Path(file).is_file():
            parser.error(f'{item}: {file}: no such file')
        if not list(args.published.parent.rglob(f'{config}.py')):
            parser.error(f'{item}: expected the name of a config in the folder of '
                         f'{args.published}, such as retinanet_lavit_s_coco')
    if args.table == 'small':
        of_others = 'run', 'result', 'result_ms', 'train_args', 'gpus', 'work_dirs'
        given = [f'--{name.replace("_", "-")}' for name in of_others
                 if getattr(args, name) != parser.get_default(name)]
        if given:
            parser.error(f'small: expected no {", ".join(given)}')
        args.seeds, args.tasks = args.seeds or SEEDS, args.tasks or list(TABLES)
        for name in ('seeds', 'tasks'):
            values = getattr(args, name)
            if len(set(values)) < len(values):
                parser.error(f'--{name} {" ".join(map(str, values))}: expected each once')
    elif args.seeds or args.tasks:
        parser.error('--seeds, --tasks: expected the table small with them')
    return args


def main() -> None:
    args = parse_args()
    # So that the training that runs is ended, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if args.table == 'small':
        small(args.only, args.tasks, args.seeds, args.out / 'small',
              args.published.parent)
    else:
        published(args)


def small(only: str, tasks: Sequence[str], seeds: Sequence[int], out: Path,
          configs: Path) -> None:
    """Trains what is not complete and prints the table.

    A training that fails leaves a gap in it, and the exit code is 1.
    """
    # After parsing: it takes seconds, which --help need not wait for.
    from tqdm import tqdm

    from mmlavit.analysis.report import markdown_table, write_csv
    from mmlavit.analysis.small_tables import (NETWORKS, describe, make_row,
                                               train_network)
    logging.disable(logging.INFO)
    networks = [name for name in NETWORKS if only in name]
    if not networks:
        sys.exit(f'--only {only}: expected a part of one of {", ".join(NETWORKS)}')
    if subprocess.run([sys.executable, str(ROOT / 'tools/make_digits.py'),
                       'data/digits']).returncode:
        sys.exit('the digits could not be made')
    runs = [(task, name, seed) for seed in seeds for task in tasks for name in networks]
    scores, failed = {}, []
    for i, (task, name, seed) in enumerate(tqdm(runs, 'training', disable=None), 1):
        title = f'[{i}/{len(runs)}] {task}, {name}, seed {seed}'
        try:
            scores[task, name, seed] = train_network(configs, out, task, name, seed)
            tqdm.write(f'{title}: {scores[task, name, seed]:.1f} %')
        except (RuntimeError, ValueError) as error:
            failed.append(f'{title}: {error}')
            tqdm.write(failed[-1])
    rows = [make_row(configs, name, tasks, scores) for name in networks]
    text = (f'{describe(tasks)}; from scratch, seeds '
            f'{" ".join(map(str, seeds))}.\n\n{markdown_table(rows)}\n')
    # A part of the table does not take the place of the whole.
    part = [*(tasks if len(tasks) < len(TABLES) else []), *only.split()]
    if seeds != SEEDS:
        part += ['seeds', *map(str, seeds)]
    name = '_'.join(['small', *part])
    (out / f'{name}.md').write_text(text)
    write_csv(rows, out / f'{name}.csv')
    each = [dict(task=task, network=network, seed=seed, score=f'{score:.2f}')
            for (task, network, seed), score in scores.items()]
    if each:  # else there are no columns
        write_csv(each, out / f'{name}_scores.csv')
    print(f'\n{text}\nwritten to {out / name}.md and .csv, the score of each training '
          f'to {name}_scores.csv')
    if failed:
        sys.exit('\n'.join(['not complete:', *failed]))


def published(args: argparse.Namespace) -> None:
    """The paper's own tables."""
    known = yaml.safe_load(args.published.read_text())
    chosen = {
        name: [row for row in known.get(name, []) if args.only in row['model']]
        for name in (TABLES if args.table == 'all' else [args.table])
    }
    if not any(chosen.values()):
        sys.exit(f'--only {args.only}: expected a part of a name such as LaViT-S')
    # After parsing: it takes seconds, which --help need not wait for.
    from tqdm import tqdm

    from mmlavit.analysis import paper_tables
    from mmlavit.analysis.paper_tables import (compare_macs, count, make_cells,
                                               next_step, read_rows)
    from mmlavit.analysis.report import (markdown_table, without_empty_columns,
                                         write_csv)
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    for name, published_rows in chosen.items():
        if not published_rows:
            print(f'{name}: no row with {args.only!r}')
            continue
        table = paper_tables.TABLES[name]

        def read() -> list:
            return read_rows(table, published_rows, args.published.parent,
                             args.work_dirs, by_config(args.result),
                             by_config(args.result_ms))

        if args.run:
            rows = [row for row in read() if row.config]
            for i, row in enumerate(rows, 1):
                step = next_step(row, args.work_dirs, args.gpus, args.train_args)
                title = f"[{i}/{len(rows)}] {row.model} ({row.published['config']})"
                print(f'{title}: {step.title}', flush=True)
                run(step.command, f'{title}: failed', row.work_dir)
        rows = [count(row, table) for row in tqdm(read(), 'counting', disable=None)]
        cells = without_empty_columns([make_cells(row, table) for row in rows])
        notes = [table.note, *(compare_macs(row, table) for row in rows)]
        text = '\n'.join([f'## {table.title}', '', markdown_table(cells), '',
                          *(f'- {note}' for note in notes if note)])
        out = args.out / '_'.join([name, *args.only.split()])
        write_csv(cells, out.with_name(f'{out.name}.csv'))
        out.with_name(f'{out.name}.md').write_text(f'{text}\n')
        print(f'{text}\n\nwritten to {out}.md and .csv\n')


def run(command: List[str], failed: str, work_dir: Path) -> None:
    """Runs one of our scripts, if any; ends with the first that fails."""
    if not command:
        return
    script, *arguments = command
    code = subprocess.run(
        ['bash', str(ROOT / 'tools' / script), *arguments]).returncode
    if code:
        sys.exit(f'{failed} with exit code {code}; its log is in {work_dir}. Run '
                 'this again to go on.')


if __name__ == '__main__':
    main()
