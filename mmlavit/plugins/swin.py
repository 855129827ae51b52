"""What mmdet's and mmpretrain's Swin have in common."""
from contextlib import ExitStack
from typing import List, Sequence

from torch import Tensor, nn

from ..models.backbones.maps import MapBackbone
from ..models.layers.grid import Grid, Grids
from ..utils.checks import require
from .families import Family, Spot, require_stock
from .handover import Exchange
from .layer import ScoredLayer


class WindowLayer(ScoredLayer):
    """A layer of Swin: each window is a grid."""

    def grids_of(self, x: Tensor, hw_shape: Grid) -> Grids:
        window = tuple(self.attn.w_msa.window_size)
        # mmdet's Swin pads every map to whole windows; mmpretrain's has a switch.
        require(
            getattr(self.attn, 'pad_small_map', True) or min(hw_shape) >= min(window),
            self.role.name, tuple(hw_shape),
            f'a map of at least a window, {window}: take larger images, or a model with '
            'pad_small_map=True')
        return Grids(window, 1)

    def token_grid(self, hw_shape: Grid) -> Grid:
        return tuple(hw_shape)

    def transform(self) -> nn.Module:
        return self.attn.w_msa.qkv


class SwinMaps(MapBackbone):
    """The maps of both toolboxes' Swin."""

    def stage_channels(self) -> Sequence[int]:
        """As `MapBackbone`."""
        return self.num_features

    def maps_have_norms(self) -> bool:
        """As `MapBackbone`; mmpretrain's has none with ``norm_cfg=None``."""
        return any(list(getattr(self, f'norm{i}').parameters())
                   for i in self.out_indices)


class Swin(Family):
    """Windows, shifted in every second layer.

    Args:
        layer_class (type): A `WindowLayer` and the stock's block.
        block (type): The stock's block.
        attention (type): The stock's attention within windows.
    """

    def __init__(self, layer_class: type, block: type, attention: type) -> None:
        self.layer_class = layer_class
        self.block = block
        self.attention = attention

    def spots(self, model: nn.Module) -> List[Spot]:
        spots = []
        for i, stage in enumerate(model.stages):
            for j, block in enumerate(stage.blocks):
                name = f'stages.{i}.blocks.{j}'
                require_stock(block, self.block, name)
                msa = block.attn.w_msa
                require_stock(msa, self.attention, f'{name}.attn.w_msa')
                window = tuple(msa.window_size)
                # Windows of shifted and unshifted layers do not align.
                lane = i, 'shifted' if block.attn.shift_size else 'unshifted'
                spots.append(Spot(
                    layer=block, stage=i, lane=lane, holder=msa, projection='qkv',
                    num_heads=msa.num_heads, scale=msa.scale, q_grid=window,
                    k_grid=window))
        return spots

    def base_grid(self, grid: Grid, most: int) -> Grid:
        """A window is the base grid, whatever its size."""
        return grid

    def why_none(self, spots: Sequence[Spot], index: int) -> str:
        return f'the first {spots[index].lane[1]} one of its stage'

    def keep_maps(self, undo: ExitStack, spot: Spot, exchange: Exchange) -> None:
        """They have the position bias and the mask, which scores have not."""
        undo.callback(
            spot.holder.softmax.register_forward_hook(exchange.keep_map).remove)
