"""A layer of a stock class that takes and gives attention scores."""
from dataclasses import dataclass
from functools import partial
from typing import Hashable, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.layers.grid import Grid, Grids
from ..models.layers.scores import LayerScores
from ..models.layers.step import Layer, Observable
from .handover import Done, Exchange, Handed, Handover


@dataclass
class Role:
    """What a layer is in its model.

    Args:
        name (str): Its module's in the model.
        stage (int): Its stage.
        lane (Hashable): Under what it hands on its scores. Layers that may inherit
            from each other have the same.
        kind (str): 'VA' or 'LA'.
        source (Hashable, optional): The lane whose scores it takes.
        gives (bool): Whether another layer takes its scores.
        index (int): Its place in the model, from 0.
        last (bool): Whether it is the model's last layer.
        recomputes (bool): Whether its activations are computed again in the backward
            pass, as ``with_cp`` says.
        dp_loss (bool): Whether the DP loss is on it.
        scale (float): The softmax scale that its Q and K lack.
        extra (int): Tokens before those of the grid.
        handover (Handover): Shared by all layers.
        exchange (Exchange): Shared by the layer and its attention.
    """
    name: str
    stage: int
    lane: Hashable
    kind: str
    source: Optional[Hashable]
    gives: bool
    index: int
    last: bool
    recomputes: bool
    dp_loss: bool
    scale: float
    extra: int
    handover: Handover
    exchange: Exchange


def scaled(scores: LayerScores, scale: float) -> LayerScores:
    """With the softmax scale in K, as scores have it everywhere else."""
    if scale == 1 or scores is None:
        return scores
    return LayerScores(scores.own._replace(k=scores.own.k * scale))


def map_rows(scores: LayerScores, extra: int, start: int, stop: int) -> Tensor:
    """The map (B, heads, stop - start, M) of some queries of the grid."""
    rows = scores.rows(extra + start, extra + stop).dense()
    return rows.softmax(-1)[..., extra:]


def built_rows(attention: Tensor, start: int, stop: int) -> Tensor:
    """The same of a map (B, heads, N, M) that is there."""
    return attention[:, :, start:stop]


class ScoredLayer(Observable):
    """Stands before the stock layer's class among the bases of a layer.

    Its forward is the stock's; scores pass beside it. With a `Role` and the
    attention's part (`LessQKV` or another) a stock layer becomes one when its class is
    set to this one's.
    """
    role: Role

    def grids_of(self, x: Tensor, *args) -> Grids:
        """Where the tokens lie that the layer is given, with its other arguments."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(B, N, C) -> (B, N, C), as the stock layer."""
        role, handover = self.role, self.role.handover
        handover.begin(role.index)
        given = None
        if role.source is not None:
            given = handover.read(role.source, role.name)
        grids = self.grids_of(x, *args)
        wanted = role.gives or role.dp_loss or bool(self.observers)
        inputs = given, grids, wanted, x, *args
        if role.recomputes and x.requires_grad:
            x, done = checkpoint(self._run, *inputs, use_reentrant=False, **kwargs)
        else:
            x, done = self._run(*inputs, **kwargs)
        if role.gives:
            handover.write(role.lane, done.scores, grids)
        if role.dp_loss and self.training and torch.is_grad_enabled():
            self._add_dp_loss(done, grids)
        if self.observers:
            self.hand_out(self._state(x, done, grids, self.token_grid(*args)))
        if role.last:
            handover.hold_dp_losses()
            handover.clear()
        return x

    def _run(self, given: Optional[Handed], grids: Grids, wanted: bool, x: Tensor,
             *args, **kwargs) -> Tuple[Tensor, Done]:
        """The stock's forward; what goes in and out beside it are arguments."""
        exchange = self.role.exchange
        exchange.begin(given, grids, wanted)
        try:
            x = super().forward(x, *args, **kwargs)
            return x, exchange.take()
        finally:
            # A recomputation ends within the forward, by an exception.
            exchange.end()

    def _add_dp_loss(self, done: Done, grids: Grids) -> None:
        """The DP loss of this layer, recomputed where the layer is."""
        role, dp_loss = self.role, self.role.handover.dp_loss
        args = (scaled(done.scores, role.scale), grids,
                scaled(done.inherited, role.scale), self.transform())
        value = (checkpoint(dp_loss, *args, use_reentrant=False)
                 if role.recomputes else dp_loss(*args))
        role.handover.dp_losses.setdefault(role.stage, []).append(value)

    def transform(self) -> nn.Module:
        """What has ``transform_scores``, in layers with less attention."""
        raise NotImplementedError

    def token_grid(self, *args) -> Optional[Grid]:
        """Where the tokens lie, if not on the grid of the queries."""
        return None

    def _state(self, x: Tensor, done: Done, grids: Grids,
               token_grid: Optional[Grid]) -> Layer:
        role, scores = self.role, scaled(done.scores, self.role.scale)
        rows = (partial(map_rows, scores, grids.extra) if done.attention is None else
                partial(built_rows, done.attention))
        return Layer(role.kind, role.stage, role.lane, grids, x[:, grids.extra:],
                     scores, rows, token_grid, role.name)


class ImageGridLayer(ScoredLayer):
    """Of a model whose tokens lie on one grid, which its patch embedding knows."""

    def grids_of(self, x: Tensor, *args) -> Grids:
        role, grid = self.role, self.role.handover.grid
        if grid is None or grid[0] * grid[1] + role.extra != x.shape[1]:
            raise ValueError(
                f'LaViT: {role.name} is given {x.shape[1]} tokens: expected {role.extra} '
                f'and those of the grid {grid} that the patch embedding made last')
        return Grids(grid, 1, role.extra)

    def transform(self) -> nn.Module:
        return self.attn.qkv
