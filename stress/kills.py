"""Kills a training again and again, and compares it with one left alone.

    python stress/kills.py DIR [--kills 20] [--by-iter] [--random]

Every other SIGKILL comes while a checkpoint is being written, the rest up to 3
seconds after the process's first iteration. Each time the training goes on with
``--resume``. Prints a row for each kill, and at the end whether the final weights
and optimizer states are the same, bit for bit. Not part of the quick suite.
"""
import argparse
import contextlib
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from builders import RANDOM_IMAGES, digits_config

ROOT = Path(__file__).parents[1]


def command(config: Path, work_dir: Path) -> list:
    return [sys.executable, str(ROOT / 'tools/train.py'), str(config),
            '--work-dir', str(work_dir), '--resume']


def kill_once(config: Path, work_dir: Path, writing: bool,
              rng: random.Random) -> str:
    """Trains until it is killed; says when that was."""
    log = work_dir.with_suffix('.log')
    start, begun, wait = time.time(), None, rng.uniform(0, 3)
    writes, seen = rng.randint(1, 3), set()
    with log.open('w') as file:
        process = subprocess.Popen(
            command(config, work_dir), stdout=file, stderr=file)
        while process.poll() is None:
            if writing:
                seen |= being_written(work_dir, start)
                now = len(seen) >= writes
            else:
                if begun is None and '(train)' in log.read_text():
                    begun = time.time()
                now = begun is not None and time.time() - begun > wait
            if now:
                process.kill()
            time.sleep(0.0003 if writing else 0.05)
    when = f'writing {max(seen)[:-5]}' if seen else 'at random'
    if process.returncode == 0:
        when = 'not: it had ended'
    elif process.returncode > 0:
        raise SystemExit(f'the training failed by itself: {log}')
    resumed = re.findall(r'resumed epoch: \d+, iter: \d+', log.read_text())
    return (f'{when:<24} after {time.time() - start:4.1f} s | '
            f'{resumed[0] if resumed else "from the start or not yet begun"}')


def being_written(work_dir: Path, since: float) -> set:
    """Names of files in the making; not what an earlier kill left."""
    names = set()
    for path in work_dir.glob('*.part'):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > since:
                names.add(path.name)
    return names


def final_state(work_dir: Path) -> dict:
    from mmlavit.engine.safe_loading import load_from_local
    path = (work_dir / 'last_checkpoint').read_text()
    checkpoint = load_from_local(path)
    moments = checkpoint['optimizer']['state'].items()
    return dict(
        checkpoint['state_dict'],
        **{f'optimizer.{i}.{name}': torch.as_tensor(value)
           for i, state in moments for name, value in state.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dir', type=Path,
                        help='folder for data and trainings; e.g. /tmp/kills')
    parser.add_argument('--kills', type=int, default=20, metavar='N',
                        help='default: %(default)s; e.g. --kills 4')
    parser.add_argument('--epochs', type=int, default=80, metavar='N',
                        help='of the training, 4 iterations each; more than the kills '
                        'leave time for; default: %(default)s; e.g. --epochs 12')
    parser.add_argument('--by-iter', action='store_true',
                        help='iteration-based loop; default: epochs; e.g. --by-iter')
    parser.add_argument('--random', action='store_true',
                        help='with drop path, random crops and flips; default: '
                        'without; e.g. --random')
    parser.add_argument('--workers', type=int, default=0, metavar='N',
                        help='persistent workers that load the images; default: '
                        '%(default)s; e.g. --workers 2')
    parser.add_argument('--seed', type=int, default=0,
                        help='of the moments of kills; default: %(default)s; '
                        'e.g. --seed 1')
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    data = args.dir / 'digits'
    subprocess.run([sys.executable, ROOT / 'tools/make_digits.py', data,
                    '--train', '2', '--val', '2'], check=True)
    options = dict(
        train_dataloader__num_workers=args.workers,
        train_dataloader__persistent_workers=args.workers > 0)
    if args.random:
        options.update(
            model__backbone__drop_path_rate=0.2,
            train_dataloader__dataset__pipeline=RANDOM_IMAGES)
    if args.by_iter:
        options.update(
            train_cfg=dict(_delete_=True, by_epoch=False,
                           max_iters=args.epochs * 4),
            train_dataloader__sampler__type='InfiniteSampler',
            param_scheduler__by_epoch=False)
    else:
        options.update(train_cfg__max_epochs=args.epochs)
    config = args.dir / 'config.py'
    digits_config(
        data,
        default_hooks__checkpoint=dict(
            type='CheckpointHook', interval=4 if args.by_iter else 1,
            by_epoch=not args.by_iter, max_keep_ckpts=2),
        **options).dump(config)

    whole, killed = args.dir / 'whole', args.dir / 'killed'
    for work_dir in (whole, killed):
        work_dir.mkdir()
    with (args.dir / 'whole.log').open('w') as log:
        subprocess.run(command(config, whole), stdout=log, stderr=log,
                       check=True)
    rng = random.Random(args.seed)
    for i in range(args.kills):
        report = kill_once(config, killed, i % 2 == 1, rng)
        files = sorted(path.name for path in killed.glob('*.pth*'))
        print(f'{i + 1:3} | {report} | left: {" ".join(files)}', flush=True)
    with (args.dir / 'killed.log').open('w') as log:
        subprocess.run(command(config, killed), stdout=log, stderr=log,
                       check=True)
    states = final_state(whole), final_state(killed)
    assert states[0].keys() == states[1].keys()
    differ = [name for name, value in states[0].items()
              if not torch.equal(value, states[1][name])]
    print(f'{len(states[0])} tensors of weights and optimizer: '
          f'{len(differ)} differ')


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    main()
