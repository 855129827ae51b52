"""Where tokens lie: grids, and the ways between tokens, maps, heads and regions."""
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import is_exporting, is_tracing

Grid = Tuple[int, int]


def to_map(x: Tensor, grid: Grid) -> Tensor:
    """(B, h * w, C) -> (B, C, h, w), a channels-last view."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C), a view of a channels-last map."""
    return x.flatten(2).transpose(1, 2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d), a view."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def pooled_grid(grid: Grid, ratio: int) -> Grid:
    """The grid of the regions of ``ratio`` x ``ratio`` tokens, ragged ones too."""
    return tuple((size + ratio - 1) // ratio for size in grid)


def pool_tokens(x: Tensor, grid: Grid, ratio: int) -> Tensor:
    """(B, N, C) -> (B, M, C): means over the regions of ``ratio`` x ``ratio``."""
    if isinstance(ratio, int) and ratio == 1:
        return x
    if is_exporting():  # as products, for the ratio may be a symbol
        rows, columns = (region_means(size, ratio, x) for size in grid)
        return to_tokens(rows @ to_map(x, grid) @ columns.mT)
    return to_tokens(
        F.avg_pool2d(
            to_map(x, grid), ratio, ceil_mode=True, count_include_pad=False))


def region_means(size: int, ratio: int, like: Tensor) -> Tensor:
    """(regions, size): the means over ``ratio`` rows each, as a matrix."""
    rows = torch.arange(size, device=like.device)
    regions = rows[:(size + ratio - 1) // ratio, None]
    inside = (rows // ratio == regions).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class Grids(NamedTuple):
    """The two grids of a stage's attention, for one size of input.

    Args:
        queries (tuple[int, int]): Grid (h, w) of the queries.
        ratio (int): Query rows, and columns, that share a key.
        extra (int): Queries, and keys, before those of the grid: class, distillation
            and register tokens, which lie nowhere. Default: 0.
    """
    queries: Grid
    ratio: int
    extra: int = 0

    @classmethod
    def of(cls, queries: Grid, sr_ratio: int,
           max_key_grid: Optional[int]) -> 'Grids':
        """The smallest multiple of ``sr_ratio`` keeps within ``max_key_grid``.

        Stages whose total stride times ``sr_ratio`` is the same get the same grid
        of keys.
        """
        ratio = sr_ratio
        if max_key_grid is not None:
            most = sr_ratio * max_key_grid
            longest = torch.sym_max(*queries) if is_exporting() else max(queries)
            ratio *= (longest + most - 1) // most
            if is_tracing():
                ratio = int(ratio)  # a tensor there, which torch 2.1 cannot pool by
        return cls(queries, ratio)

    @property
    def keys(self) -> Grid:
        """Grid of the keys, one for each region of queries."""
        return pooled_grid(self.queries, self.ratio)

    def pool(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, M, C): queries averaged over each key's region."""
        return pool_tokens(x, self.queries, self.ratio)
