"""What README and docs name is there, and what they show runs."""
import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, Set
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from builders import run_tool
from mmlavit import LaViT, launch
from mmlavit.analysis.building import build_model
from mmlavit.launch import translate_for_mmseg
from mmlavit.plugins.qkv import LessProjection

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.md', *sorted(DOCS.rglob('*.md'))]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
SCOPES = dict(
    mmdet='configs/retinanet_lavit_s_coco.py',
    mmseg='configs/upernet_lavit_s_ade20k.py',
    mmpretrain='configs/lavit_s_in1k.py')
# The scripts that hand what they do not know to tools/train.py or tools/test.py.
LAUNCHERS = {'dist_train': 'train', 'dist_test': 'test', 'slurm_train': 'train',
             'slurm_test': 'test', 'train': 'train', 'test': 'test'}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub('', page.read_text())


def blocks(page: Path, language: str) -> List[str]:
    return [code for found, code in FENCE.findall(page.read_text())
            if found == language]


def inline_code(page: Path) -> List[str]:
    return [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', prose(page))]


def commands(page: Path) -> Iterator[List[str]]:
    """The words of every command, in blocks of shell and within sentences."""
    shown = '\n'.join(blocks(page, 'bash')).replace('\\\n', ' ').splitlines()
    shown += [code for code in inline_code(page) if re.match(
        r'([A-Z_]+=\S+ )*(python|bash|pytest|pip|source) ', code)]
    for line in shown:
        for command in line.split('&&'):
            words = shlex.split(command, comments=True)
            if words:
                yield words


def expand(text: str) -> List[str]:
    """Braces as a shell expands them."""
    parts = re.split(r'\{([^{}]*)\}', text)
    choices = [part.split(',') if i % 2 else [part] for i, part in enumerate(parts)]
    return [''.join(choice) for choice in itertools.product(*choices)]


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    kept = re.sub(r'[^\w\- ]', '', heading.strip().lower())
    return kept.replace(' ', '-')


def anchors(page: Path) -> Set[str]:
    return {slug(heading) for heading in re.findall(
        r'^#+ (.*)$', prose(page), re.MULTILINE)}


@functools.lru_cache(maxsize=None)
def options(script: str, *arguments: str) -> Set[str]:
    """The options that a tool's help names."""
    argv = [str(ROOT / script), *arguments, '--help']
    task = Path(script).stem
    if task in ('train', 'test'):
        # In this process, which has imported the toolboxes.
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit), \
                mock.patch.object(sys, 'argv', argv):
            launch.main(task)
        text = out.getvalue()
    else:
        text = run_tool(task, *arguments, '--help', folder=Path(script).parent).stdout
        assert text, f'{script} --help prints nothing'
    return set(re.findall(r'--[\w-]+', text))


def options_of_toolbox(task: str, words: List[str]) -> Set[str]:
    """Those of the config's toolbox; for a placeholder those that all three take."""
    configs = [word for word in words if word.startswith('configs/')]
    known = [options(f'tools/{task}.py', str(ROOT / config))
             for config in configs or SCOPES.values()]
    if task == 'train' and not configs:
        # Translated by the launcher for mmseg's script, which lacks them.
        known[1] |= set(re.findall(r"'(--[\w-]+)'",
                                   inspect.getsource(translate_for_mmseg)))
    return set.intersection(*known)


def check_command(words: List[str]) -> None:
    while re.match(r'[A-Z_]+=', words[0]):
        check_variable(words[0].split('=')[0])
        words = words[1:]
    program, *words = words
    if program == 'source':
        assert words[0].startswith('.venv'), words
    elif program == 'pip':
        check_pins(words)
    elif program == 'pytest':
        check_tests(words)
    elif program == 'docker':
        check_docker(words)
    elif words[0] == '-c':
        compile(words[1], 'command', 'exec')
    elif '.mim' in words[0]:
        package, path = words[0].split('site-packages/')[1].split('/', 1)
        origin = importlib.util.find_spec(package).origin
        assert (Path(origin).parent / path).is_file(), words[0]
    else:
        assert program == {'.py': 'python', '.sh': 'bash'}[Path(words[0]).suffix]
        check_tool(words[0], words[1:])


def check_tool(script: str, words: List[str]) -> None:
    assert (ROOT / script).is_file(), f'{script} is not there'
    given = {word for word in words if word.startswith('--')}
    stem = Path(script).stem
    if script.endswith('.sh') and stem not in set(LAUNCHERS) - {'test'}:
        known = set(re.findall(r'--[\w-]+', (ROOT / script).read_text()))
    elif script.startswith('tools/') and stem in LAUNCHERS:
        known = options_of_toolbox(LAUNCHERS[stem], words) if given else set()
    else:
        known = options(script)
    assert given <= known, f'{script} has no {given - known}'


def check_docker(words: List[str]) -> None:
    """Arguments of the Dockerfile, and what is run in the container."""
    known = re.findall(r'^ARG (\w+)', (ROOT / 'Dockerfile').read_text(), re.M)
    for option, value in zip(words, words[1:]):
        assert option != '--build-arg' or value.split('=')[0] in known, value
    assert words[0] in ('build', 'run') and 'mmlavit' in words, words
    if words[0] == 'run':
        check_command(words[words.index('mmlavit') + 1:])


def check_variable(variable: str) -> None:
    shell = '\n'.join(path.read_text() for path in (ROOT / 'tools').glob('*.sh'))
    known = {*re.findall(r'\$\{([A-Z_]+)', shell), 'PYTHONPATH'}
    assert variable in known, f'no script reads {variable}'


def check_pins(words: List[str]) -> None:
    pins = (ROOT / 'requirements/constraints.txt').read_text().split()
    for word in words:
        assert '==' not in word or word in pins, f'{word} is not what we pin'


def check_tests(words: List[str]) -> None:
    path = ROOT / words[0]
    assert path.exists(), words[0]
    if '-k' in words:
        check_test_names(path, words[words.index('-k') + 1])


def check_test_names(path: Path, expression: str) -> None:
    files = [path] if path.is_file() else path.rglob('test_*.py')
    names = re.findall(r'def (test_\w+)', '\n'.join(f.read_text() for f in files))
    assert any(expression in test for test in names), f'{path}: no {expression}'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = prose(page)
    links = re.findall(r'\]\(([^)\s]+)\)', text)
    links += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if re.match(r'https://[\w.-]+\.\w+(/\S*)?$', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_and_picture_is_linked():
    index = (DOCS / 'index.md').read_text()
    for page in PAGES[1:]:
        path = str(page.relative_to(DOCS))
        assert path == 'index.md' or f']({path})' in index, path
    text = '\n'.join(page.read_text() for page in PAGES)
    for picture in (DOCS / 'img').iterdir():
        assert f'img/{picture.name}' in text, picture


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_commands_are_there_with_their_options(page):
    for words in commands(page):
        check_command(words)


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_paths_and_options_in_sentences_exist(page):
    folders = ('configs', 'tools', 'tests', 'stress', 'mmlavit', 'requirements')
    for word in ' '.join(inline_code(page)).split():
        if word.startswith(tuple(f'{folder}/' for folder in folders)):
            paths = expand(word)
        elif re.fullmatch(r'[\w{},]*lavit_[\w{},]*\.py', word):
            paths = expand(f'configs/{word}')
        else:
            continue
        for path in paths:
            assert (ROOT / path).exists(), path
    for code in inline_code(page):
        if re.fullmatch(r'--[\w-]+( \S+)?', code):
            assert code.split()[0] in all_options(), code
        elif code.startswith('... -k '):
            check_test_names(ROOT / 'tests', code.split()[2])


@functools.lru_cache(maxsize=None)
def all_options() -> Set[str]:
    tools = [f'tools/{path.name}' for path in (ROOT / 'tools').glob('*.py')
             if path.stem not in LAUNCHERS]
    toolboxes = [options(f'tools/{task}.py', str(ROOT / config))
                 for task in ('train', 'test') for config in SCOPES.values()]
    # Of `python stress/kills.py`, whose help needs tests/ on the path.
    stress = re.findall(r"'(--[\w-]+)'", ''.join(
        path.read_text() for path in (ROOT / 'stress').glob('*.py')))
    return set(stress).union(*map(options, tools), *toolboxes)


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_python_is_valid_and_its_imports_resolve(page):
    for code in blocks(page, 'python'):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), code


def unique_python(*needles: str) -> List[str]:
    """Python of all pages that contains all needles, each text once."""
    found = [code for page in PAGES for code in blocks(page, 'python')
             if all(needle in code for needle in needles)]
    assert found, needles
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(
    'code', unique_python('_base_ ='), ids=lambda code: code.split("'")[1])
def test_configs_build_their_model(code, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(code.replace("'configs/", f"'{ROOT}/configs/"))
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    model = build_model(config)
    assert isinstance(model.backbone, LaViT) or any(
        isinstance(module, LessProjection) for module in model.backbone.modules())
    wanted = config.metainfo.classes if 'metainfo' in config else None
    head = getattr(model, 'bbox_head', None) or getattr(model, 'decode_head', None)
    assert wanted is None or head.num_classes == len(wanted)


def test_plain_pytorch_runs():
    for code in unique_python('from mmlavit import LaViT', 'maps = '):
        found = {}
        with torch.no_grad():
            exec(code, found)
        assert [x.shape[-2] for x in found['maps']] == [120, 60, 30, 15]


def test_observing_layers_runs(capsys):
    for code in unique_python('observe_layers(model'):
        exec(code, dict(model=LaViT('tiny').eval(), images=torch.rand(1, 3, 64, 64)))
    # At 64 x 64 all grids of keys are 2 x 2.
    assert capsys.readouterr().out.count('4, 4]') == 8


def test_backbones_in_sentences_build():
    for code in unique_python("backbone=dict(type='LaViT'"):
        found = {}
        exec(code, found)
        assert MODELS.build(found['backbone']).dp_loss is not None


def test_the_figure_is_of_todays_plan():
    """Else run `python tools/draw_architecture.py`."""
    subprocess.run([sys.executable, 'tools/draw_architecture.py', '--check'],
                   check=True, cwd=ROOT)
