import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# The shell scripts take python from the PATH.
os.environ['PATH'] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ['PATH']])


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='session')
def digits(tmp_path_factory) -> Path:
    """The embedded data, small; not to be changed."""
    out = tmp_path_factory.mktemp('data') / 'digits'
    script = Path(__file__).parents[1] / 'tools/make_digits.py'
    subprocess.run([sys.executable, script, out, '--train', '8', '--val', '4'],
                   check=True)
    return out


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
