"""softmax(S) V: which kernel computes it, and in how many pieces.

Here alone stands what kernels ask for, and what fits into memory.
"""
from typing import Callable, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .tracing import is_compiling, is_exporting

# Entries of the score matrices that are built at once: 4 MB in float32, which stay
# in a CPU's cache; more on a GPU, where the number was not measured. This bounds
# memory; everything else is linear in the pixels.
MAX_BUILT_SCORES = dict(cpu=2**20, gpu=2**25)


def attend_matrix(scores: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Of a score matrix (B, heads, N, M); v (B, heads, M, d)."""
    attn = F.dropout(scores.softmax(dim=-1), dropout)
    return attn.to(v.dtype) @ v


def is_empty(q: Tensor) -> bool:
    """Whether there are no images, which not every fused kernel takes.

    On GPUs some of torch before 2.10 refuse them in half precision; torch 2.14's gives
    the mask no gradient.
    """
    return not is_exporting() and len(q) == 0


def attend_factors(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Of S = q k^T, never built; q (B, heads, N, D), k and v (B, heads, M, D or d)."""
    if is_empty(q):
        return attend_matrix(q @ k.mT, v, dropout)
    dims = v.shape[-1]
    if v.device.type == 'cpu' and q.shape[-1] != dims:
        # Its fused kernel asks for equal widths; the fallback builds S.
        width = max(q.shape[-1], dims)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, scale=1.)[..., :dims]


def attend_sum(q: Tensor, k: Tensor, scores: Tensor, v: Tensor,
               dropout: float) -> Tensor:
    """Of S = q k^T + ``scores`` (B, heads, N, M), as the mask of a fused kernel."""
    if is_empty(q):
        return attend_matrix(q @ k.mT + scores, v, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=scores, dropout_p=dropout, scale=1.)


def piece_starts(num_queries: int, scores_per_query: int,
                 device: torch.device) -> Optional[Sequence[int]]:
    """Where the pieces begin whose scores may be built at once.

    Returns:
        Sequence[int] | None: First queries of pieces of equal size, but for the
        last. None: build none, for their number would be compiled into the graph.
    """
    if is_exporting():
        return [0]  # runtimes build every score matrix
    most = MAX_BUILT_SCORES['cpu' if device.type == 'cpu' else 'gpu']
    rows = max(1, most // max(1, scores_per_query))  # 0 of an empty batch
    if num_queries <= rows:
        return [0]
    return None if is_compiling() else range(0, num_queries, rows)


def recomputed(attend: Callable, *args) -> Tensor:
    """``attend(*args)``, whose matrices the backward pass builds again."""
    if torch.is_grad_enabled():
        return checkpoint(attend, *args, use_reentrant=False)
    return attend(*args)
