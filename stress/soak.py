"""Trains for long on images of changing sizes, and prints how memory grows.

    python stress/soak.py DIR [--steps 2000]

RetinaNet on LaViT with the DP loss, on made digits; every image has a size of its
own. Prints resident memory by step and its slope over the second half, where
nothing warms up any more. Not part of the quick suite.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
from builders import ARCH
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

ROOT = Path(__file__).parents[1]


class Memory(Hook):
    """Resident memory of this process in MiB, step by step."""

    def __init__(self) -> None:
        self.seen, self.process = [], psutil.Process()

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        self.seen.append(self.process.memory_info().rss / 2**20)
        if len(self.seen) % 200 == 0:
            print(f'step {len(self.seen):5}: {self.seen[-1]:7.1f} MiB',
                  flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dir', type=Path,
                        help='folder for data and training; e.g. /tmp/soak')
    parser.add_argument('--steps', type=int, default=2000, metavar='N',
                        help='of training; default: %(default)s; e.g. --steps 400')
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    data = args.dir / 'digits'
    subprocess.run([sys.executable, ROOT / 'tools/make_digits.py', data,
                    '--train', '100', '--val', '2'], check=True)
    config = Config.fromfile(ROOT / 'configs/retinanet_lavit_digits.py')
    loader = config.train_dataloader
    loader.update(
        batch_size=1, num_workers=0, persistent_workers=False,
        batch_sampler=None, sampler=dict(type='InfiniteSampler'))
    loader.dataset.data_root = f'{data}/'
    # From 48 x 48 to 208 x 208, never the same for long.
    loader.dataset.pipeline[2] = dict(
        type='RandomResize', scale=(160, 160), ratio_range=(0.3, 1.3))
    config.model.backbone.arch.update(ARCH)
    config.model.backbone.dp_loss = dict()
    config.model.neck.update(in_channels=[8, 16, 24, 32], out_channels=16)
    config.model.bbox_head.update(in_channels=16, feat_channels=16)
    config.train_cfg = dict(by_epoch=False, max_iters=args.steps)
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.param_scheduler = None
    config.work_dir, config.log_level = str(args.dir / 'work'), 'WARNING'
    config.default_hooks.checkpoint.update(by_epoch=False, interval=500)
    memory = Memory()
    runner = Runner.from_cfg(config)
    runner.register_hook(memory)
    runner.train()
    steps = np.arange(args.steps)[args.steps // 2:]
    slope = np.polyfit(steps, memory.seen[args.steps // 2:], 1)[0]
    print(f'{args.steps} steps; second half: {slope * 1000:+.2f} MiB per '
          f'1000 steps, between {min(memory.seen[steps[0]:]):.1f} and '
          f'{max(memory.seen):.1f} MiB')


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    main()
