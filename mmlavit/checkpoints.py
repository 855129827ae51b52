"""Checkpoints are read as data, must fit the model, and are written whole.

Importing this takes the place of four parts of mmengine, so that the toolboxes' own
tools have it too: the loaders of local and of downloaded checkpoints, the writer of
local files, and the ``CheckpointHook``.
"""
import _codecs
import _compat_pickle
import os
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Optional
from unittest import mock
from urllib.parse import urlparse

import mmengine.hooks
import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import (BaseLoop, CheckpointLoader, Runner,
                             find_latest_checkpoint)
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from mmengine.utils import digit_version

try:
    from numpy._core.multiarray import _reconstruct, scalar
except ImportError:  # numpy 1
    from numpy.core.multiarray import _reconstruct, scalar


def history_method(owner, name: str):
    """What mmengine's checkpoints use getattr for, and nothing else."""
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'refused to look up {name!r} of {owner!r} for a checkpoint')


# Beside tensors, mmengine's checkpoints hold the training log's buffers, with the
# names of the methods that summarise them. None of these can run code.
ALLOWED = {
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    'builtins.getattr': history_method,
    '_codecs.encode': _codecs.encode,  # bytes
    'numpy.ndarray': np.ndarray,
    'numpy.dtype': np.dtype,
}
for _type in '?', *np.typecodes['AllInteger'], *np.typecodes['Float']:
    _class = type(np.dtype(_type))
    ALLOWED[f'{_class.__module__}.{_class.__qualname__}'] = _class
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    ALLOWED[f'{_module}._reconstruct'] = _reconstruct
    ALLOWED[f'{_module}.scalar'] = scalar


class DataUnpickler(pickle.Unpickler):
    """Knows what torch's safe loader knows, and what is allowed above.

    For torch before 2.6, whose safe loader cannot be told of more types.
    """

    def find_class(self, module: str, name: str):
        from torch._weights_only_unpickler import _get_allowed_globals
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f'{module}.{name}'
        for known in (ALLOWED, _get_allowed_globals()):
            if full in known:
                return known[full]
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {full}')


DATA_PICKLE = SimpleNamespace(
    __name__='DATA_PICKLE',
    Unpickler=DataUnpickler,
    load=lambda file, **kwargs: DataUnpickler(file, **kwargs).load())

SAFE_BY_DEFAULT = digit_version(torch.__version__) >= digit_version('2.6.0')
if SAFE_BY_DEFAULT:
    torch.serialization.add_safe_globals(
        [(value, name) for name, value in ALLOWED.items()])
else:
    # For what others load: weights, without a log.
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location=None) -> dict:
    """Loads a local checkpoint without running code that it may hold.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, is damaged, or would run code.
    """
    path = os.path.expanduser(filename)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{filename}: there is no such checkpoint')
    try:
        if SAFE_BY_DEFAULT:
            checkpoint = torch.load(path, map_location, weights_only=True)
        else:
            with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD='0'):
                checkpoint = torch.load(path, map_location, DATA_PICKLE)
    except Exception as error:
        # Torch's own message goes on with advice to run the code.
        found = re.search(r'GLOBAL [\w.]+|refused to look up .*', str(error))
        if found:
            raise ValueError(
                f'{filename}: refused, for it holds more than data and loading '
                f'it could run code; nothing of it was run ({found[0]})'
            ) from None
        why = re.split(r'WeightsUnpickler error:\s*', str(error))[-1]
        why = re.split(r'\. |\n', why)[0]
        raise ValueError(
            f'{filename}: this is no checkpoint, or a damaged one, of '
            f'{os.path.getsize(path)} bytes ({type(error).__name__}: {why}); '
            'expected a file written by torch.save') from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{filename}: holds a {type(checkpoint).__name__}: '
                         'expected the dict of a checkpoint')
    return checkpoint


def load_from_url(url: str, model_dir: Optional[str] = None, map_location=None,
                  progress: bool = True) -> dict:
    """Downloads as torch.hub does, once, and loads that as a local checkpoint.

    In place of torch.hub's own loader, which mmengine lets run code; for its
    ``torchvision://`` and ``open-mmlab://`` too.

    Raises:
        ValueError: As `load_from_local`.
    """
    folder = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, os.path.basename(urlparse(url).path))
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=progress)
    try:
        return load_from_local(path, map_location)
    except ValueError as error:
        raise ValueError(f'{url}, which was downloaded to {error}. Remove that '
                         'file to download it anew') from None


mmengine.runner.checkpoint.load_url = load_from_url


def plain(x):
    """Data in Python's own containers and types; methods are left out.

    Tensors stay, arrays become lists, paths text, and what has no such form None.
    """
    if isinstance(x, dict):
        return {key if isinstance(key, int) else str(key): plain(value)
                for key, value in x.items() if not callable(value)}
    if isinstance(x, tuple):
        return tuple(plain(value) for value in x)
    if isinstance(x, (list, set, frozenset)):
        return [plain(value) for value in x]
    if isinstance(x, torch.Tensor):
        return x
    if hasattr(x, 'tolist'):
        return plain(x.tolist())
    if isinstance(x, os.PathLike):
        return os.fspath(x)
    for kind in (bool, int, float, str, bytes):
        if isinstance(x, kind):
            return kind(x)
    return None


@register_backend('local', force=True, prefixes='')
class WholeFileBackend(LocalBackend):
    """Local files, which are there whole or not at all."""

    def put(self, obj: bytes, filepath) -> None:
        """Writes bytes beside the file and then takes the file's place.

        Raises:
            OSError: If that fails; what was there before is as it was.
        """
        filepath = os.path.realpath(filepath)  # a link stays one
        if os.path.exists(filepath) and not os.path.isfile(filepath):
            return super().put(obj, filepath)  # a pipe or a device
        part = f'{filepath}.part'
        try:
            super().put(obj, part)
            with open(part, 'rb') as file:
                os.fsync(file.fileno())
            os.replace(part, filepath)
        except OSError as error:
            if os.path.isfile(part):
                os.remove(part)
            raise OSError(
                error.errno, f'{error.strerror}, for {len(obj)} bytes; what '
                'was there before is as it was', str(filepath)) from error


@HOOKS.register_module('CheckpointHook', force=True)
class CheckpointHook(mmengine.hooks.CheckpointHook):
    """Mmengine's, but sure of a whole checkpoint that fits the model.

    - ``max_keep_ckpts=1`` keeps two, for the older one is removed before the
      new one is written.
    - ``resume`` without a path takes the last whole checkpoint, also where the
      training was killed while its name was written, or its folder was moved.
    - What mmengine puts beside weights is written as plain data, and the first
      checkpoint of a run is read back: one that cannot be loaded again stops the
      training then, and not when it is needed.
    - Weights that a test or a resumed training does not find in the checkpoint
      are an error. Where training only begins with it (``load_from``), it must
      have some of the model's weights.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.read_back = False
        if self.max_keep_ckpts == 1:
            self.max_keep_ckpts = 2

    def before_run(self, runner) -> None:
        """Finds the checkpoint to resume from."""
        if not runner._resume or runner._load_from is not None:
            return
        named = find_latest_checkpoint(runner.work_dir)
        here = Path(runner.work_dir)
        for path in [named, here / os.path.basename(named)] if named else []:
            if '://' in str(path) or os.path.isdir(path) or zipfile.is_zipfile(path):
                runner._load_from = str(path)
                return
        # Whatever has a checkpoint's name is whole, but for files from elsewhere
        found = sorted(here.glob(self.filename_tmpl.format('*')),
                       key=lambda path: [int(n) for n in re.findall(r'\d+', path.stem)])
        whole = [str(path) for path in found if zipfile.is_zipfile(path)]
        if whole:
            runner._load_from = whole[-1]
            runner.logger.warning(
                f'{runner.work_dir}/last_checkpoint names no whole file '
                f'({named!r}); resuming from {whole[-1]}')

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Turns what is not weights into plain data."""
        for key in ('meta', 'param_schedulers'):
            if key in checkpoint:
                checkpoint[key] = plain(checkpoint[key])
        if 'message_hub' in checkpoint:
            hub = checkpoint['message_hub']
            hub['runtime_info'] = plain(hub['runtime_info'])

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        if (self.read_back or not is_main_process()
                or not os.path.isfile(self.last_ckpt)):
            return
        self.read_back = True
        try:
            load_from_local(self.last_ckpt, map_location='cpu')
        except ValueError as error:
            raise ValueError(
                f'{error}. This training wrote it just now and could not go on '
                'from it: let its hooks and its optimizer put only tensors and '
                'Python\'s own types into checkpoints') from None

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Refuses a checkpoint that does not fit.

        Raises:
            ValueError: Naming the file and the first mismatches.
        """
        if not isinstance(runner, Runner):
            return  # FlexibleRunner's strategies load in their own ways
        name = runner._load_from or 'the checkpoint'
        weights = checkpoint.get('state_dict', checkpoint)
        if not isinstance(weights, dict) or not any(
                isinstance(value, torch.Tensor) for value in weights.values()):
            raise ValueError(f'{name}: holds no weights, only the keys '
                             f'{list(weights)[:5]}')
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        try:
            _load_checkpoint_to_model(model, checkpoint, strict=True)
            return
        except ValueError as error:  # LaViT's own
            raise ValueError(f'{name}: {error}') from None
        except RuntimeError as error:
            report = str(error)
        own = model.state_dict()
        fit = [key for name, value in weights.items()
               if (key := re.sub(r'^module\.', '', name)) in own
               and own[key].shape == getattr(value, 'shape', None)]
        begins = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        if fit if begins else 'missing keys' not in report and \
                'size mismatch' not in report:
            return  # the runner warns of the differences
        raise ValueError(
            f'{name}: is not of this model: {len(fit)} of its {len(weights)} '
            f'weights fit the model\'s {len(own)}; {shorten(report)}')


def shorten(report: str) -> str:
    """The first names of each kind in mmengine's report of mismatches."""
    lines = [line for line in report.splitlines() if ': ' in line]
    sizes = [line for line in lines if line.startswith('size mismatch')]
    parts = [f'{len(sizes)} sizes differ: {"; ".join(sizes[:3])}'] if sizes else []
    for line in lines:
        if line not in sizes:
            title, names = line.split(': ', 1)
            names = names.split(', ')
            more = ', ...' if len(names) > 3 else ''
            parts.append(f'{len(names)} {title}: {", ".join(names[:3])}{more}')
    return '; '.join(parts)
