"""Multiply-adds: mmengine's counter, and the operators it has no handle for.

Without them it counts zero for fused attention, in LaViT as in other models.
As everywhere in mmengine a multiply-add counts as one.
"""
import warnings
from math import prod
from typing import Tuple

import torch
from mmengine.analysis import (complexity_analysis,
                               get_model_complexity_info)
from mmengine.analysis.jit_handles import get_shape
from torch import nn


def sdpa_flop_jit(inputs: list, outputs: list) -> int:
    """Q K^T and A V of ``scaled_dot_product_attention``."""
    q, k, v = (get_shape(x) for x in inputs[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def baddbmm_flop_jit(inputs: list, outputs: list) -> int:
    """The batched product in ``baddbmm``."""
    return prod(get_shape(inputs[1])) * get_shape(inputs[2])[-1]


def register_flop_handles() -> None:
    """Adds the handles where mmengine, or its user, has none."""
    handles = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    handles.setdefault('aten::scaled_dot_product_attention', sdpa_flop_jit)
    handles.setdefault('aten::baddbmm', baddbmm_flop_jit)


def count_macs(model: nn.Module, size: Tuple[int, int]) -> float:
    """Multiply-adds for one image, attention products included, in eval mode.

    Args:
        model (nn.Module): A backbone, or a whole model of the toolboxes.
        size (tuple[int, int]): (H, W) of the image in pixels.
    """
    training = model.training
    model.eval()  # some of the toolboxes' return nothing
    image = torch.rand(1, 3, *size, device=next(model.parameters()).device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # the tracer's, of sizes it takes as fixed
        flops = get_model_complexity_info(
            model, inputs=(image, ), show_table=False,
            show_arch=False)['flops']
    model.train(training)
    return flops
