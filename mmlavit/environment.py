"""Checks the libraries that pip cannot, and makes their checkpoints loadable.

mmlavit has no pip requirement on them: which build of torch and mmcv fits
depends on the machine, and the OneDL forks keep the import names under other
distribution names.
"""
import importlib
import pickle
import re
import warnings

MINIMUM = dict(torch='2.1', mmengine='0.10.0', mmcv='2.0.0')
REMEDY = dict(
    torch='pip install torch==2.11.0 torchvision==0.26.0',
    mmengine='pip install mmengine==0.10.7',
    mmcv='pip install --no-build-isolation --no-deps mmcv==2.1.0, which '
    'compiles its ops and needs torch, "setuptools<82", wheel, ninja and psutil '
    'installed before')


def check() -> None:
    """Names the first library that is missing, broken or too old.

    Raises:
        ImportError: Naming the library, what is wrong and what to install.
    """
    for name, minimum in MINIMUM.items():
        remedy = (f'Install it with: {REMEDY[name]}. Or let tools/setup_env.sh '
                  'set up everything.')
        try:
            library = importlib.import_module(name)
        except Exception as error:
            raise ImportError(
                f'mmlavit needs {name} >= {minimum}, which does not import '
                f'({type(error).__name__}: {error}). {remedy}') from error
        version = library.__version__
        if _parse(version) < _parse(minimum):
            raise ImportError(f'mmlavit needs {name} >= {minimum}, but '
                              f'{version} is installed. {remedy}')
    try:
        importlib.import_module('mmcv._ext')
    except ImportError as error:
        # Not an error: mmpretrain does without.
        warnings.warn(
            f'mmcv {library.__version__} is installed without usable ops '
            f'({error}): mmdet and most of mmseg will not import. '
            f'{REMEDY["mmcv"]}; if pip takes a wheel from its cache, add '
            '--no-cache-dir --force-reinstall')


def _parse(version: str) -> list:
    return [int(number) for number in re.findall(r'\d+', version)[:3]]


def allow_checkpoint_types() -> None:
    """Lets torch's safe loader (weights_only) read mmengine's checkpoints.

    Beside tensors they hold the training log's buffers, with the names of the
    methods that summarise them. Exactly these types are allowed; none of them
    can run code.
    """
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer
    if _parse(torch.__version__) < [2, 6]:
        return  # mmengine does not meet the safe loader there
    try:
        from numpy._core.multiarray import _reconstruct, scalar
    except ImportError:  # numpy 1
        from numpy.core.multiarray import _reconstruct, scalar

    def history_method(owner, name):
        # What getattr is used for in these files, and nothing else.
        if owner is HistoryBuffer and name in ('min', 'max', 'current',
                                               'mean'):
            return getattr(HistoryBuffer, name)
        raise pickle.UnpicklingError(
            f'refused to look up {name!r} of {owner!r} for a checkpoint')

    torch.serialization.add_safe_globals([
        HistoryBuffer, (history_method, 'builtins.getattr'), np.ndarray,
        np.dtype, _reconstruct, scalar,
        type(np.dtype(np.float64)),
        type(np.dtype(np.int64))
    ])


check()
