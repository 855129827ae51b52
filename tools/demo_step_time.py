"""Prints the seconds of a training step of a config, at the threads it is run with.

    OMP_NUM_THREADS=2 python tools/demo_step_time.py CONFIG

A process of its own for each number of threads, as torch reads it when it starts.
The last line printed is the mean: on a busy machine some steps take very long, and
the training meets them too.
"""
import argparse
import tempfile
import time
from pathlib import Path
from typing import Callable


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        'config', type=Path, help='e.g. configs/retinanet_lavit_digits.py')
    return parser.parse_args()


def make_step(config) -> Callable[[], None]:
    """One forward, backward and optimizer step on the config's first batch."""
    from mmengine.runner import Runner
    config.train_dataloader.update(num_workers=0, persistent_workers=False)
    runner = Runner.from_cfg(config)
    optim_wrapper = runner.build_optim_wrapper(config.optim_wrapper)
    batch = next(iter(runner.build_dataloader(config.train_dataloader)))
    return lambda: runner.model.train_step(batch, optim_wrapper)


def mean_time(step: Callable[[], None], count: int = 5, limit: float = 10.,
              clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean seconds of a step, after one for warming up.

    Args:
        step: What to time.
        count: Steps to take. Default: 5, our choice.
        limit: Seconds after which no new step begins. Default: 10.
        clock: Gives the time in seconds. Default: the process's own.
    """
    step()
    start = clock()
    for done in range(1, count + 1):
        step()
        if clock() - start > limit:
            break
    return (clock() - start) / done


def main() -> None:
    args = parse_args()
    # After parsing: it takes seconds, which --help need not wait for.
    from mmengine.config import Config
    config = Config.fromfile(args.config)
    with tempfile.TemporaryDirectory() as config.work_dir:
        print(mean_time(make_step(config)))


if __name__ == '__main__':
    main()
