"""What mmlavit must know of a stock class to give it less attention."""
from contextlib import ExitStack
from typing import Callable, Hashable, List, NamedTuple, Optional, Sequence

from torch import nn

from ..models.layers.grid import Grid
from ..utils.checks import require
from .handover import Exchange
from .qkv import KeepScores, LessQKV


class Spot(NamedTuple):
    """A layer of a model, and its attention's projection of Q, K and V."""
    layer: nn.Module
    stage: int
    lane: Hashable  # layers of a stage that may inherit from each other have the same
    holder: nn.Module  # has the projection
    projection: str  # as the holder calls it
    num_heads: int
    scale: float  # the softmax scale that its Q and K lack
    q_grid: Grid  # of the pre-training size
    k_grid: Grid
    extra: int = 0  # tokens before those of the grid
    stride: int = 1  # between the stage before and this one


class Family:
    """A stock class whose attention has one projection ``qkv``.

    Others override what differs.
    """
    layer_class: type  # of its layers, a `ScoredLayer` and the stock's class
    projection_class: type = nn.Linear  # the stock's
    # From the patch embedding and its output to the grid of tokens, where layers are
    # not told it.
    find_grid: Optional[Callable] = None

    def spots(self, model: nn.Module) -> List[Spot]:
        """The layers, in order.

        Raises:
            ValueError: If one is not of the stock's own classes.
        """
        raise NotImplementedError

    def source_across(self, spots: Sequence[Spot], index: int) -> Optional[Hashable]:
        """The lane of the stage before, where a stage may begin with its scores."""
        return None

    def why_none(self, spots: Sequence[Spot], index: int) -> str:
        """What the layer is that has no source."""
        return 'the first of its stage'

    def less_attention(self, spot: Spot, exchange: Exchange, before: Optional[Spot],
                       **mixing) -> nn.Module:
        """What takes the projection's place in a layer with less attention.

        Args:
            spot (Spot): The layer.
            exchange (Exchange): The layer's.
            before (Spot, optional): The last layer of the stage before, if scores
                come from there.
            mixing: As for `LessProjection`.
        """
        qkv = getattr(spot.holder, spot.projection)
        return LessQKV(qkv.weight, qkv.bias, exchange=exchange, **mixing)

    def keep_scores(self, undo: ExitStack, spot: Spot, exchange: Exchange,
                    before: Optional[Spot]) -> None:
        """Makes a layer with vanilla attention give its scores."""
        qkv = getattr(spot.holder, spot.projection)
        hook = KeepScores(exchange, spot.num_heads)
        undo.callback(qkv.register_forward_hook(hook).remove)

    def keep_maps(self, undo: ExitStack, spot: Spot, exchange: Exchange) -> None:
        """Keeps the maps of an attention that builds them anyway."""

    def base_grid(self, grid: Grid, most: int) -> Grid:
        """Where Theta or Psi is learned: neither side longer than ``most``.

        Args:
            grid (tuple[int, int]): That of the pre-training size.
            most (int): ``max_base_grid``.
        """
        return tuple(min(side, most) for side in grid)


def require_stock(part: nn.Module, stock: type, name: str) -> None:
    """Raises ValueError unless a part of a model is of the stock's own class."""
    require(
        type(part) is stock, name, type(part).__name__,
        f'{stock.__module__}.{stock.__name__} itself, for what another attention '
        'does with Q and K is not known here')
