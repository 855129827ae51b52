"""Operators as ONNX where torch's own translation freezes sizes or is roundabout."""
from typing import Optional, Sequence

import torch
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.ops.nn import \
    aten_scaled_dot_product_attention


def areas(size, count: int, like):
    """Means over areas as a matrix (count, size): what area pooling multiplies by.

    Area i holds the rows from ``floor(i * size / count)`` to before
    ``ceil((i + 1) * size / count)``.
    """
    first = op.Constant(value_ints=list(range(count)))
    first = op.Unsqueeze(first, op.Constant(value_ints=[1]))
    n, one = op.Constant(value_int=count), op.Constant(value_int=1)
    start = op.Div(op.Mul(first, size), n)
    last = op.Sub(op.Mul(op.Add(first, one), size), one)
    stop = op.Add(op.Div(last, n), one)
    row = op.Range(op.Constant(value_int=0), size, one)
    inside = op.And(op.GreaterOrEqual(row, start), op.Less(row, stop))
    return op.Div(op.CastLike(inside, like),
                  op.CastLike(op.Sub(stop, start), like))


def adaptive_avg_pool2d(x, output_size: Sequence[int]):
    """Area pooling as two products, over rows and over columns."""
    height, width = (
        op.Squeeze(op.Shape(x, start=axis, end=axis + 1)) for axis in (2, 3))
    rows = areas(height, output_size[0], x)
    columns = op.Transpose(areas(width, output_size[1], x), perm=[1, 0])
    return op.MatMul(op.MatMul(rows, x), columns)


def attention(q, k, v, attn_mask=None, dropout_p: float = 0., is_causal: bool = False,
              scale: Optional[float] = None, enable_gqa: bool = False):
    """softmax(q k^T + mask) v as it is written, which runtimes fuse.

    torch's own translation transposes k by way of its sizes, in ten nodes.
    """
    mask_adds = attn_mask is None or attn_mask.dtype == q.dtype
    if scale != 1 or is_causal or enable_gqa or not mask_adds:
        return aten_scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), v)


TRANSLATIONS = {
    torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}
