"""Vanilla and less attention over spatially reduced keys.

Token tensors are ``(B, N, C)`` with ``N = h * w`` queries, or ``M`` keys, of a
``grid = (h, w)``; heads lie side by side in ``C``. "Known" marks what the paper
states, "our choice" what it leaves open.

The scores that a less-attention (LA) layer inherits are known to be
``S_l = Psi(Theta(S_{l-1})^T)^T`` with linear maps over the token axes. Because
they are linear, ``S = Q K^T`` gives ``S_l = (Psi Q) (Theta K)^T`` exactly. So
there are two representations of scores with one interface: `FactoredScores`
carries Q and K, `MaterialisedScores` the ``N x M`` matrix of the formula.
"""
import functools
from typing import Callable, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.utils.dl_utils.parrots_wrapper import (_BatchNorm,
                                                       _InstanceNorm)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Grid = Tuple[int, int]

# Not in torch 2.1, which does not compile LaViT.
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)

# Entries of the score matrices that score_path='auto' builds at once: 4 MB in
# float32, which stay in a CPU's cache; more on a GPU, where the number was not
# measured. This bounds memory; everything else is linear in the pixels.
MAX_BUILT_SCORES = dict(cpu=2**20, gpu=2**25)


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
    return tuple(-(-size // ratio) for size in grid)


def pool_tokens(x: Tensor, grid: Grid, ratio: int) -> Tensor:
    """(B, N, C) -> (B, M, C): means over the region that each key stands for."""
    if ratio == 1:
        return x
    return to_tokens(
        F.avg_pool2d(
            to_map(x, grid), ratio, ceil_mode=True, count_include_pad=False))


def key_ratio(grid: Grid, sr_ratio: int, max_key_grid: Optional[int]) -> int:
    """Query rows, and columns, that share a key: the ratio or a multiple of it.

    The smallest multiple that keeps the key grid within ``max_key_grid``. Stages
    whose total stride times ``sr_ratio`` is the same get the same key grid.
    """
    if max_key_grid is None:
        return sr_ratio
    ratio = sr_ratio * -(-max(grid) // (sr_ratio * max_key_grid))
    # A tracer's sizes are tensors, which torch 2.1 does not pool by.
    return int(ratio) if torch.jit.is_tracing() else ratio


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalise(norm: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """Applies a norm to tokens; batch, instance and group norms see a map."""
    if isinstance(norm, (_BatchNorm, _InstanceNorm, nn.GroupNorm)):
        return to_tokens(norm(to_map(x, grid)))
    return norm(x)


class TokenMix(nn.Module):
    """Theta or Psi: the learned linear map over one token axis.

    ``x + U W D x``: on the base grid D and U are the identity and this is the
    full matrix ``I + W``; on any other grid D averages areas down to the base
    grid and U resizes bilinearly back, at a cost linear in the tokens (our
    choice). W starts at zero, so that a fresh LA layer repeats its
    predecessor's attention. There is no bias: in Psi it would cancel in the
    softmax.

    Args:
        base_grid (tuple[int, int]): Grid (h, w) on which W is learned.
    """

    def __init__(self, base_grid: Grid) -> None:
        super().__init__()
        self.base_grid = tuple(base_grid)
        n = base_grid[0] * base_grid[1]
        self.weight = nn.Parameter(torch.zeros(n, n))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) on ``grid`` -> (B, N, C)."""
        # bmm on an expanded weight: matmul would transpose and copy x.
        weight = self.weight.expand(len(x), -1, -1)
        if tuple(grid) == self.base_grid:
            return torch.baddbmm(x, weight, x)
        base = to_tokens(
            F.adaptive_avg_pool2d(to_map(x, grid), self.base_grid))
        delta = to_map(torch.bmm(weight, base), self.base_grid)
        return x + to_tokens(
            F.interpolate(delta, grid, mode='bilinear', align_corners=False))

    def extra_repr(self) -> str:
        return f'base_grid={self.base_grid}'


def mix_heads(scores: Tensor, mix: Tensor) -> Tensor:
    """A 1x1 convolution over heads: (B, h, N, M), (h', h) -> (B, h', N, M)."""
    # bmm on an expanded weight: matmul would transpose and copy the scores.
    weight = mix.expand(len(scores), -1, -1)
    return torch.bmm(weight, scores.flatten(2)).unflatten(2, scores.shape[2:])


class FactoredScores(NamedTuple):
    """Scores ``S[h'] = sum_h mix[h', h] q_h k_h^T``, never multiplied out.

    The softmax scale is part of k. Without ``mix`` every head is its own.
    """
    q: Tensor  # (B, N, heads * d)
    k: Tensor  # (B, M, heads * d)
    num_heads: int
    mix: Optional[Tensor] = None  # (heads', heads)

    def mix_tokens(self, theta: TokenMix, psi: TokenMix, q_grid: Grid,
                   k_grid: Grid) -> 'FactoredScores':
        """The scores Psi(Theta(S)^T)^T of a less-attention layer."""
        return self._replace(
            q=psi(self.q, q_grid), k=theta(self.k, k_grid))

    def downsample(self, depthwise: Tensor, mix: Tensor, stride: int,
                   q_grid: Grid) -> 'FactoredScores':
        """Depth-wise convolution over the query grid, then head mixing."""
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
        return FactoredScores(to_tokens(q), k, heads, mix)

    def rows(self, start: int, stop: int) -> 'FactoredScores':
        """The scores of some of the queries."""
        return self._replace(q=self.q[:, start:stop])

    def pool_queries(self, q_grid: Grid, ratio: int) -> 'FactoredScores':
        """Scores between regions, (B, heads', M, M), in float32 or better."""
        return self._replace(
            q=pool_tokens(at_least_float32(self.q), q_grid, ratio),
            k=at_least_float32(self.k),
            mix=None if self.mix is None else at_least_float32(self.mix))

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
        """The score matrix (B, heads', N, M)."""
        scores = split_heads(self.q, self.num_heads) @ split_heads(
            self.k, self.num_heads).transpose(2, 3)
        return scores if self.mix is None else mix_heads(scores, self.mix)


class MaterialisedScores(NamedTuple):
    """Scores as the matrix of the paper's formulas: the literal reference."""
    scores: Tensor  # (B, heads, N, M)

    def mix_tokens(self, theta: TokenMix, psi: TokenMix, q_grid: Grid,
                   k_grid: Grid) -> 'MaterialisedScores':
        """The scores Psi(Theta(S)^T)^T of a less-attention layer."""
        transposed = self._mix_last(theta, self.scores, k_grid).mT
        return MaterialisedScores(self._mix_last(psi, transposed, q_grid).mT)

    @staticmethod
    def _mix_last(mix: TokenMix, x: Tensor, grid: Grid) -> Tensor:
        # (B, heads, R, T) -> (B, T, heads * R) -> back
        tokens = mix(x.flatten(1, 2).transpose(1, 2), grid)
        return tokens.transpose(1, 2).view(x.shape)

    def downsample(self, depthwise: Tensor, mix: Tensor, stride: int,
                   q_grid: Grid) -> 'MaterialisedScores':
        """Depth-wise convolution over the query grid, then head mixing."""
        batch, heads, _, keys = self.scores.shape
        # Every key is an image over the query grid, with heads as channels.
        maps = self.scores.permute(0, 3, 1, 2).reshape(
            batch * keys, heads, *q_grid)
        maps = F.conv2d(
            maps,
            depthwise,
            stride=stride,
            padding=1,
            groups=heads)
        scores = maps.flatten(2).unflatten(0, (batch, keys))
        scores = scores.permute(0, 2, 3, 1)
        return MaterialisedScores(mix_heads(scores, mix))

    def rows(self, start: int, stop: int) -> 'MaterialisedScores':
        """The scores of some of the queries."""
        return MaterialisedScores(self.scores[:, :, start:stop])

    def pool_queries(self, q_grid: Grid, ratio: int) -> 'MaterialisedScores':
        """Scores between regions, (B, heads, M, M), in float32 or better."""
        x = at_least_float32(self.scores)
        tokens = x.transpose(1, 2).flatten(2)  # (B, N, heads * M)
        pooled = pool_tokens(tokens, q_grid, ratio)
        return MaterialisedScores(
            pooled.unflatten(2, (x.shape[1], -1)).transpose(1, 2))

    def dense(self) -> Tensor:
        """The score matrix (B, heads, N, M)."""
        return self.scores


Scores = Union[FactoredScores, MaterialisedScores]


class LayerScores(NamedTuple):
    """What a layer's attention is the softmax of: the sum of both parts."""
    own: Optional[Scores] = None  # from Q and K of the stage's last VA layer
    inherited: Optional[Scores] = None  # from the stage before

    def parts(self) -> Tuple[Scores, ...]:
        return tuple(part for part in self if part is not None)

    def dense(self) -> Tensor:
        """The score matrix (B, heads, N, M)."""
        return functools.reduce(torch.add,
                                (part.dense() for part in self.parts()))

    def each(self, function: Callable[[Scores], Scores]) -> 'LayerScores':
        """The function applied to both parts; every transform is linear."""
        return LayerScores(*(part if part is None else function(part)
                             for part in self))

    def mix_tokens(self, theta: TokenMix, psi: TokenMix, q_grid: Grid,
                   k_grid: Grid) -> 'LayerScores':
        """The scores Psi(Theta(S)^T)^T of a less-attention layer."""
        return self.each(lambda part: part.mix_tokens(theta, psi, q_grid, k_grid))

    def rows(self, start: int, stop: int) -> 'LayerScores':
        """The scores of some of the queries."""
        return self.each(lambda part: part.rows(start, stop))

    def pool_queries(self, q_grid: Grid, ratio: int) -> 'LayerScores':
        """Scores between regions, (B, heads, M, M), in float32 or better."""
        return self.each(lambda part: part.pool_queries(q_grid, ratio))

    @property
    def device(self) -> torch.device:
        return self.parts()[0][0].device

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
    biases (they cancel in the softmax). Starts as the mean over the 3x3 window
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

    def forward(self, scores: Scores, q_grid: Grid) -> Scores:
        """Scores over the last stage's ``q_grid`` -> over this stage's grid."""
        return scores.downsample(self.depthwise, self.mix, self.stride, q_grid)

    def extra_repr(self) -> str:
        out_heads, in_heads = self.mix.shape
        return f'{in_heads}, {out_heads}, stride={self.stride}'


class SpatialReduction(nn.Module):
    """Tokens -> tokens of the key grid, by a strided convolution and a norm.

    The grid is padded at the bottom and right to a multiple of the ratio, so
    that there are ``ceil(h / ratio) x ceil(w / ratio)`` keys.

    Args:
        dims (int): Number of channels.
        ratio (int): Kernel size and stride.
        norm_cfg (dict): Config of the norm.
    """

    def __init__(self, dims: int, ratio: int, norm_cfg: dict) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(dims, dims, ratio, stride=ratio)
        self.norm = build_norm_layer(norm_cfg, dims)[1]

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, M, C)."""
        x = to_map(x, grid)
        bottom, right = (-size % self.ratio for size in grid)
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        x = self.conv(x)
        return normalise(self.norm, to_tokens(x), x.shape[2:])


class Attention(nn.Module):
    """What both kinds of layer share: values, aggregation, output projection.

    Args:
        dims (int): Number of channels.
        num_heads (int): Number of heads.
        sr_ratio (int): Spatial reduction of keys and values; 1 for none.
        max_key_grid (int, optional): Largest side of the key grid; see `LaViT`.
        attn_drop (float): Dropout rate of the attention probabilities.
        proj_drop (float): Dropout rate of the output.
        norm_cfg (dict): Config of the norm behind the spatial reduction.
        score_path (str): 'auto', 'factored' or 'materialised'; see `LaViT`.
        reduction (str): 'conv', a strided convolution and a norm, or 'pool',
            means over the same windows. Defaults to 'conv'.
    """

    def __init__(self,
                 dims: int,
                 num_heads: int,
                 sr_ratio: int,
                 max_key_grid: Optional[int],
                 attn_drop: float,
                 proj_drop: float,
                 norm_cfg: dict,
                 score_path: str,
                 reduction: str = 'conv') -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.max_key_grid = max_key_grid
        self.attn_drop = attn_drop
        self.score_path = score_path
        self.reduction = (
            SpatialReduction(dims, sr_ratio, norm_cfg)
            if sr_ratio > 1 and reduction == 'conv' else None)
        self.proj = nn.Linear(dims, dims)
        self.proj_drop = nn.Dropout(proj_drop)

    def ratio(self, grid: Grid) -> int:
        """Query rows, and columns, of ``grid`` that share a key."""
        return key_ratio(grid, self.sr_ratio, self.max_key_grid)

    def key_grid(self, grid: Grid) -> Grid:
        return pooled_grid(grid, self.ratio(grid))

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, M, C), what keys and values are projected from."""
        if self.reduction is None:
            return pool_tokens(x, grid, self.ratio(grid))
        # max_key_grid is kept by a mean before the convolution.
        factor = self.ratio(grid) // self.sr_ratio
        return self.reduction(
            pool_tokens(x, grid, factor), pooled_grid(grid, factor))

    def aggregate(self, scores: LayerScores, v: Tensor) -> Tensor:
        """Z = softmax(S) V and its projection; v (B, M, C) -> (B, N, C)."""
        v = split_heads(v, self.num_heads)
        if self.builds_map():
            attn = self.probabilities(scores)
            z = F.dropout(attn, self.dropout).to(v.dtype) @ v
        elif self.score_path == 'auto' and scores.inherited is not None:
            z = self.attend_in_pieces(scores, v)
        else:
            z = self.attend_factored(scores, v)
        return self.proj_drop(self.proj(merge_heads(z)))

    @property
    def dropout(self) -> float:
        return self.attn_drop if self.training else 0.

    def builds_map(self) -> bool:
        """Whether the whole attention map is built in this layer."""
        return self.score_path == 'materialised'

    def probabilities(self, scores: LayerScores) -> Tensor:
        """The attention map (B, heads, N, M)."""
        return scores.dense().softmax(dim=-1)

    def attend_factored(self, scores: LayerScores, v: Tensor) -> Tensor:
        """softmax(S) V of factors alone; v (B, heads, M, d), as the result."""
        # One product of the factors side by side is the sum of the parts.
        q, k = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
                for parts in zip(*(p.expand() for p in scores.parts())))
        dims = v.shape[-1]
        if v.device.type == 'cpu':
            # Its fused kernel asks for equal widths; the fallback builds S.
            width = max(q.shape[-1], dims)
            q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout, scale=1.)[..., :dims]

    def attend_in_pieces(self, scores: LayerScores, v: Tensor) -> Tensor:
        """`attend_factored` where scores are inherited, some queries at a time.

        The inherited factors are as wide as the whole stage before; their
        matrix, from the heads they had there, takes a fraction of the products.
        """
        queries, keys = (x.shape[1] for x in scores.inherited[:2])
        most = MAX_BUILT_SCORES['cpu' if v.device.type == 'cpu' else 'gpu']
        row = max(1, v.shape[0] * self.num_heads * keys)  # of an empty batch, 0
        rows = max(1, most // row)
        if queries <= rows:
            return self.attend_mixed(scores, v)
        if is_compiling():
            # The number of pieces would be built into the graph.
            return self.attend_factored(scores, v)
        pieces = []
        for start in range(0, queries, rows):
            piece = scores.rows(start, start + rows)
            pieces.append(
                checkpoint(self.attend_mixed, piece, v, use_reentrant=False)
                if torch.is_grad_enabled() else self.attend_mixed(piece, v))
        return torch.cat(pieces, dim=2)

    def attend_mixed(self, scores: LayerScores, v: Tensor) -> Tensor:
        """`attend_factored` with the inherited part as a matrix."""
        inherited = scores.inherited.dense()
        if scores.own is None:
            attn = F.dropout(inherited.softmax(dim=-1), self.dropout)
            return attn.to(v.dtype) @ v
        q, k = scores.own.expand()
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=inherited, dropout_p=self.dropout, scale=1.)


class VanillaAttention(Attention):
    """VA: scores from this layer's own Q and K, ``S = Q K^T / sqrt(d)``.

    Arguments as for `Attention`, and:

    Args:
        qkv_bias (bool): Whether the q, k, v projections have a bias.
    """

    def __init__(self, dims: int, num_heads: int, *args, qkv_bias: bool,
                 **kwargs) -> None:
        super().__init__(dims, num_heads, *args, **kwargs)
        self.scale = (dims // num_heads)**-0.5
        self.q = nn.Linear(dims, dims, bias=qkv_bias)
        self.kv = nn.Linear(dims, dims * 2, bias=qkv_bias)

    def forward(self, x: Tensor, grid: Grid,
                scores: LayerScores) -> Tuple[Tensor, LayerScores]:
        """x (B, N, C); inherited ``scores``, if any, are added as a residual."""
        q = self.q(x)
        k, v = self.kv(self.reduce(x, grid)).chunk(2, dim=-1)
        # On k, which is short: the scores' scale must cross layers with them.
        own = FactoredScores(q, k * self.scale, self.num_heads)
        if self.score_path == 'materialised':
            own = MaterialisedScores(own.dense())
        scores = scores._replace(own=own)
        return self.aggregate(scores, v), scores


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


class LessAttention(Attention):
    """LA: the predecessor's scores, transformed; no Q and no K.

    Arguments as for `Attention`, and:

    Args:
        qkv_bias (bool): Whether the v projection has a bias.
        q_base_grid (tuple[int, int]): Base grid of Psi.
        k_base_grid (tuple[int, int]): Base grid of Theta.
        transform (str): 'token_mix': ``S_l = Psi(Theta(S_{l-1})^T)^T``, the
            method. For ablations: 'identity', the scores as they are, and
            're_attention', the same with the attention map passing through
            `ReAttention`. Defaults to 'token_mix'.
    """

    def __init__(self,
                 dims: int,
                 num_heads: int,
                 *args,
                 qkv_bias: bool,
                 q_base_grid: Grid,
                 k_base_grid: Grid,
                 transform: str = 'token_mix',
                 **kwargs) -> None:
        super().__init__(dims, num_heads, *args, **kwargs)
        self.transform = transform
        self.v = nn.Linear(dims, dims, bias=qkv_bias)
        if transform == 'token_mix':
            self.theta = TokenMix(k_base_grid)
            self.psi = TokenMix(q_base_grid)
        elif transform == 're_attention':
            self.re_attention = ReAttention(num_heads)

    def forward(self, x: Tensor, grid: Grid,
                scores: LayerScores) -> Tuple[Tensor, LayerScores]:
        """x (B, N, C); ``scores`` are those of the layer before."""
        if self.transform == 'token_mix':
            scores = scores.mix_tokens(self.theta, self.psi, grid,
                                       self.key_grid(grid))
        return self.aggregate(scores, self.v(self.reduce(x, grid))), scores

    def probabilities(self, scores: LayerScores) -> Tensor:
        """The attention map (B, heads, N, M)."""
        attn = super().probabilities(scores)
        if self.transform == 're_attention':
            return self.re_attention(attn)
        return attn

    def builds_map(self) -> bool:
        return self.transform == 're_attention' or super().builds_map()
