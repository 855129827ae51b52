import functools
import gc
import importlib.util
import logging
import os
import random
import re
import socket
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mmengine.config.config
import mmengine.config.utils
import numpy as np
import pytest
import torch
from builders import run_tool
from mmengine.logging import MMLogger
from mmengine.visualization import Visualizer

# The shell scripts take python from the PATH.
os.environ['PATH'] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ['PATH']])


# For every base that is a toolbox's, mmengine reads all metafiles of the toolbox and
# looks for installed packages: half a second.
cached = functools.lru_cache(maxsize=None)
mmengine.config.utils.load = cached(mmengine.config.utils.load)
mmengine.config.config.is_installed = cached(mmengine.config.config.is_installed)


def pytest_collection_finish() -> None:
    # mmengine collects garbage for every data set: a quarter of a second, for all that
    # was imported until now.
    gc.collect()
    gc.freeze()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='session')
def digits(tmp_path_factory) -> Path:
    """The embedded data, small; not to be changed."""
    out = tmp_path_factory.mktemp('data') / 'digits'
    done = run_tool('make_digits', out, '--train', 8, '--val', 4)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and its address on this machine."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    folder = tmp_path / 'served'
    folder.mkdir()
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(
        SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


GPUS = ['cuda'] if torch.cuda.is_available() else []


@pytest.fixture(params=['cpu', *(pytest.param(
    gpu, marks=pytest.mark.cuda) for gpu in GPUS)])
def device(request) -> str:
    """Where a test of the model runs: on the CPU, and on the GPU if there is one."""
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_visualizers():
    """Else a training writes where one of the same name did, in another test."""
    yield
    for kind in (Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()


@pytest.fixture(autouse=True)
def own_log_level():
    """Tools that run in this process quieten the logs for the rest of it."""
    logger = MMLogger.get_current_instance()
    before, level = logging.root.manager.disable, logger.level
    yield
    logging.disable(before)
    logger.setLevel(level)  # mmengine's loggers forget here that they were disabled


# What an environment made with TOOLBOXES=mmpretrain lacks; elsewhere nothing.
ABSENT = [name for name in ('mmdet', 'mmseg', 'mmcv._ext')
          if importlib.util.find_spec(name) is None]


def skip_if_missing(report):
    """Skips a test, or a file, that stopped because of what is absent."""
    for name in ABSENT:
        # As Python, mmengine (by the distribution's name), tools/ and mmengine, for
        # their models, say it.
        said = (rf"No module named '{name}|{name}\w*,? (which )?is not installed|"
                r'(RetinaNet|EncoderDecoder) is not in the mmengine::model registry')
        if report.failed and re.search(said, str(report.longrepr)):
            report.outcome = 'skipped'
            report.longrepr = (str(report.fspath), 0,
                               f'{name} is not in this environment')
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return skip_if_missing((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return skip_if_missing((yield))
