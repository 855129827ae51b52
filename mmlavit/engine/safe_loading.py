"""Checkpoints are read as data: none can run code.

In place of mmengine's loaders of local and of downloaded checkpoints.
"""
import _codecs
import _compat_pickle
import os
import pickle
import re
import zipfile
from types import SimpleNamespace
from typing import Optional
from unittest import mock
from urllib.parse import urlparse

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
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


def check_archive(path: str) -> None:
    """Refuses an archive that torch would unpack to more than it is.

    Raises:
        ValueError: If its entries take more bytes unpacked than the file has, or
            one name is there twice.
    """
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if size > os.path.getsize(path):
        raise ValueError(f'it would be unpacked to {size} bytes, where torch does not '
                         'compress')
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError('it has two entries of one name')


def load_from_local(filename: str, map_location=None) -> dict:
    """Loads a local checkpoint without running code that it may hold.

    Raises:
        FileNotFoundError, PermissionError: If there is no such file, or it may not be
            read.
        MemoryError: If it does not fit.
        ValueError: If it is no checkpoint, is damaged, would run code, or holds tensors
            of a GPU where there is none.
    """
    path = os.path.expanduser(filename)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{filename}: there is no such checkpoint')
    try:
        check_archive(path)
        if SAFE_BY_DEFAULT:
            checkpoint = torch.load(path, map_location, weights_only=True)
        else:
            with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD='0'):
                checkpoint = torch.load(path, map_location, DATA_PICKLE)
    except (PermissionError, torch.cuda.OutOfMemoryError):
        raise  # the file may be whole
    except Exception as error:
        size = os.path.getsize(path)
        if isinstance(error, MemoryError) or 'alloc_cpu' in str(error):
            raise MemoryError(f'{filename}: no memory for its {size} bytes') from None
        if 'deserialize object on a CUDA device' in str(error):
            raise ValueError(f"{filename}: holds tensors of a GPU, and here is none: pass "
                             "map_location='cpu'") from None
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
            f'{size} bytes ({type(error).__name__}: {why}); '
            'expected a file written by torch.save') from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{filename}: holds a {type(checkpoint).__name__}: '
                         'expected the dict of a checkpoint')
    weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, dict):
        raise ValueError(f'{filename}: its state_dict is a {type(weights).__name__}: '
                         'expected a dict of weights')
    unnamed = [name for name in weights if not isinstance(name, str)]
    if unnamed:
        raise ValueError(f'{filename}: weights have the name {unnamed[0]!r}, a '
                         f'{type(unnamed[0]).__name__}: expected text')
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


def install() -> None:
    """Local and downloaded checkpoints are loaded as above, by the toolboxes too."""
    if SAFE_BY_DEFAULT:
        torch.serialization.add_safe_globals(
            [(value, name) for name, value in ALLOWED.items()])
    else:
        # For what others load: weights, without a log.
        os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    CheckpointLoader.register_scheme(
        prefixes='', loader=load_from_local, force=True)
    mmengine.runner.checkpoint.load_url = load_from_url
