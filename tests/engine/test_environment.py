"""Import and set-up, and their messages."""
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code],
                          capture_output=True,
                          text=True,
                          timeout=300)


HIDE = 'import sys; sys.modules.update(dict.fromkeys({names!r}))\n'  # to None


@pytest.mark.parametrize('present', ['mmdet', 'mmseg', 'mmpretrain'])
def test_one_toolbox_is_enough(present):
    """With only one of the toolboxes there, it builds LaViT."""
    hidden = {'mmdet', 'mmseg', 'mmpretrain'} - {present}
    result = run(
        HIDE.format(names=hidden) + f'''
import mmlavit
from {present}.registry import MODELS
assert not any(sys.modules[name] for name in {hidden!r})
print(type(MODELS.build(dict(type='LaViT', arch='tiny'))).__name__)
''')
    assert result.stdout.strip().endswith('LaViT'), result.stderr


@pytest.mark.parametrize('name', ['torch', 'mmengine', 'mmcv'])
def test_missing_library_is_named_with_what_to_install(name):
    result = run(HIDE.format(names={name}) + 'import mmlavit')
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith(f'ImportError: mmlavit needs {name} >= ')
    assert f'{name}==' in message and 'tools/setup_env.sh' in message


@pytest.mark.parametrize('name', ['torch', 'mmengine', 'mmcv'])
def test_old_library_is_named(name):
    result = run(f"import {name}; {name}.__version__ = '0.4.1'; import mmlavit")
    message = result.stderr.strip().splitlines()[-1]
    assert f'mmlavit needs {name} >= ' in message and '0.4.1' in message


@pytest.mark.skipif(
    importlib.metadata.packages_distributions()['mmcv'] == ['mmcv-lite'],
    reason='mmcv-lite lacks them on purpose')
def test_mmcv_without_ops_is_named_but_classifiers_work():
    result = run('''
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv._ext':
            raise ImportError('undefined symbol: _ZN3c10')
sys.meta_path.insert(0, Broken())
import mmlavit
print(mmlavit.LaViT(arch='tiny').arch['depths'])
''')
    assert result.stdout.strip() == '(2, 2, 2, 2)', result.stderr
    assert 'without usable ops' in result.stderr
    assert 'undefined symbol' in result.stderr
    assert '--no-build-isolation' in result.stderr
    assert 'mmcv-lite==' in result.stderr


def test_mmcv_lite_is_enough_for_a_classifier():
    """Without a word: whoever chose it knows."""
    result = run('''
import importlib.metadata, sys
real = importlib.metadata.distribution
importlib.metadata.distribution = lambda name: real(
    'torch' if name == 'mmcv-lite' else name)
sys.modules['mmcv._ext'] = None
import mmlavit
from mmpretrain.registry import MODELS
print(type(MODELS.build(dict(type='LaViT', arch='tiny'))).__name__)
''')
    assert result.stdout.strip().endswith('LaViT'), result.stderr
    assert 'without usable ops' not in result.stderr


def test_import_opens_no_socket():
    """No module of mmlavit, nor what it imports."""
    refuse = '''
import importlib, pkgutil, sys
def refuse(event, args):
    if event.startswith('socket.'):
        raise RuntimeError(f'{event} {args}')
sys.addaudithook(refuse)
'''
    result = run(refuse + '''
import mmlavit
for module in pkgutil.walk_packages(mmlavit.__path__, 'mmlavit.'):
    importlib.import_module(module.name)
    print(module.name)
''')
    assert result.returncode == 0, result.stderr
    assert 'mmlavit.launch' in result.stdout.split()
    result = run(refuse + 'import socket; socket.socket()')
    assert 'RuntimeError: socket.__new__' in result.stderr


@pytest.mark.parametrize('variables, message', [
    ('STACK=newest', 'STACK=newest is not known. Choose openmmlab'),
    ('TOOLBOXES=mmpose', 'TOOLBOXES=mmpose with STACK=openmmlab is not known. '
     'Choose TOOLBOXES=all'),
    ('TOOLBOXES=mmpretrain STACK=onedl', 'TOOLBOXES=mmpretrain with STACK=onedl'),
    ('HASHES=yes', 'HASHES=yes is not known. Choose 1'),
    ('MMCV_CUDA_OPS=yes', 'MMCV_CUDA_OPS=yes is not known. Choose 1'),
    ('PYTHON=python3.99', 'python3.99 is not there. Install Python 3.10'),
])
def test_set_up_names_what_it_cannot_use(variables, message):
    root = Path(__file__).parents[2]
    result = subprocess.run(
        ['env', 'STACK=openmmlab', 'TOOLBOXES=all', *variables.split(), 'bash',
         root / 'tools/setup_env.sh'],
        capture_output=True, text=True)
    assert result.returncode == 1 and message in result.stderr


@pytest.mark.parametrize('full', ['.', '/var/tmp'])
def test_set_up_stops_before_it_fills_the_disk(tmp_path, full):
    root = Path(__file__).parents[2]
    for name in ('tools', 'requirements'):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copy(root / 'setup.py', tmp_path)
    df = tmp_path / 'bin' / 'df'
    df.parent.mkdir()
    df.write_text(f"""#!/bin/sh
[ "$2" = {full} ] && free=2000000 || free=90000000
printf 'Filesystem 1024-blocks Used Available\\ndisk 1 1 %s\\n' $free""")
    df.chmod(0o755)
    result = subprocess.run(
        ['bash', tmp_path / 'tools/setup_env.sh'], capture_output=True,
        text=True, env=os.environ | dict(
            PATH=f'{df.parent}:{os.environ["PATH"]}', TMPDIR='/var/tmp',
            PYTHON=sys.executable, STACK='openmmlab', TOOLBOXES='all',
            PIP_NO_INDEX='1'))
    assert result.returncode == 1
    assert f'1 GiB are free in {full}, and' in result.stderr
    assert 'Make room' in result.stderr
