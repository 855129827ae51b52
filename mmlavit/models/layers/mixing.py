"""The learned linear maps of less attention, over tokens and over heads.

"Known" marks what the paper states, "our choice" what it leaves open.
"""
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attend import is_exporting
from .grid import Grid, to_map, to_tokens

if TYPE_CHECKING:
    from .scores import Scores


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
    in Psi it would cancel in the softmax.

    M is ``I + W / sqrt(n)``, with two bounds on W, so that scores keep their size
    through any number of layers, whatever the optimizer does (our choice):

    - The rows of W have a mean of zero. A constant added to all tokens stays that
      constant; a softmax does not see it.
    - The rows of M have norm 1.

    W starts at zero, so that a fresh LA layer repeats its predecessor's attention.

    Args:
        base_grid (tuple[int, int]): Grid (h, w) on which W is learned.
    """

    def __init__(self, base_grid: Grid) -> None:
        super().__init__()
        self.base_grid = tuple(base_grid)
        n = base_grid[0] * base_grid[1]
        self.weight = nn.Parameter(torch.zeros(n, n))

    def matrix(self) -> Tensor:
        """M, (n, n)."""
        n = len(self.weight)
        centred = self.weight - self.weight.mean(dim=1, keepdim=True)
        identity = torch.eye(n, dtype=centred.dtype, device=centred.device)
        return F.normalize(identity + centred * n**-0.5, dim=1)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) on ``grid`` -> (B, N, C)."""
        # bmm on an expanded matrix: matmul would transpose and copy x.
        matrix = self.matrix().expand(x.shape[0], -1, -1)
        if not is_exporting() and tuple(grid) == self.base_grid:
            return torch.bmm(matrix, x)
        base = to_tokens(
            F.adaptive_avg_pool2d(to_map(x, grid), self.base_grid))
        delta = to_map(torch.bmm(matrix, base) - base, self.base_grid)
        return x + to_tokens(
            F.interpolate(delta, grid, mode='bilinear', align_corners=False))

    def extra_repr(self) -> str:
        return f'base_grid={self.base_grid}'


class AttentionDownsample(nn.Module):
    """Scores of one stage -> scores over the next stage's query grid.

    Known: a depth-wise convolution, then a 1x1 convolution from the heads of
    one stage to those of the next. Our choice: 3x3 with the stride of the patch
    embedding, over the two-dimensional query grid, one kernel per head, no
    biases (they cancel in the softmax). Kernels are divided by the sum of their
    absolute weights, and the 1x1 convolution so that the mean square norm of its
    rows is 1: scores keep their size and do not vanish. Starts as the mean over the 3x3 window
    and with every new head inheriting one old head.

    Args:
        in_heads (int): Heads of the stage before.
        out_heads (int): Heads of this stage.
        stride (int): Stride between their query grids.
    """

    def __init__(self, in_heads: int, out_heads: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = nn.Parameter(torch.full((in_heads, 1, 3, 3), 1 / 9))
        source = torch.arange(out_heads) * in_heads // out_heads
        self.mix = nn.Parameter(F.one_hot(source, in_heads).float())

    def forward(self, scores: 'Scores', q_grid: Grid) -> 'Scores':
        """Scores over the last stage's ``q_grid`` -> over this stage's grid."""
        return scores.downsample(
            F.normalize(self.depthwise, p=1, dim=(1, 2, 3)),
            F.normalize(self.mix, dim=(0, 1)) * len(self.mix)**.5, self.stride,
            q_grid)

    def extra_repr(self) -> str:
        out_heads, in_heads = self.mix.shape
        return f'{in_heads}, {out_heads}, stride={self.stride}'


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
