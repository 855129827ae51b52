"""Parameters of a model, and multiply-adds by mmengine's counter."""
import warnings
from typing import Tuple

import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn

from ..utils.images import image_channels
from ..utils.modes import eval_mode


def count_parameters(model: nn.Module) -> int:
    """Shared ones once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, size: Tuple[int, int]) -> float:
    """Multiply-adds for one image, attention products included, in eval mode.

    Args:
        model (nn.Module): A backbone, or a whole model of the toolboxes.
        size (tuple[int, int]): (H, W) of the image in pixels.
    """
    like = next(model.parameters())
    image = torch.rand(1, image_channels(model), *size, device=like.device,
                       dtype=like.dtype)
    with eval_mode(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # the tracer's, of sizes it takes as fixed
        return FlopAnalyzer(model, (image, )).total()
