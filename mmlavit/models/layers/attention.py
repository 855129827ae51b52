"""Vanilla attention (VA) and less attention (LA) over spatially reduced keys."""
from typing import Optional, Tuple

import torch.nn.functional as F
from torch import Tensor, nn

from .grid import (Grid, Grids, merge_heads, pool_tokens, pooled_grid,
                   split_heads, to_map, to_tokens)
from .mixing import ReAttention, TokenMix, build_mix
from .norms import build_norm, normalise
from .scores import LayerScores, make_scores
from .tracing import is_exporting

VALUE_REDUCTIONS = ('conv', 'pool')
TRANSFORMS = ('token_mix', 'identity', 're_attention')


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
        self.norm = build_norm(norm_cfg, dims)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, M, C)."""
        x = to_map(x, grid)
        if is_exporting():  # the most for any grid: the convolution ignores the rest
            bottom = right = self.ratio - 1
        else:
            bottom, right = (-size % self.ratio for size in grid)
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        x = self.conv(x)
        return normalise(self.norm, to_tokens(x), x.shape[2:])


class Attention(nn.Module):
    """What both kinds of layer share: reduced tokens, aggregation, projection.

    Args:
        dims (int): Number of channels.
        num_heads (int): Number of heads.
        sr_ratio (int): Spatial reduction of keys and values; 1 for none.
        attn_drop_rate (float): Dropout rate of the attention probabilities.
        drop_rate (float): Dropout rate of the output.
        norm_cfg (dict): Config of the norm behind the spatial reduction.
        reduction (str): 'conv', a strided convolution and a norm, or 'pool',
            means over the same windows.
    """

    def __init__(self, *, dims: int, num_heads: int, sr_ratio: int,
                 attn_drop_rate: float, drop_rate: float, norm_cfg: dict,
                 reduction: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.attn_drop_rate = attn_drop_rate
        self.reduction = (
            SpatialReduction(dims, sr_ratio, norm_cfg)
            if sr_ratio > 1 and reduction == 'conv' else None)
        self.proj = nn.Linear(dims, dims)
        self.proj_drop = nn.Dropout(drop_rate)

    @property
    def dropout(self) -> float:
        """Dropout rate of the attention probabilities in the present mode."""
        return self.attn_drop_rate if self.training else 0.

    def reduce(self, x: Tensor, grids: Grids) -> Tensor:
        """(B, N, C) -> (B, M, C), what keys and values are projected from."""
        if self.reduction is None:
            return grids.pool(x)
        # max_key_grid is kept by a mean before the convolution.
        factor = grids.ratio // self.sr_ratio
        return self.reduction(
            pool_tokens(x, grids.queries, factor),
            pooled_grid(grids.queries, factor))

    def attend(self, scores: LayerScores, v: Tensor) -> Tensor:
        """softmax(S) V; v (B, heads, M, d) -> (B, heads, N, d)."""
        return scores.attend(v, self.dropout)

    def aggregate(self, scores: LayerScores, v: Tensor) -> Tensor:
        """Z = softmax(S) V and its projection; v (B, M, C) -> (B, N, C)."""
        z = self.attend(scores, split_heads(v, self.num_heads))
        return self.proj_drop(self.proj(merge_heads(z)))

    def probabilities(self, scores: LayerScores) -> Tensor:
        """The attention map (B, heads, N, M)."""
        return scores.dense().softmax(dim=-1)


class VanillaAttention(Attention):
    """VA: scores from this layer's own Q and K, ``S = Q K^T / sqrt(d)``.

    Args:
        dims, num_heads, sr_ratio, attn_drop_rate, drop_rate, norm_cfg: As for
            `Attention`.
        qkv_bias (bool): Whether the q, k, v projections have a bias.
        score_path (str): 'auto', 'factored' or 'materialised'; see `LaViT`.
    """
    kind = 'VA'

    def __init__(self, *, dims: int, num_heads: int, sr_ratio: int,
                 attn_drop_rate: float, drop_rate: float, norm_cfg: dict,
                 qkv_bias: bool, score_path: str) -> None:
        super().__init__(
            dims=dims,
            num_heads=num_heads,
            sr_ratio=sr_ratio,
            attn_drop_rate=attn_drop_rate,
            drop_rate=drop_rate,
            norm_cfg=norm_cfg,
            reduction='conv')
        self.score_path = score_path
        self.scale = (dims // num_heads)**-0.5
        self.q = nn.Linear(dims, dims, bias=qkv_bias)
        self.kv = nn.Linear(dims, dims * 2, bias=qkv_bias)

    def forward(self, x: Tensor, grids: Grids,
                scores: LayerScores) -> Tuple[Tensor, LayerScores]:
        """x (B, N, C); inherited ``scores``, if any, are added as a residual."""
        q = self.q(x)
        k, v = self.kv(self.reduce(x, grids)).chunk(2, dim=-1)
        # On k, which is short: the scores' scale must cross layers with them.
        own = make_scores(q, k * self.scale, self.num_heads, self.score_path)
        scores = scores._replace(own=own)
        return self.aggregate(scores, v), scores


class LessAttention(Attention):
    """LA: the predecessor's scores, transformed; no Q and no K.

    Args:
        dims, num_heads, sr_ratio, attn_drop_rate, drop_rate, norm_cfg: As for
            `Attention`.
        qkv_bias (bool): Whether the v projection has a bias.
        value_reduction (str): 'conv' or 'pool'; see `LaViT`.
        q_base_grid (tuple[int, int]): Base grid of Psi.
        k_base_grid (tuple[int, int]): Base grid of Theta.
        transform (str): 'token_mix': ``S_l = Psi(Theta(S_{l-1})^T)^T``, the
            method. For ablations: 'identity', the scores as they are, and
            're_attention', the same with the attention map passing through
            `ReAttention`.
        mixing (str): Theta and Psi of 'token_mix': 'full', `TokenMix`, or
            'low_rank', `LowRankMix`.
        mixing_rank (int): Rank of 'low_rank'.
    """
    kind = 'LA'

    def __init__(self, *, dims: int, num_heads: int, sr_ratio: int,
                 attn_drop_rate: float, drop_rate: float, norm_cfg: dict,
                 qkv_bias: bool, value_reduction: str, q_base_grid: Grid,
                 k_base_grid: Grid, transform: str, mixing: str,
                 mixing_rank: int) -> None:
        super().__init__(
            dims=dims,
            num_heads=num_heads,
            sr_ratio=sr_ratio,
            attn_drop_rate=attn_drop_rate,
            drop_rate=drop_rate,
            norm_cfg=norm_cfg,
            reduction=value_reduction)
        self.v = nn.Linear(dims, dims, bias=qkv_bias)
        self.theta: Optional[TokenMix] = None
        self.psi: Optional[TokenMix] = None
        self.re_attention: Optional[ReAttention] = None
        if transform == 'token_mix':
            self.theta = build_mix(mixing, k_base_grid, mixing_rank)
            self.psi = build_mix(mixing, q_base_grid, mixing_rank)
        elif transform == 're_attention':
            self.re_attention = ReAttention(num_heads)

    def transform_scores(self, scores: LayerScores,
                         grids: Grids) -> LayerScores:
        """The scores of the layer before -> this layer's; linear."""
        if self.theta is None:
            return scores
        return scores.mix_tokens(self.theta, self.psi, grids)

    def forward(self, x: Tensor, grids: Grids,
                scores: LayerScores) -> Tuple[Tensor, LayerScores]:
        """x (B, N, C); ``scores`` are those of the layer before."""
        scores = self.transform_scores(scores, grids)
        return self.aggregate(scores, self.v(self.reduce(x, grids))), scores

    def attend(self, scores: LayerScores, v: Tensor) -> Tensor:
        """softmax(S) V; v (B, heads, M, d) -> (B, heads, N, d)."""
        if self.re_attention is None:
            return super().attend(scores, v)
        attn = F.dropout(self.probabilities(scores), self.dropout)
        return attn.to(v.dtype) @ v

    def probabilities(self, scores: LayerScores) -> Tensor:
        """The attention map (B, heads, N, M)."""
        attn = super().probabilities(scores)
        return attn if self.re_attention is None else self.re_attention(attn)
