"""Less attention in mmpretrain's ViT and DeiT."""
from typing import List, Optional, Sequence

from mmengine.registry import MODELS
from mmpretrain.models.backbones.vision_transformer import (
    TransformerEncoderLayer, VisionTransformer)
from mmpretrain.models.utils import MultiheadAttention
from torch import nn

from ...plugins.convert import MAX_BASE_GRID, convert
from ...plugins.families import Family, Spot, require_stock
from ...plugins.layer import ImageGridLayer
from ...utils.checks import require, require_int
from ..layers.grid import Grid
from ..layers.mixing import DEFAULT_RANK


class ViTLayer(ImageGridLayer, TransformerEncoderLayer):
    """A layer that takes and gives scores."""


def grid_beside_tokens(patch_embed: nn.Module, output: tuple) -> Grid:
    return output[1]


class ViT(Family):
    """mmpretrain's `VisionTransformer`, with any number of extra tokens."""
    layer_class = ViTLayer
    find_grid = grid_beside_tokens

    def spots(self, model: VisionTransformer) -> List[Spot]:
        spots = []
        for i, layer in enumerate(model.layers):
            require_stock(layer, TransformerEncoderLayer, f'layers.{i}')
            require_stock(layer.attn, MultiheadAttention, f'layers.{i}.attn')
            grid = tuple(model.patch_resolution)
            spots.append(Spot(
                layer=layer, stage=0, lane=0, holder=layer.attn, projection='qkv',
                num_heads=layer.attn.num_heads, scale=layer.attn.head_dims**-0.5,
                q_grid=grid, k_grid=grid, extra=model.num_extra_tokens))
        return spots


FAMILY = ViT()


@MODELS.register_module()
class LessAttentionViT(VisionTransformer):
    """mmpretrain's ViT and DeiT with less attention (our experiment).

    The paper says that less attention works with other attentions than its own, and
    gives no figures. Layers with less attention (LA) have no Q and no K: they take over
    the scores of the layer before, mixed by Theta and Psi. Without any it is the stock
    class, bit for bit. Names of weights are the stock's; in LA layers ``attn.qkv`` is
    ``attn.qkv.v``, ``.theta`` and ``.psi``. Checkpoints of the stock class load: what LA
    layers lack is dropped, and the log says so.

    The class token lies outside of the grid: the mixing leaves it its own row and
    column. For DeiT with a distillation token there is `add_less_attention`.

    Args:
        arch (str | dict): As for the stock class. Defaults to 'deit-small'.
        first_la_layer (int, optional): From this layer on, counted from 0, all have
            less attention. Defaults to None: those of ``la_layers``.
        la_layers (Sequence[int]): The layers with less attention, from 1 on. Defaults
            to (): none.
        mixing (str): 'full' or 'low_rank'; see `LaViT`. Defaults to 'full'.
        mixing_rank (int): Rank of 'low_rank'. Defaults to 16.
        max_base_grid (int): Longest side of the grid on which Theta and Psi are
            learned, in patches. Defaults to 14.
        dp_loss (dict, optional): Arguments of the diagonality-preserving loss,
            ``dict()`` for its defaults; see `LaViT`. Defaults to None: off.
        with_cp (bool): Whether to compute each layer again in the backward pass: less
            memory, more time. Defaults to False.
        kwargs: As for the stock class.

    Raises:
        TypeError, ValueError: For an argument that cannot work.

    Example:
        >>> from mmengine.registry import MODELS
        >>> import mmlavit.models.backbones.la_vit
        >>> model = MODELS.build(dict(
        ...     type='LessAttentionViT', arch='deit-small', first_la_layer=4))
    """

    def __init__(self,
                 arch='deit-small',
                 *,
                 first_la_layer: Optional[int] = None,
                 la_layers: Sequence[int] = (),
                 mixing: str = 'full',
                 mixing_rank: int = DEFAULT_RANK,
                 max_base_grid: int = MAX_BASE_GRID,
                 dp_loss: Optional[dict] = None,
                 with_cp: bool = False,
                 **kwargs) -> None:
        super().__init__(arch, **kwargs)
        if first_la_layer is not None:
            require(not la_layers, 'la_layers', la_layers,
                    f'() beside first_la_layer={first_la_layer}')
            first = require_int('first_la_layer', first_la_layer, 1,
                                self.num_layers - 1)
            la_layers = range(first, self.num_layers)
        convert(self, FAMILY, la_layers, mixing=mixing, mixing_rank=mixing_rank,
                max_base_grid=max_base_grid, dp_loss=dp_loss, with_cp=with_cp,
                layers_name='la_layers')
