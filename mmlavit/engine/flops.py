"""Multiply-adds of the operators for which mmengine's counter has no handle.

Without them it counts zero for fused attention, in LaViT as in other models.
As everywhere in mmengine a multiply-add counts as one.
"""
from math import prod

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape


def sdpa_flop_jit(inputs: list, outputs: list) -> int:
    """Q K^T and A V of ``scaled_dot_product_attention``."""
    q, k, v = (get_shape(x) for x in inputs[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def baddbmm_flop_jit(inputs: list, outputs: list) -> int:
    """The batched product in ``baddbmm``."""
    return prod(get_shape(inputs[1])) * get_shape(inputs[2])[-1]


def install() -> None:
    """Adds the handles where mmengine, or its user, has none."""
    handles = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    handles.setdefault('aten::scaled_dot_product_attention', sdpa_flop_jit)
    handles.setdefault('aten::baddbmm', baddbmm_flop_jit)
