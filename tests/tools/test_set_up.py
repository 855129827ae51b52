"""The pins agree: constraints, locks, licences and the Dockerfile."""
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / 'requirements'
LOCKS = sorted(REQUIREMENTS.glob('lock*.txt'))
PYTHONS = ('3.10', '3.11', '3.12')


def read(name: str) -> list:
    """The entries of a requirements file, and their hashes."""
    text = (REQUIREMENTS / name).read_text().replace('\\\n', '')
    lines = [line.split('--hash=') for line in text.splitlines()
             if line.strip() and not line.startswith('#')]
    return [(Requirement(line), [part.strip() for part in hashes])
            for line, *hashes in lines]


def versions(names: list, python: str = '%d.%d' % sys.version_info[:2]) -> dict:
    """What a Python on Linux gets by these files, by name."""
    machine = dict(python_version=python, python_full_version=f'{python}.9',
                   sys_platform='linux', platform_machine='x86_64')
    return {entry.name.lower(): str(entry.specifier).removeprefix('==')
            for name in names for entry, _ in read(name)
            if entry.marker is None or entry.marker.evaluate(machine)}


@pytest.mark.parametrize('path', LOCKS, ids=lambda path: path.stem)
def test_locks_hold_versions_and_hashes_and_name_no_host(path):
    for entry, hashes in read(path.name):
        assert re.fullmatch(r'==[\w.]+', str(entry.specifier)), entry
        assert hashes and all(re.fullmatch('sha256:[0-9a-f]{64}', x)
                              for x in hashes), entry
    assert '://' not in path.read_text() and 'index' not in re.sub(
        r'^model-?index==.*', '', path.read_text(), flags=re.M)


@pytest.mark.parametrize('python', PYTHONS)
def test_lock_is_that_of_the_constraints(python):
    pins = versions(['constraints.txt'], python)
    locked = versions([path.name for path in LOCKS], python)
    for name in ('build', 'stack', 'openmmlab', 'tools', 'tests'):
        assert versions([f'{name}.txt'], python).keys() <= locked.keys()
    for name in pins.keys() & locked.keys():
        assert locked[name] == pins[name], name
    assert {'torch', 'mmcv', 'mmdet', 'numpy', 'pytest'} <= pins.keys() & locked.keys()


def test_every_locked_package_has_its_licence_listed():
    rows = re.findall(r'^\| (\S+) +\| (\S+) +\| (.+?) *\|',
                      (ROOT / 'docs/licences.md').read_text(), re.M)
    listed = {name.lower().replace('_', '-'): version for name, version, _ in rows}
    del listed['name']
    # Written on one Python, so by one of the locks' versions.
    locked = {(name, version) for python in PYTHONS
              for name, version in versions(['lock.txt', 'lock-mmcv.txt'], python).items()}
    assert set(listed.items()) <= locked
    assert any(listed.keys() == versions(['lock.txt', 'lock-mmcv.txt'], python).keys()
               for python in PYTHONS)
    # Terms that would reach mmlavit's users, and those that nobody looked up.
    assert not [row for row in rows if 'GPL' in row[2] or 'UNKNOWN' in row[2]]
    assert (ROOT / 'docs/licences.md').read_text().startswith(re.search(
        r"cat <<'MD'\n(.*?)^MD$", (ROOT / 'tools/lock.sh').read_text(), re.M | re.S)[1])


def test_dockerfile_fits_the_pins():
    """Parsed, not built."""
    text = (ROOT / 'Dockerfile').read_text()
    lines = [line.split(maxsplit=1) for line in text.replace('\\\n', ' ').splitlines()
             if line and not line.startswith('#')]
    assert {word for word, _ in lines} <= {'ARG', 'FROM', 'ENV', 'RUN', 'WORKDIR',
                                           'COPY', 'CMD'}
    stages = dict(re.fullmatch(r'(\S+) AS (\S+)', rest).groups()[::-1]
                  for word, rest in lines if word == 'FROM' and ' AS ' in rest)
    default, = (rest.partition('=')[2] for word, rest in lines if word == 'ARG')
    assert default in stages and lines[-1][0] == 'CMD'
    assert 'FROM ${DEVICE}\n' in text and set(stages) == {'cpu', 'cuda'}

    # Ops are compiled there: nvcc must be of the CUDA that torch was built with.
    cuda = versions(['lock.txt'])['cuda-toolkit']
    assert stages['cuda'].startswith(f'nvidia/cuda:{cuda}-devel-')
    set_up = (ROOT / 'tools/setup_env.sh').read_text()
    last = re.search(r'LAST_PYTHON=(\d+)', set_up)[1]
    for image in stages.values():
        release = re.search(r'ubuntu:?(\d\d\.\d\d)', image)[1]
        python = {'22.04': '3.10', '24.04': '3.12'}[release]
        assert python in PYTHONS and int(python[2:]) <= int(last)
    # Its options are ones that set-up knows, and it is there when it runs.
    known = re.search(r'case \$\{MMCV_CUDA_OPS:=1\} in\n +(\S+)\)', set_up)[1]
    assert set(re.findall(r'MMCV_CUDA_OPS=(\w+)', text)) < set(known.split('|'))
    words = [f'{word} {rest}' for word, rest in lines]
    run, = (i for i, line in enumerate(words) if 'bash tools/setup_env.sh' in line)
    assert words.index('COPY . .') < run
    work_dir, = (rest for word, rest in lines if word == 'WORKDIR')
    assert f'ENV PATH={work_dir}/.venv/bin:$PATH' in words

    # Nothing big or of this machine gets in.
    ignored = (ROOT / '.dockerignore').read_text().split()
    for line in (ROOT / '.gitignore').read_text().split():
        assert line.rstrip('/').replace('__pycache__', '**/__pycache__') in ignored \
            or line == '*.py[co]'
