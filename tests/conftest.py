import socket

import pytest
import torch


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
