"""What one GPU says of mmlavit, by one command: ``bash tools/gpu_report.sh``.

Every part runs in a process of its own, so that none takes the others with it, and
leaves a JSON file. A part that has one is not run again. The page is written anew
after each.
"""
import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Dict, Optional, Sequence

import torch

from .gpu_report_parts import FULL, SMALL, Plan, parts_of
from .report import markdown_table, number

ROOT = Path(__file__).resolve().parents[2]
PART_SHARE = .5  # of the time, so that no part takes that of all
LEAST_SECONDS = 20  # in which no part can do anything


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the parts that have no result yet, as far as the time goes.

    Returns:
        int: 0 when all parts have results, 1 when some are missing, 2 without a GPU.
    """
    args = parse_args(argv)
    plan = SMALL if args.try_on_cpu else FULL
    if plan.device == 'cuda' and not torch.cuda.is_available():
        print('No GPU: torch.cuda.is_available() is False. The report is of a GPU '
              'alone; --try-on-cpu runs its parts in small, to see that they run.',
              file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True  # every network's best convolutions
    if args.part:
        write_json(result_path(args.out, args.part),
                   parts_of(plan)[args.part](plan, args.out))
        return 0
    return run_all(plan, args.out, 60 * args.minutes)


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='bash tools/gpu_report.sh',
        description='Runs mmlavit on a GPU and writes what it says: CUDA operators, '
        "the suite's tests, benchmarks, a training, profiles. Needs no network. Run "
        'it again to go on where it stopped.')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/gpu_report'), metavar='DIR',
        help='gpu_report.md, gpu_report.json and the results of the parts; default: '
        '%(default)s; e.g. --out work_dirs/h100')
    parser.add_argument(
        '--minutes', type=float, default=20, metavar='N',
        help='after which it stops; default: %(default)s; e.g. --minutes 9')
    parser.add_argument(
        '--try-on-cpu', action='store_true',
        help='every part in small on the CPU, whose figures mean nothing; default: '
        'not; e.g. --try-on-cpu')
    parser.add_argument('--part', default='', help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_all(plan: Plan, out: Path, seconds: float) -> int:
    """Each part in turn, the page after each; 0 if all have results."""
    end = time.monotonic() + seconds
    names = list(parts_of(plan))
    for i, name in enumerate(names, 1):
        left = end - time.monotonic()
        if result_path(out, name).is_file():
            state = 'has its result'
        elif left < LEAST_SECONDS:
            state = 'not yet run: the time is over'
        else:
            print(f'[{i}/{len(names)}] {name} ...', flush=True)
            state = run_part(name, plan, out, min(left, PART_SHARE * seconds))
        print(f'[{i}/{len(names)}] {name}: {state}', flush=True)
        write_page(plan, out)
    missing = [name for name in names if not result_path(out, name).is_file()]
    print(f'written to {out / "gpu_report.md"}')
    if missing:
        print(f'Without a result: {", ".join(missing)}. Run the same command again.')
    return 1 if missing else 0


def run_part(name: str, plan: Plan, out: Path, seconds: float) -> str:
    """Runs a part in a process; in words how that ended."""
    log = result_path(out, name).with_suffix('.log')
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'mmlavit.analysis.gpu_report', '--out', str(out),
               '--part', name, *(['--try-on-cpu'] if plan.device == 'cpu' else [])]
    begin = time.monotonic()
    with open(log, 'w') as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=Path.cwd(),
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(
                [str(ROOT), os.environ.get('PYTHONPATH', '')])},
            start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # and what it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    taken = f'{time.monotonic() - begin:.0f} s'
    if code is None:
        return f'stopped after {taken}, see {log}'
    return f'done in {taken}' if code == 0 else f'failed after {taken}, see {log}'


def result_path(out: Path, name: str) -> Path:
    return out / 'parts' / f'{name}.json'


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all: what is there counts as done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    part.write_text(json.dumps(content, indent=1) + '\n')
    part.replace(path)


def write_page(plan: Plan, out: Path) -> None:
    """gpu_report.md and gpu_report.json of the parts that have results."""
    names = list(parts_of(plan))
    results = {name: json.loads(result_path(out, name).read_text()) for name in names
               if result_path(out, name).is_file()}
    lines = ['# On a GPU', '', '`bash tools/gpu_report.sh`', '',
             markdown_table([dict(zip(('', 'this machine'), row))
                             for row in machine(plan.device).items()])]
    for name in names:
        lines += ['', results[name]['markdown'] if name in results else
                  f'## {name}\n\n**Not yet run** or failed.']
    (out / 'gpu_report.md').write_text('\n'.join(lines) + '\n')
    write_json(out / 'gpu_report.json',
               dict(machine=machine(plan.device), parts=results))


def machine(device: str) -> Dict[str, str]:
    """What the figures were measured on."""
    rows = {'device': f'{platform.machine()} CPU: **a trial, no figure counts**'}
    if device == 'cuda':
        card = torch.cuda.get_device_properties(0)
        rows = {'device': card.name,
                'memory': f'{number(card.total_memory / 1e9)} GB',
                'compute capability': f'{card.major}.{card.minor}',
                'CUDA of torch': str(torch.version.cuda),
                'cuDNN': str(torch.backends.cudnn.version()),
                'TF32 in float32 products, convolutions':
                f'{torch.backends.cuda.matmul.allow_tf32}, '
                f'{torch.backends.cudnn.allow_tf32}',
                'cudnn.benchmark': str(torch.backends.cudnn.benchmark)}
    rows['Python'] = platform.python_version()
    for package in ('torch', 'mmcv', 'mmdet', 'mmpretrain', 'timm'):
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = 'not installed by this name'
    return rows


if __name__ == '__main__':
    sys.exit(main())
