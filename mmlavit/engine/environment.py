"""Checks the libraries that pip cannot.

mmlavit has no pip requirement on them: which build of torch and mmcv fits
depends on the machine, and the OneDL forks keep the import names under other
distribution names.
"""
import importlib
import importlib.metadata
import importlib.util
import re
import warnings

MINIMUM = dict(torch='2.1', mmengine='0.10.0', mmcv='2.0.0')
REMEDY = dict(
    torch='pip install torch==2.11.0 torchvision==0.26.0',
    mmengine='pip install mmengine==0.10.7',
    mmcv='pip install --no-build-isolation --no-deps mmcv==2.1.0, which '
    'compiles its ops and needs torch, "setuptools<82", wheel, ninja and psutil '
    'installed before; for classification alone pip install mmcv-lite==2.1.0, '
    'which has no ops')


def install() -> None:
    """Checks the libraries; lets ``mmseg::`` bases load from the OneDL fork."""
    check()
    find_forks()


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
        # Not an error: mmpretrain does without, and mmcv-lite is meant to.
        if not _is_installed('mmcv-lite'):
            warnings.warn(
                f'mmcv {library.__version__} is installed without usable ops '
                f'({error}): mmdet and most of mmseg will not import. '
                f'{REMEDY["mmcv"]}; if pip takes a wheel from its cache, add '
                '--no-cache-dir --force-reinstall')


def find_forks() -> None:
    """Lets ``mmseg::`` bases load where OneDL's fork of mmsegmentation is.

    OneDL's mmengine, too, looks for it under the name of OpenMMLab's distribution.
    """
    from mmengine.config.utils import MODULE2PACKAGE
    if (not _is_installed(MODULE2PACKAGE['mmseg'])
            and importlib.util.find_spec('mmseg')):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _parse(version: str) -> list:
    return [int(number) for number in re.findall(r'\d+', version)[:3]]
