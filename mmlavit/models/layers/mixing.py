"""The learned linear maps of less attention, over tokens and over heads.

"Known" marks what the paper states, "our choice" what it leaves open.
"""
import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import Grid, to_map, to_tokens
from .tracing import is_exporting

MIXINGS = ('full', 'low_rank')
DEFAULT_RANK = 16  # our choice: a fifth of the full product at 14 x 14 tokens
MAX_ROW_SUM = 1.5  # our choice, measured: docs/reports/dp_loss.md


def bound(norms: Tensor, sums: Tensor) -> Tensor:
    """What divides rows of these norms and absolute sums, all (n, 1)."""
    return torch.maximum(norms, sums / MAX_ROW_SUM)


def mix_heads(x: Tensor, mix: Tensor) -> Tensor:
    """A 1x1 convolution over heads: (B, h, N, M), (h', h) -> (B, h', N, M)."""
    # bmm on an expanded weight: matmul would transpose and copy x.
    weight = mix.expand(x.shape[0], -1, -1)
    return torch.bmm(weight, x.flatten(2)).unflatten(2, x.shape[2:])


class TokenMix(nn.Module):
    """Theta or Psi: the learned linear map over one token axis.

    On the base grid it is a full matrix M. On any other grid it is
    ``I + U (M - I) D``: D averages areas down to the base grid and U resizes
    bilinearly back, at a cost linear in the tokens (our choice). There is no bias:
    in Psi it would cancel in the softmax. Tokens outside of the grid, such as a class
    token, are left as they are (our choice): they have their own rows and columns.

    M is ``I + W / sqrt(n)`` with three bounds, whatever the optimizer does (our
    choice):

    - The rows of W have a mean of zero, so that it adds nothing to scores that are all
      alike.
    - The rows of M are scaled to norm 1, which keeps the variance of scores that are
      uncorrelated between tokens.
    - Rows whose absolute entries then sum to more than 1.5 are scaled down to that. So
      M makes no score larger than 1.5 times the largest, however correlated they are.
      On another grid the factor is 3.5, for there the rows of M - I, which sum to at
      most 2.5, are added to the identity.

    W starts at zero, so that a fresh LA layer repeats its predecessor's attention.

    Args:
        base_grid (tuple[int, int]): Grid (h, w) on which W is learned.
    """

    def __init__(self, base_grid: Grid) -> None:
        super().__init__()
        self.base_grid = tuple(base_grid)
        self._make_weights(math.prod(self.base_grid))

    def _make_weights(self, n: int) -> None:
        self.weight = nn.Parameter(torch.zeros(n, n))

    def reset_to_identity(self) -> None:
        """M becomes the identity."""
        nn.init.zeros_(self.weight)

    def matrix(self) -> Tensor:
        """M, (n, n)."""
        n = len(self.weight)
        centred = self.weight - self.weight.mean(dim=1, keepdim=True)
        identity = torch.eye(n, dtype=centred.dtype, device=centred.device)
        rows = identity + centred * n**-0.5
        return rows / bound(rows.norm(dim=1, keepdim=True),
                            rows.abs().sum(1, keepdim=True))

    def _on_base(self, x: Tensor, extra: int = 0) -> Tensor:
        """M x; x (B, extra + n, C), whose first ``extra`` tokens stay."""
        matrix = self.matrix()
        if extra:  # a padded matrix, not slices and copies of x
            matrix = torch.block_diag(matrix.new_ones(extra).diag(), matrix)
        # bmm on an expanded matrix: matmul would transpose and copy x.
        return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)

    def forward(self, x: Tensor, grid: Grid, extra: int = 0) -> Tensor:
        """(B, extra + N, C) -> the same; the last N tokens lie on ``grid``."""
        if not is_exporting() and tuple(grid) == self.base_grid:
            return self._on_base(x, extra)
        base = to_tokens(
            F.adaptive_avg_pool2d(to_map(x[:, extra:], grid), self.base_grid))
        delta = to_map(self._on_base(base) - base, self.base_grid)
        delta = to_tokens(
            F.interpolate(delta, grid, mode='bilinear', align_corners=False))
        return x + (F.pad(delta, (0, 0, extra, 0)) if extra else delta)

    def extra_repr(self) -> str:
        return f'base_grid={self.base_grid}'


class LowRankMix(TokenMix):
    """Theta or Psi of low rank: a cheaper `TokenMix` (our choice).

    M is ``I + U V^T / sqrt(n rank)`` with the bounds of `TokenMix`; U and V are (n,
    rank) and the columns of V have a mean of zero. The rank is in the scale because
    an entry of U V^T is a sum over it: without, scores grew with the learning rate
    (our choice, see docs/reports/dp_loss.md). M is applied as two thin products. The
    norms are the roots of ``1 + 2 u.v + u (V^T V) u^T``, for the rows u, v of U and V
    / sqrt(n rank). The sums of absolute entries are those on the base grid, where M
    is built for them, without the tokens.

    On another grid U, V and the sums are resized bilinearly, where `TokenMix` resizes
    tokens; V is scaled so that a product with it stays a mean.

    U starts at zero, so that M starts as the identity, and V at random, so that U has
    a gradient from the first step on.

    Args:
        base_grid (tuple[int, int]): Grid (h, w) of n tokens on which it is learned.
        rank (int): Columns of U and V; n where that is less. Default: 16.
    """

    def __init__(self, base_grid: Grid, rank: int = DEFAULT_RANK) -> None:
        self.rank = min(rank, math.prod(base_grid))
        super().__init__(base_grid)

    def _make_weights(self, n: int) -> None:
        self.u = nn.Parameter(torch.zeros(n, self.rank))
        self.v = nn.Parameter(torch.randn(n, self.rank))

    def reset_to_identity(self) -> None:
        """M becomes the identity."""
        nn.init.zeros_(self.u)

    def _resized(self, factor: Tensor, grid: Grid) -> Tensor:
        """(n, rank) -> (N, rank) on another grid."""
        maps = factor.T.unflatten(1, self.base_grid).unsqueeze(0)
        return F.interpolate(
            maps, grid, mode='bilinear', align_corners=False).flatten(2)[0].T

    def _bounded(self, grid: Grid) -> Tuple[Tensor, Tensor, Tensor]:
        """U (N, rank), V scaled (N, rank), and what divides the rows (N, 1)."""
        u, v, norms = self._factors(self.base_grid)
        with torch.autocast(u.device.type, enabled=False):
            sums = self._rows(u, v).abs().sum(1, keepdim=True)
        if is_exporting() or tuple(grid) != self.base_grid:
            sums = self._resized(sums, grid)
            u, v, norms = self._factors(grid)
        return u, v, bound(norms, sums)

    def _rows(self, u: Tensor, v: Tensor) -> Tensor:
        """M before it is bounded, (n, n)."""
        return torch.eye(len(u), dtype=u.dtype, device=u.device) + u @ v.T

    def _factors(self, grid: Grid) -> Tuple[Tensor, Tensor, Tensor]:
        """U (N, rank), V scaled (N, rank), and the norms of the rows (N, 1)."""
        u, v = self.u, self.v
        if is_exporting() or tuple(grid) != self.base_grid:
            u, v = self._resized(u, grid), self._resized(v, grid)
        scale = (len(self.v) / self.rank)**.5 / (grid[0] * grid[1])
        v = (v - v.mean(dim=0)) * scale
        with torch.autocast(u.device.type, enabled=False):
            square = 1 + 2 * (u * v).sum(1) + (u @ (v.T @ v) * u).sum(1)
        # A row sums to 1, so its norm is no less; rounding may say otherwise.
        least = 1 / (grid[0] * grid[1])
        return u, v, square.clamp_min(least).sqrt().unsqueeze(1)

    def matrix(self) -> Tensor:
        """M, (n, n)."""
        u, v, divisors = self._bounded(self.base_grid)
        return self._rows(u, v) / divisors

    def forward(self, x: Tensor, grid: Grid, extra: int = 0) -> Tensor:
        """(B, extra + N, C) -> the same; the last N tokens lie on ``grid``."""
        u, v, divisors = self._bounded(grid)
        if extra:
            u, v = (F.pad(factor, (0, 0, extra, 0)) for factor in (u, v))
            divisors = F.pad(divisors, (0, 0, extra, 0), value=1.)
        batch = x.shape[0]
        seen = torch.bmm(v.T.expand(batch, -1, -1), x)  # (B, rank, C)
        mixed = torch.baddbmm(x, u.expand(batch, -1, -1), seen)
        return mixed / divisors.to(mixed.dtype)

    def extra_repr(self) -> str:
        return f'base_grid={self.base_grid}, rank={self.rank}'


def build_mix(mixing: str, base_grid: Grid, rank: int = DEFAULT_RANK) -> TokenMix:
    """Theta or Psi: 'full' or 'low_rank'."""
    return (LowRankMix(base_grid, rank)
            if mixing == 'low_rank' else TokenMix(base_grid))


class ReAttention(nn.Module):
    """DeepViT's Re-Attention: heads of attention maps mixed, then a norm.

    A learned heads x heads matrix and a batch norm over heads. It starts as the
    identity, so that a fresh layer ranks keys as its predecessor does.

    Args:
        num_heads (int): Number of heads.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(num_heads))
        self.norm = nn.BatchNorm2d(num_heads)

    def forward(self, attn: Tensor) -> Tensor:
        """Probabilities (B, heads, N, M) -> their mixture, of any sign."""
        return self.norm(mix_heads(attn, self.mix))
