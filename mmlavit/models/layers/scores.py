"""Attention scores, which pass from layer to layer, in two forms.

The scores that a less-attention (LA) layer inherits are known to be
``S_l = Psi(Theta(S_{l-1})^T)^T`` with linear maps over the token axes. Because
they are linear, ``S = Q K^T`` gives ``S_l = (Psi Q) (Theta K)^T`` exactly. So
`FactoredScores` carries Q and K, and `MaterialisedScores` the ``N x M`` matrix of
the formula, which is the literal reference. `Scores` is what both can do.

Token tensors are ``(B, N, C)`` with ``N = h * w`` queries, or ``M`` keys; heads lie
side by side in ``C``.
"""
import itertools
from typing import Iterator, List, NamedTuple, Optional, Protocol, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attend import (attend_factors, attend_matrix, attend_sum, piece_starts,
                     recomputed)
from .grid import (Grid, Grids, merge_heads, pool_tokens, split_heads, to_map,
                   to_tokens)
from .mixing import TokenMix, mix_heads

SCORE_PATHS = ('auto', 'factored', 'materialised')


class Scores(Protocol):
    """Scores (B, heads, N, M) in some form; every transform of them is linear."""

    @property
    def device(self) -> torch.device:
        ...

    def mix_tokens(self, theta: TokenMix, psi: TokenMix,
                   grids: Grids) -> 'Scores':
        """The scores Psi(Theta(S)^T)^T of a less-attention layer."""

    def downsample(self, depthwise: Tensor, mix: Tensor, stride: int,
                   q_grid: Grid) -> 'Scores':
        """Depth-wise convolution over the query grid, then head mixing."""

    def rows(self, start: int, stop: int) -> 'Scores':
        """The scores of some of the queries."""

    def between_regions(self, grids: Grids, factor: int = 1) -> 'Scores':
        """Means over regions of queries and keys, in float32 or better.

        A region is that of a key, or of ``factor`` x ``factor`` keys, so that the
        matrix is square: (B, heads, M, M). Tokens outside of the grid are in none.
        """

    def detach(self) -> 'Scores':
        """The same, through which no gradient flows."""

    def dense(self) -> Tensor:
        """The score matrix (B, heads, N, M)."""

    def attend(self, v: Tensor, dropout: float,
               own: Optional['Scores'] = None) -> Tensor:
        """softmax(S + S_own) V; v (B, heads, M, d) -> (B, heads, N, d)."""


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FactoredScores(NamedTuple):
    """Scores ``S[h'] = sum_h mix[h', h] q_h k_h^T``, never multiplied out.

    The softmax scale is part of k. Without ``mix`` every head is its own.
    """
    q: Tensor  # (B, N, heads * d)
    k: Tensor  # (B, M, heads * d)
    num_heads: int
    mix: Optional[Tensor] = None  # (heads', heads)
    # Whether scores with mixed heads are built for some queries at a time.
    build_mixed: bool = False

    @property
    def device(self) -> torch.device:
        return self.q.device

    def mix_tokens(self, theta: TokenMix, psi: TokenMix,
                   grids: Grids) -> 'FactoredScores':
        return self._replace(
            q=psi(self.q, grids.queries, grids.extra),
            k=theta(self.k, grids.keys, grids.extra))

    def downsample(self, depthwise: Tensor, mix: Tensor, stride: int,
                   q_grid: Grid) -> 'FactoredScores':
        q, k, heads = self.q, self.k, self.num_heads
        if self.mix is not None:
            # The kernels belong to the mixed heads: give each its own factors.
            q, k = (merge_heads(x) for x in self.expand())
            heads = len(self.mix)
        dims = q.shape[2]
        q = F.conv2d(
            to_map(q, q_grid),
            depthwise.repeat_interleave(dims // heads, dim=0),
            stride=stride,
            padding=1,
            groups=dims)
        return FactoredScores(to_tokens(q), k, heads, mix, self.build_mixed)

    def rows(self, start: int, stop: int) -> 'FactoredScores':
        return self._replace(q=self.q[:, start:stop])

    def split(self, step: int) -> Iterator['FactoredScores']:
        """The scores of ``step`` queries at a time.

        Unlike slices, whose gradients are each as large as the whole, the pieces'
        gradients are put together once.
        """
        return (self._replace(q=q) for q in self.q.split(step, dim=1))

    def between_regions(self, grids: Grids, factor: int = 1) -> 'FactoredScores':
        q, k = (at_least_float32(x[:, grids.extra:]) for x in (self.q, self.k))
        return self._replace(
            q=pool_tokens(q, grids.queries, grids.ratio * factor),
            k=pool_tokens(k, grids.keys, factor),
            mix=None if self.mix is None else at_least_float32(self.mix))

    def detach(self) -> 'FactoredScores':
        return self._replace(
            q=self.q.detach(),
            k=self.k.detach(),
            mix=None if self.mix is None else self.mix.detach())

    def expand(self) -> Tuple[Tensor, Tensor]:
        """Per-head factors q (B, heads', N, D), k (B, heads', M, D)."""
        if self.mix is None:
            return (split_heads(self.q, self.num_heads),
                    split_heads(self.k, self.num_heads))
        heads, source_heads = self.mix.shape
        # q_h' = concat_h(mix[h', h] q_h), all heads sharing k = concat_h(k_h)
        weight = self.mix.repeat_interleave(
            self.q.shape[2] // source_heads, dim=1)
        q = self.q.unsqueeze(1) * weight.to(self.q.dtype)[:, None]
        return q, self.k.unsqueeze(1).expand(-1, heads, -1, -1)

    def dense(self) -> Tensor:
        scores = split_heads(self.q, self.num_heads) @ split_heads(
            self.k, self.num_heads).transpose(2, 3)
        return scores if self.mix is None else mix_heads(scores, self.mix)

    def attend(self, v: Tensor, dropout: float,
               own: Optional['FactoredScores'] = None) -> Tensor:
        if self.mix is not None and self.build_mixed:
            return self._attend_in_pieces(v, dropout, own)
        return self._attend_factors(v, dropout, own)

    def _attend_factors(self, v: Tensor, dropout: float,
                        own: Optional['FactoredScores']) -> Tensor:
        q, k = self.expand()
        if own is not None:
            # One product of the factors side by side is the sum of both.
            q, k = (torch.cat(x, -1) for x in zip(own.expand(), (q, k)))
        return attend_factors(q, k, v, dropout)

    def _attend_in_pieces(self, v: Tensor, dropout: float,
                          own: Optional['FactoredScores']) -> Tensor:
        """Builds the scores for some queries at a time.

        Mixed heads share factors as wide as the whole stage before; their
        matrix, from the heads they had there, takes a fraction of the products.
        """
        (queries, keys), heads = (x.shape[1] for x in self[:2]), len(self.mix)
        starts = piece_starts(queries, v.shape[0] * heads * keys, v.device)
        if starts is None:
            return self._attend_factors(v, dropout, own)
        if len(starts) == 1:
            return self._attend_built(v, dropout, own)
        step = starts[1]
        owns = itertools.repeat(None) if own is None else own.split(step)
        return torch.cat([
            recomputed(FactoredScores._attend_built, part, v, dropout, own_part)
            for part, own_part in zip(self.split(step), owns)
        ], 2)

    def _attend_built(self, v: Tensor, dropout: float,
                      own: Optional['FactoredScores']) -> Tensor:
        if own is None:
            return attend_matrix(self.dense(), v, dropout)
        return attend_sum(*own.expand(), self.dense(), v, dropout)


class MaterialisedScores(NamedTuple):
    """Scores as the matrix of the paper's formulas: the literal reference."""
    scores: Tensor  # (B, heads, N, M)

    @property
    def device(self) -> torch.device:
        return self.scores.device

    def mix_tokens(self, theta: TokenMix, psi: TokenMix,
                   grids: Grids) -> 'MaterialisedScores':
        transposed = self._mix_last(theta, self.scores, grids.keys, grids.extra).mT
        return MaterialisedScores(
            self._mix_last(psi, transposed, grids.queries, grids.extra).mT)

    @staticmethod
    def _mix_last(mix: TokenMix, x: Tensor, grid: Grid, extra: int) -> Tensor:
        # (B, heads, R, T) -> (B, T, heads * R) -> back
        tokens = mix(x.flatten(1, 2).transpose(1, 2), grid, extra)
        return tokens.transpose(1, 2).view(x.shape)

    def downsample(self, depthwise: Tensor, mix: Tensor, stride: int,
                   q_grid: Grid) -> 'MaterialisedScores':
        batch, heads, _, keys = self.scores.shape
        # Every key is an image over the query grid, with heads as channels.
        maps = self.scores.permute(0, 3, 1, 2).reshape(
            batch * keys, heads, *q_grid)
        maps = F.conv2d(
            maps, depthwise, stride=stride, padding=1, groups=heads)
        scores = maps.flatten(2).unflatten(0, (batch, keys))
        scores = scores.permute(0, 2, 3, 1)
        return MaterialisedScores(mix_heads(scores, mix))

    def rows(self, start: int, stop: int) -> 'MaterialisedScores':
        return MaterialisedScores(self.scores[:, :, start:stop])

    def between_regions(self, grids: Grids,
                        factor: int = 1) -> 'MaterialisedScores':
        x = at_least_float32(self.scores[:, :, grids.extra:, grids.extra:])
        heads = x.shape[1]
        for grid, ratio in ((grids.queries, grids.ratio * factor),
                            (grids.keys, factor)):
            # The first axis is pooled, (B, N, heads * M), then the two change places.
            x = split_heads(pool_tokens(merge_heads(x), grid, ratio), heads).mT
        return MaterialisedScores(x)

    def detach(self) -> 'MaterialisedScores':
        return MaterialisedScores(self.scores.detach())

    def dense(self) -> Tensor:
        return self.scores

    def attend(self, v: Tensor, dropout: float,
               own: Optional['MaterialisedScores'] = None) -> Tensor:
        scores = self.scores if own is None else own.scores + self.scores
        return attend_matrix(scores, v, dropout)


def make_scores(q: Tensor, k: Tensor, num_heads: int, path: str) -> Scores:
    """The scores q k^T in the form that ``score_path`` names; see `LaViT`.

    Args:
        q (Tensor): (B, N, heads * d).
        k (Tensor): (B, M, heads * d), the softmax scale in it.
        num_heads (int): Number of heads.
        path (str): 'auto', 'factored' or 'materialised'.
    """
    scores = FactoredScores(q, k, num_heads, build_mixed=path == 'auto')
    return MaterialisedScores(
        scores.dense()) if path == 'materialised' else scores


class LayerScores(NamedTuple):
    """What a layer's attention is the softmax of: the sum of both parts."""
    own: Optional[Scores] = None  # from Q and K of the stage's last VA layer
    inherited: Optional[Scores] = None  # from the stage before

    @property
    def device(self) -> torch.device:
        return self.to_next_stage().device

    def tensors(self) -> List[Tensor]:
        """All that the scores are made of."""
        return [x for part in self if part is not None for x in part
                if isinstance(x, Tensor)]

    def _each(self, method: str, *args) -> 'LayerScores':
        """Both parts transformed, for every transform is linear."""
        return LayerScores(*(part if part is None else getattr(part, method)
                             (*args) for part in self))

    def mix_tokens(self, theta: TokenMix, psi: TokenMix,
                   grids: Grids) -> 'LayerScores':
        """The scores Psi(Theta(S)^T)^T of a less-attention layer."""
        return self._each('mix_tokens', theta, psi, grids)

    def rows(self, start: int, stop: int) -> 'LayerScores':
        """The scores of some of the queries."""
        return self._each('rows', start, stop)

    def between_regions(self, grids: Grids, factor: int = 1) -> 'LayerScores':
        """Means over regions, (B, heads, M, M), in float32 or better."""
        return self._each('between_regions', grids, factor)

    def detach(self) -> 'LayerScores':
        """The same, through which no gradient flows."""
        return self._each('detach')

    def dense(self) -> Tensor:
        """The score matrix (B, heads, N, M)."""
        parts = [part.dense() for part in self if part is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def attend(self, v: Tensor, dropout: float) -> Tensor:
        """softmax(S) V; v (B, heads, M, d) -> (B, heads, N, d)."""
        if self.inherited is None:
            return self.own.attend(v, dropout)
        return self.inherited.attend(v, dropout, self.own)

    def to_next_stage(self) -> Scores:
        """The part that crosses a stage boundary.

        What the stage itself computed (our choice): with what it inherited too,
        the factors would widen with every stage. A stage of LA layers alone has
        computed none and passes on what it inherited.
        """
        return self.inherited if self.own is None else self.own


class AttentionDownsample(nn.Module):
    """Scores of one stage -> scores over the next stage's query grid.

    Known: a depth-wise convolution, then a 1x1 convolution from the heads of
    one stage to those of the next. Our choice: 3x3 with the stride of the patch
    embedding, over the two-dimensional query grid, one kernel per head, no
    biases (they cancel in the softmax). Kernels are divided by the sum of their
    absolute weights, and the 1x1 convolution so that the mean square norm of its
    rows is 1: scores keep their size and do not vanish. Starts as the mean over the
    3x3 window and with every new head inheriting one old head.

    Args:
        in_heads (int): Heads of the stage before.
        out_heads (int): Heads of this stage.
        stride (int): Stride between their query grids.
    """

    def __init__(self, in_heads: int, out_heads: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = nn.Parameter(torch.empty(in_heads, 1, 3, 3))
        self.mix = nn.Parameter(torch.empty(out_heads, in_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The mean over the window, and every new head inherits one old head."""
        self.depthwise.fill_(1 / 9)
        out_heads, in_heads = self.mix.shape
        source = torch.arange(out_heads) * in_heads // out_heads
        self.mix.copy_(F.one_hot(source, in_heads))

    def forward(self, scores: Scores, q_grid: Grid) -> Scores:
        """Scores over the last stage's ``q_grid`` -> over this stage's grid."""
        return scores.downsample(
            F.normalize(self.depthwise, p=1, dim=(1, 2, 3)),
            F.normalize(self.mix, dim=(0, 1)) * len(self.mix)**.5, self.stride,
            q_grid)

    def extra_repr(self) -> str:
        out_heads, in_heads = self.mix.shape
        return f'{in_heads}, {out_heads}, stride={self.stride}'
