"""Operators that torch's exporter would freeze to the example's size, as ONNX.

Each is one function of ONNX operators that computes from the sizes at run time.
"""
from typing import Sequence

import torch
from onnxscript import opset20 as op


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


TRANSLATIONS = {
    torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
}
