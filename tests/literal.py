"""The mixing of tokens as the one dense matrix of its formula."""
import math

import numpy as np
import torch

from mmlavit.models.layers.mixing import LowRankMix, TokenMix


def area_matrix(size: int, base: int) -> np.ndarray:
    """Area pooling of a row of ``size`` cells to ``base`` cells."""
    matrix = np.zeros((base, size))
    for i in range(base):
        start, end = i * size // base, math.ceil((i + 1) * size / base)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def bilinear_matrix(base: int, size: int) -> np.ndarray:
    """Linear interpolation of ``base`` cell centres at ``size`` centres."""
    matrix = np.zeros((size, base))
    for i in range(size):
        x = max((i + 0.5) * base / size - 0.5, 0)
        low = min(int(x), base - 1)
        high = min(low + 1, base - 1)
        matrix[i, low] += 1 - (x - low)
        matrix[i, high] += x - low
    return matrix


def dense_mix(mix: TokenMix, grid: tuple) -> torch.Tensor:
    """I + U (M - I) D as one (N, N) matrix, M with bounded rows.

    Of low rank, U and V are resized instead.
    """
    down, up = (np.kron(*(matrix(*sizes) for sizes in pairs))
                for matrix, pairs in ((area_matrix,
                                       zip(grid, mix.base_grid)),
                                      (bilinear_matrix,
                                       zip(mix.base_grid, grid))))
    n, base = grid[0] * grid[1], math.prod(mix.base_grid)
    if isinstance(mix, LowRankMix):
        return dense_low_rank(mix, torch.tensor(up))
    changes = torch.stack([row - row.sum() / base for row in mix.weight])
    rows = []
    for i, row in enumerate(changes):
        row = row / math.sqrt(base) + torch.eye(base).double()[i]
        row = row / row.square().sum().sqrt()
        rows.append(row / max(1, row.abs().sum() / 1.5))
    learned = torch.stack(rows) - torch.eye(base)
    return torch.eye(n).double() + torch.tensor(up) @ learned @ torch.tensor(
        down)


def dense_low_rank(mix: LowRankMix, up: torch.Tensor) -> torch.Tensor:
    """I + U V^T with bounded rows; ``up`` (N, n) resizes U, V and the absolute sums."""
    rows, base = (low_rank_rows(mix, x)
                  for x in (up, torch.eye(up.shape[1]).double()))
    sums = up @ base.abs().sum(1)
    return torch.stack([row / max(row.square().sum().sqrt(), total / 1.5)
                        for row, total in zip(rows, sums)])


def low_rank_rows(mix: LowRankMix, up: torch.Tensor) -> torch.Tensor:
    """I + U V^T, row by row."""
    n, base = up.shape
    v = torch.stack([v - v.sum() / n for v in (up @ mix.v).T], dim=1)
    rows = torch.eye(n).double()
    return torch.stack([
        row + (u * v).sum(1) * math.sqrt(base / mix.rank) / n
        for row, u in zip(rows, up @ mix.u)])


def with_extra(matrix: torch.Tensor, extra: int) -> torch.Tensor:
    """Tokens before those of the matrix, with their own rows and columns."""
    return torch.block_diag(torch.eye(extra).double(), matrix)
