"""Less attention where Q, K and V are one projection, called ``qkv``.

An exact identity makes it a small part: with factored scores a layer with less
attention is ordinary attention over the inherited Q and K, mixed over tokens. So
its stock attention stays as it is, with relative positions, masks and dropout, and only
its projection is another.
"""
from typing import Dict, Optional

import torch
from torch import Tensor, nn

from ..models.layers.grid import Grid, Grids
from ..models.layers.mixing import build_mix
from ..models.layers.scores import FactoredScores, LayerScores
from .handover import Exchange


class KeepScores:
    """Forward hook of a projection ``qkv``: its Q and K are the layer's scores.

    Args:
        exchange (Exchange): Where they are kept.
        num_heads (int): Number of heads.
    """

    def __init__(self, exchange: Exchange, num_heads: int) -> None:
        self.exchange = exchange
        self.num_heads = num_heads

    def __call__(self, qkv: nn.Module, args: tuple, output: Tensor) -> None:
        q, k, _ = output.chunk(3, dim=-1)
        self.exchange.keep(None, LayerScores(FactoredScores(q, k, self.num_heads)))


class LessProjection(nn.Module):
    """What a layer with less attention has in place of its projection of Q, K and V.

    Args:
        weight (Tensor): The projection's, (3 C, C). V begins with its last third.
        bias (Tensor, optional): The projection's, (3 C, ).
        exchange (Exchange): From where scores come.
        q_base_grid (tuple[int, int]): Base grid of Psi.
        k_base_grid (tuple[int, int]): Base grid of Theta.
        mixing (str): 'full' or 'low_rank'.
        mixing_rank (int): Rank of 'low_rank'.
    """
    # The stock's weights of which the last third is V's, and what V's are called.
    stock_names: Dict[str, str]

    def __init__(self, weight: Tensor, bias: Optional[Tensor], *, exchange: Exchange,
                 q_base_grid: Grid, k_base_grid: Grid, mixing: str,
                 mixing_rank: int) -> None:
        super().__init__()
        self.exchange = exchange
        self.v = nn.Linear(weight.shape[1], len(weight) // 3, bias=bias is not None)
        self.theta = build_mix(mixing, k_base_grid, mixing_rank)
        self.psi = build_mix(mixing, q_base_grid, mixing_rank)
        self.to(weight).requires_grad_(weight.requires_grad)
        with torch.no_grad():
            self.v.weight.copy_(values_of(weight))
            if bias is not None:
                self.v.bias.copy_(values_of(bias))

    def transform_scores(self, scores: LayerScores, grids: Grids) -> LayerScores:
        """The scores of the layer before -> this layer's; linear."""
        return scores.mix_tokens(self.theta, self.psi, grids)

    def from_stock(self, weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """The stock's weights as this module's: V's third, Theta and Psi the identity.

        What has no place here is left out. ``weights`` are by the stock's names.
        """
        self.theta.reset_to_identity()
        self.psi.reset_to_identity()
        own = self.state_dict()
        mixing = {name: x for name, x in own.items()
                  if name.startswith(('theta.', 'psi.'))}
        kept = {name: x for name, x in weights.items() if name in own}
        values = {name: values_of(weights[theirs])
                  for theirs, name in self.stock_names.items() if theirs in weights}
        return {**mixing, **kept, **values}


def values_of(qkv: Tensor) -> Tensor:
    """V's part of a weight or bias of Q, K and V."""
    return qkv[len(qkv) // 3 * 2:]


class LessQKV(LessProjection):
    """In place of a projection ``qkv``: V alone; Q and K are inherited and mixed.

    ``S_l = Psi(Theta(S_{l-1})^T)^T = (Psi Q_{l-1}) (Theta K_{l-1})^T``.
    """
    stock_names = dict(weight='v.weight', bias='v.bias')

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> Q, K and V side by side, (B, N, 3 C)."""
        inherited = self.exchange.given.scores
        scores = self.transform_scores(inherited, self.exchange.grids)
        self.exchange.keep(inherited, scores)
        q, k, *_ = scores.own
        return torch.cat([q, k, self.v(x)], dim=-1)
