"""The steps of tools/demo.sh, which sets up their environment, and their screen.

    python tools/demo.py [--short] [--verbose]

The screen shows the steps, a bar of the training and what came out; all that the
steps print goes to demo.log in the work directory.
"""
import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Callable, List, Optional

from mmengine.config import Config
from tqdm import tqdm

CONFIG = Path('configs/retinanet_lavit_n_digits.py')
DATA = Path('data/digits')
# Hardly trained, it scores everything low: keep all detections.
SHORT = {
    'train_dataloader.dataset.indices': 24,
    'val_dataloader.dataset.indices': 10,
    'test_dataloader.dataset.indices': 10,
    'train_cfg.val_interval': 1,
    'model.test_cfg.score_thr': 0.,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--short', action='store_true',
        help='a few iterations, save, resume, test; default: the whole training; '
        'e.g. --short')
    parser.add_argument(
        '--verbose', action='store_true',
        help='show all that the steps print; default: it is in demo.log; '
        'e.g. --verbose')
    return parser.parse_args()


class Steps:
    """Runs commands one by one and keeps what they print in a log.

    Args:
        log (Path): The file to append to.
        verbose (bool): Whether to show it on the screen too. Default: False.
    """

    def __init__(self, log: Path, verbose: bool = False) -> None:
        self.log = log
        self.verbose = verbose
        self.name = ''

    def begin(self, name: str) -> None:
        """Shows the name of the step that the next commands belong to."""
        self.name = name
        print(f'\n{name}', flush=True)

    def run(self, *command, watch: Callable[[], None] = lambda: None) -> str:
        """Runs a command and returns what it printed.

        Args:
            command: Its words.
            watch: Called twice a second while it runs, and once after, unless
                all is shown.

        Raises:
            SystemExit: If it fails, with the end of what it printed.
        """
        words = [str(word) for word in command]
        with self.log.open('a') as out:
            out.write(f'\n=== {self.name}\n$ {shlex.join(words)}\n')
            out.flush()
            with self.log.open(errors='replace') as printed:
                printed.seek(0, os.SEEK_END)
                start = printed.tell()
                # Open files are passed on: one is the lock of demo.sh.
                process = subprocess.Popen(
                    words, stdout=out, stderr=subprocess.STDOUT,
                    close_fds=False,
                    env={**os.environ, 'PYTHONUNBUFFERED': '1'})
                try:
                    code = None
                    while code is None:
                        code = wait(process, 0.5)
                        if self.verbose:
                            print(printed.read(), end='', flush=True)
                        else:
                            watch()
                finally:
                    process.terminate()
                    process.wait()
                printed.seek(start)
                text = printed.read()
        if code:
            sys.exit(self.failure(code, text))
        return text

    def failure(self, code: int, text: str) -> str:
        end = '\n'.join(f'    {line}' for line in text.splitlines()[-15:])
        return (f'\nFAILED with exit code {code}: {self.name}\n{end}\n'
                f'The whole log is {self.log}. Mend what it names and run the '
                'same command again: it goes on from here.')


def wait(process: subprocess.Popen, seconds: float) -> Optional[int]:
    """The exit code, or None if the process still runs after that time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


class Progress:
    """How far a training is, from the scalars that mmengine logs.

    In a terminal a bar, elsewhere a line for each tenth.

    Args:
        read (Callable): Gives the lines of scalars of all parts of the run.
        total (int): Iterations to do.
        done (int): Iterations that a part before has done. Default: 0.
        terminal (bool): Whether to draw a bar. Default: where stdout is one.
    """

    def __init__(self, read: Callable[[], List[dict]], total: int, done: int = 0,
                 terminal: Optional[bool] = None) -> None:
        if terminal is None:
            terminal = sys.stdout.isatty()
        self.read = read
        self.old = len(read())
        self.total = total
        self.step = done
        self.values = {}
        self.bar = tqdm(total=total, initial=done, desc='    training',
                        unit='it', file=sys.stdout, dynamic_ncols=True,
                        disable=not terminal)

    def __call__(self) -> None:
        """Reads what is new and shows it."""
        before = self.step
        for line in self.read()[self.old:]:
            if 'loss' in line:
                self.step = line['step']
                self.values['loss'] = f'{line["loss"]:.2f}'
            elif 'coco/bbox_mAP' in line:
                self.values['AP'] = f'{line["coco/bbox_mAP"]:.3f}'
        if self.bar.disable:
            if self.step * 10 // self.total > before * 10 // self.total:
                values = ', '.join(f'{k} {v}' for k, v in self.values.items())
                print(f'    {self.step}/{self.total} iterations: {values}',
                      flush=True)
        else:
            self.bar.set_postfix(self.values, refresh=False)
            self.bar.update(self.step - before)
            self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


def choose_threads(measure: Callable[[int], float],
                   cores: int) -> Optional[int]:
    """The faster of one thread and one a core, or None if the user chose.

    Args:
        measure: Gives the seconds of a training step with so many threads.
        cores: How many cores there are.
    """
    if 'OMP_NUM_THREADS' in os.environ:
        print(f'    OMP_NUM_THREADS={os.environ["OMP_NUM_THREADS"]}, as you set it')
        return None
    if cores == 1:
        return 1
    seconds = {n: measure(n) for n in (1, cores)}
    best = min(seconds, key=seconds.get)
    times = ', '.join(f'{s:.2f} s with {n}' for n, s in seconds.items())
    print(f'    {best} of {cores}: a training step takes {times}', flush=True)
    return best


def remove_other(work_dir: Path) -> None:
    """Removes a run of other code or data: it is no start for this one."""
    sources = [*sorted(Path('mmlavit').rglob('*.py')),
               *sorted(Path('configs').rglob('*.py')),
               Path('tools/make_digits.py')]
    made_by = str(zlib.crc32(b''.join(path.read_bytes() for path in sources)))
    stamp = work_dir / 'made_by'
    if not stamp.is_file() or stamp.read_text() != made_by:
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True)
        stamp.write_text(made_by)


def set_threads(steps: Steps) -> None:
    """Sets ``OMP_NUM_THREADS`` for what follows: torch reads it when it starts."""
    def measure(threads: int) -> float:
        printed = steps.run('env', f'OMP_NUM_THREADS={threads}', sys.executable,
                            'tools/demo_step_time.py', CONFIG)
        return float(printed.split()[-1])

    threads = choose_threads(measure, len(os.sched_getaffinity(0)))
    if threads:
        os.environ['OMP_NUM_THREADS'] = str(threads)


def train(steps: Steps, work_dir: Path, options: dict) -> None:
    # Here, as it takes seconds: it imports torch.
    from mmlavit.analysis.logs import read_scalars
    run, iterations = read_run(work_dir, options), iterations_of_epoch(options)
    terminal = sys.stdout.isatty() and not steps.verbose
    with contextlib.closing(Progress(
            lambda: read_scalars(work_dir), run.length * iterations,
            run.done * iterations, terminal)) as progress:
        steps.run(sys.executable, 'tools/train.py', CONFIG, '--work-dir',
                  work_dir, '--resume', *as_arguments(options), watch=progress)


def test(steps: Steps, work_dir: Path, options: dict) -> None:
    shutil.rmtree(work_dir / 'test', ignore_errors=True)
    steps.run(sys.executable, 'tools/test.py', CONFIG,
              work_dir / read_run(work_dir, options).checkpoint, '--work-dir',
              work_dir / 'test', '--show-dir', 'pictures', *as_arguments(options))


def report(steps: Steps, work_dir: Path, *arguments) -> None:
    table = steps.run(sys.executable, 'tools/demo_report.py', work_dir,
                      *arguments)
    if not steps.verbose:
        print(table, end='')


def read_run(work_dir: Path, options: dict):
    """How far the training has come."""
    from mmlavit.analysis import runs
    return runs.read_run(read_config(options), work_dir, {})


def read_config(options: dict) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmengine's import of pkg_resources
        config = Config.fromfile(CONFIG)
    config.merge_from_dict(options)
    return config


def iterations_of_epoch(options: dict) -> int:
    loader = read_config(options).train_dataloader
    file = Path(loader.dataset.data_root, loader.dataset.ann_file)
    images = loader.dataset.get('indices') or len(
        json.loads(file.read_text())['images'])
    return math.ceil(images / loader.batch_size)


def as_arguments(options: dict) -> List[str]:
    pairs = [f'{key}={value}' for key, value in options.items()]
    return ['--cfg-options', *pairs] if pairs else []


def run_short(verbose: bool) -> None:
    work_dir = Path('work_dirs/demo-short')
    shutil.rmtree(work_dir, ignore_errors=True)
    steps = start(work_dir, verbose)
    steps.begin('3/5 Training 6 iterations, and 6 more from the checkpoint')
    for epochs in (1, 2):
        train(steps, work_dir, {**SHORT, 'train_cfg.max_epochs': epochs})
    steps.begin('4/5 Testing the checkpoint')
    test(steps, work_dir, SHORT)
    steps.begin('5/5 Result')
    report(steps, work_dir, '--epochs', 2)


def run_full(verbose: bool) -> None:
    work_dir = Path('work_dirs/demo')
    remove_other(work_dir)
    steps = start(work_dir, verbose)
    steps.begin(f'3/5 Training {CONFIG} from the weights in checkpoints/ '
                '(5 to 18 minutes on 2 CPU cores)')
    train(steps, work_dir, {})
    steps.begin('4/5 Testing the checkpoint on held-out images (half a minute)')
    test(steps, work_dir, {})
    steps.begin('5/5 Result')
    report(steps, work_dir, '--min-ap', 0.84, '--min-ap50', 0.95)
    print('    From scratch AP was 0.747 to 0.783 with three seeds '
          '(docs/reports/tiny_imagenet.md).')


def start(work_dir: Path, verbose: bool) -> Steps:
    """The two steps that both demos begin with."""
    work_dir.mkdir(parents=True, exist_ok=True)
    steps = Steps(work_dir / 'demo.log', verbose)
    steps.begin('1/5 Data: real scanned digits on textured backgrounds (seconds)')
    steps.run(sys.executable, 'tools/make_digits.py', DATA)
    steps.begin('2/5 Number of threads (seconds)')
    set_threads(steps)
    return steps


def main() -> None:
    args = parse_args()
    # So that what is running is ended, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        (run_short if args.short else run_full)(args.verbose)
    except KeyboardInterrupt:
        sys.exit('\nStopped. The same command goes on from the last checkpoint.')


if __name__ == '__main__':
    main()
