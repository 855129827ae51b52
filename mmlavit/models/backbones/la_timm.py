"""Less attention in timm's ViT: for `mmlavit.add_less_attention`."""
from typing import List

from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from ...plugins.families import Family, Spot, require_stock
from ...plugins.layer import ImageGridLayer
from ...utils.checks import require
from ..layers.grid import Grid


class TimmLayer(ImageGridLayer, Block):
    """A layer that takes and gives scores."""


def grid_of_patches(patch_embed: nn.Module, output: Tensor) -> Grid:
    """Of a map (B, h, w, C) where sizes are dynamic, else that which it is built for."""
    return output.shape[1:3] if output.dim() == 4 else patch_embed.grid_size


class TimmViT(Family):
    """timm's `VisionTransformer`, with class and register tokens."""
    layer_class = TimmLayer
    find_grid = grid_of_patches

    def spots(self, model: VisionTransformer) -> List[Spot]:
        require(isinstance(model.patch_drop, nn.Identity), 'patch_drop',
                type(model.patch_drop).__name__,
                'patch_drop_rate=0: Theta and Psi need all tokens of the grid')
        spots = []
        for i, layer in enumerate(model.blocks):
            require_stock(layer, Block, f'blocks.{i}')
            attn, grid = layer.attn, tuple(model.patch_embed.grid_size)
            require_stock(attn, Attention, f'blocks.{i}.attn')
            require(
                isinstance(attn.q_norm, nn.Identity), f'blocks.{i}.attn.q_norm',
                type(attn.q_norm).__name__,
                'qk_norm=False: Q and K that are normed after they are mixed are '
                'not the scores of the layer before')
            spots.append(Spot(
                layer=layer, stage=0, lane=0, holder=attn, projection='qkv',
                num_heads=attn.num_heads, scale=attn.scale, q_grid=grid,
                k_grid=grid, extra=model.num_prefix_tokens))
        return spots


FAMILY = TimmViT()
