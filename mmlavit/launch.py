"""Runs the toolbox's own train and test scripts, on the CPU ranks they lack.

``tools/train.py`` and ``tools/test.py`` of mmlavit are these scripts of mmdet,
mmseg or mmpretrain, whichever the config's ``default_scope`` names, with five
differences: mmlavit is imported, what one toolbox's script does not know of the
common arguments is translated, processes without a GPU keep the memory they have
freed, ranks without a GPU talk over gloo, and all ranks leave their process group at
the end.
"""
import argparse
import gc
import importlib.util
import runpy
import sys
from pathlib import Path
from typing import List, Optional

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS
from torch import nn

from .utils.memory import keep_freed_memory

PIP_NAMES = dict(mmseg='mmsegmentation')
CONFIG_SUFFIXES = ('.py', '.yml', '.yaml', '.json')
SCOPES = ('mmdet', 'mmseg', 'mmpretrain')


def main(task: str) -> None:
    """Runs the script of the toolbox that the config belongs to.

    Args:
        task (str): 'train' or 'test'.
    """
    argv = sys.argv[1:]
    path = find_config(argv)
    if path is None:
        print(f'usage: python {sys.argv[0]} CONFIG '
              f'{"CHECKPOINT " if task == "test" else ""}[OPTIONS]\n'
              'CONFIG --help shows the options of the config\'s toolbox.')
        sys.exit(0 if {'-h', '--help'} & set(argv) else 2)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--launcher')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args, _ = parser.parse_known_args(argv)
    if not Path(path).is_file():
        sys.exit(f'{path}: no such config')
    config = Config.fromfile(path)
    config.merge_from_dict(args.cfg_options or {})
    scope = config.get('default_scope')
    if scope not in SCOPES:
        sys.exit(f'{path}: default_scope={scope!r}: expected one of {SCOPES}')

    if not torch.cuda.is_available():
        keep_freed_memory()
    if scope == 'mmseg' and task == 'train':
        argv = translate_for_mmseg(argv)
    if args.launcher == 'pytorch' and not torch.cuda.is_available():
        torch.distributed.init_process_group('gloo')
        replace_sync_bn()
        argv = [*argv, *cpu_ddp_options(config)]
    script = find_script(scope, task)
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name='__main__')
    # None of the scripts ends its process group, and gloo's threads abort a rank
    # that keeps it to the interpreter's end, its training already complete. A DDP
    # model keeps it too, and a runner is a cycle that holds one.
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def find_config(argv: List[str]) -> Optional[str]:
    """The config among the arguments: of those with its suffix one that is there.

    Values of options may have its suffixes too, such as the JSON of ``--out``: a Python
    file is preferred.
    """
    named = [arg for arg in argv if arg.endswith(CONFIG_SUFFIXES)
             and ('=' not in arg or Path(arg).is_file())]
    return max(named, default=None,
               key=lambda arg: (Path(arg).is_file(), arg.endswith('.py')))


def find_script(scope: str, task: str) -> Path:
    """The path of an installed toolbox's own script."""
    spec = importlib.util.find_spec(scope)
    if spec is None:
        sys.exit(f'The config is for {scope}, which is not installed: '
                 f'pip install {PIP_NAMES.get(scope, scope)}')
    script = Path(spec.origin).parent / '.mim' / 'tools' / f'{task}.py'
    if not script.is_file():
        sys.exit(f'{script} is missing: reinstall {scope} with '
                 f'pip install --force-reinstall {PIP_NAMES.get(scope, scope)}')
    return script


def cpu_ddp_options(config: Config) -> List[str]:
    """mmengine names a GPU for every rank, which DDP refuses on the CPU."""
    options = ['--cfg-options', 'model_wrapper_cfg.device_ids=None']
    if 'model_wrapper_cfg' not in config:
        unused = config.get('find_unused_parameters', False)
        options += [
            'model_wrapper_cfg.type=MMDistributedDataParallel',
            'model_wrapper_cfg.broadcast_buffers=False',
            f'model_wrapper_cfg.find_unused_parameters={unused}'
        ]
    return options


def replace_sync_bn() -> None:
    """SyncBN has no CPU kernel; each rank normalises its own batch there."""
    MODELS.register_module('SyncBN', module=nn.BatchNorm2d, force=True)
    print('mmlavit: no GPU: ranks talk over gloo, SyncBN is BN.')


def translate_for_mmseg(argv: List[str]) -> List[str]:
    """mmseg's script has no ``--auto-scale-lr`` and no ``--resume PATH``.

    With a bare ``--resume`` it would go on from the config's ``load_from``, not from the
    last checkpoint.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--resume', nargs='?', const='auto')
    parser.add_argument('--auto-scale-lr', action='store_true')
    args, argv = parser.parse_known_args(argv)
    if args.resume and args.resume.endswith(CONFIG_SUFFIXES):
        argv, args.resume = [args.resume, *argv], 'auto'  # no checkpoint: CONFIG
    if args.resume:
        start = None if args.resume == 'auto' else args.resume
        argv = [*argv, '--resume', '--cfg-options', f'load_from={start}']
    if args.auto_scale_lr:
        argv = [*argv, '--cfg-options', 'auto_scale_lr.enable=True']
    return argv
