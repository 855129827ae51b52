"""Train and eval mode."""
from contextlib import contextmanager
from typing import Iterator

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, each of its modules afterwards in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # some of the toolboxes' return nothing
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
