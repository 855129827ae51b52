"""Less attention in mmdet's PVT."""
import itertools
import math
import operator
from contextlib import ExitStack
from typing import Dict, Hashable, List, Optional, Sequence, Tuple

import torch.nn.functional as F
from mmdet.models.backbones.pvt import (AbsolutePositionEmbedding,
                                        PVTEncoderLayer,
                                        PyramidVisionTransformer,
                                        SpatialReductionAttention)
from mmengine.registry import MODELS
from torch import Tensor, nn

from ...plugins.convert import MAX_BASE_GRID, convert
from ...plugins.families import Family, Spot, require_stock
from ...plugins.handover import Exchange
from ...plugins.layer import ScoredLayer
from ...plugins.qkv import LessProjection
from ...utils.checks import require, require_bool, require_ints
from ..layers.grid import Grids, merge_heads, split_heads
from ..layers.mixing import DEFAULT_RANK
from ..layers.scores import AttentionDownsample, LayerScores, make_scores
from .maps import MapBackbone


class PVTLayer(ScoredLayer, PVTEncoderLayer):
    """A layer that takes and gives scores."""

    def grids_of(self, x: Tensor, hw_shape: Tuple[int, int]) -> Grids:
        ratio = self.attn.sr_ratio
        if self.has_whole_regions() or self.observers:
            require(
                not any(side % ratio for side in hw_shape), self.role.name, hw_shape,
                f'a grid of tokens whose sides are multiples of sr_ratio={ratio}, for '
                'PVT leaves out what is over and such tokens are no key\'s. Pad images '
                'by data_preprocessor.pad_size_divisor, with the default sr_ratios to '
                'a multiple of 32')
        return Grids(tuple(hw_shape), ratio)

    def has_whole_regions(self) -> bool:
        """Whether each token must be in the region of a key."""
        return self.role.kind == 'LA' or self.role.gives or self.role.dp_loss

    def transform(self) -> nn.Module:
        return self.attn.attn


class ScoreAttention:
    """What both kinds of attention share: the scores of the stage before, the output.

    PVT calls it as ``torch.nn.MultiheadAttention``: (N, B, C) in and out.
    """

    def inherit(self) -> LayerScores:
        """What is inherited, from the layer or the stage before."""
        given = self.exchange.given
        if given is None:
            return LayerScores()
        if self.downsample is None:
            return given.scores
        return LayerScores(inherited=self.downsample(
            given.scores.to_next_stage(), given.grids.queries))

    def output(self, inherited: LayerScores, scores: LayerScores,
               v: Tensor) -> Tuple[Tensor, None]:
        """softmax(S) V, projected; v (B, M, C) -> (N, B, C)."""
        self.exchange.keep(inherited, scores)
        z = scores.attend(split_heads(v, self.num_heads),
                          self.dropout if self.training else 0.)
        return self.out_proj(merge_heads(z)).transpose(0, 1), None


class VanillaAttention(ScoreAttention, nn.MultiheadAttention):
    """torch's attention; where its scores are wanted, it keeps Q and K."""
    def forward(self, query: Tensor, key: Tensor,
                value: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        if not (self.exchange.wanted or self.exchange.given is not None):
            return super().forward(query, key, value)
        biases = ([None] * 3 if self.in_proj_bias is None else
                  self.in_proj_bias.chunk(3))
        q, k, v = (
            F.linear(x.transpose(0, 1), weight, bias) for x, weight, bias in zip(
                (query, key, value), self.in_proj_weight.chunk(3), biases))
        inherited = self.inherit()
        own = make_scores(q, k * self.head_dim**-0.5, self.num_heads, 'auto')
        return self.output(inherited, inherited._replace(own=own), v)


class LessAttention(ScoreAttention, LessProjection):
    """Attention without Q and K, in the place of torch's.

    Args:
        stock (nn.MultiheadAttention): Whose place it takes; the projection of the
            output stays.
        downsample (AttentionDownsample, optional): Where scores come from the stage
            before.
        kwargs: As for `LessProjection`.
    """
    stock_names = dict(in_proj_weight='v.weight', in_proj_bias='v.bias')

    def __init__(self, stock: nn.MultiheadAttention,
                 downsample: Optional[AttentionDownsample], **kwargs) -> None:
        super().__init__(stock.in_proj_weight, stock.in_proj_bias, **kwargs)
        self.num_heads = stock.num_heads
        self.dropout = stock.dropout
        self.downsample = downsample
        self.out_proj = stock.out_proj

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tuple[Tensor, None]:
        inherited = self.inherit()
        scores = self.transform_scores(inherited, self.exchange.grids)
        return self.output(inherited, scores, self.v(value.transpose(0, 1)))

    def from_stock(self, weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """As `LessProjection`; what the stock class lacks begins as it was built."""
        weights = super().from_stock(weights)
        if self.downsample is not None:
            self.downsample.reset_parameters()
            weights.update({f'downsample.{name}': x
                            for name, x in self.downsample.state_dict().items()})
        return weights


class PVT(Family):
    """Spatially reduced keys; a stage may inherit from the one before."""
    layer_class = PVTLayer
    projection_class = nn.MultiheadAttention

    def spots(self, model: PyramidVisionTransformer) -> List[Spot]:
        spots = []
        for i, (_, layers, _) in enumerate(model.layers):
            grid = base_grid(layers, math.prod(model.strides[:i + 1]))
            for j, layer in enumerate(layers):
                if isinstance(layer, AbsolutePositionEmbedding):
                    continue
                name = f'layers.{i}.1.{j}'
                require_stock(layer, PVTEncoderLayer, name)
                require_stock(layer.attn, SpatialReductionAttention, f'{name}.attn')
                spots.append(Spot(
                    layer=layer, stage=i, lane=i, holder=layer.attn, projection='attn',
                    num_heads=layer.attn.num_heads, scale=1., q_grid=grid,
                    k_grid=tuple(max(side // layer.attn.sr_ratio, 1) for side in grid),
                    stride=model.strides[i]))
        return spots

    def source_across(self, spots: Sequence[Spot], index: int) -> Optional[Hashable]:
        """The stage before, if its keys lie on the same grid."""
        if index == 0:
            return None
        spot, before = spots[index], spots[index - 1]
        ratio, other = (x.layer.attn.sr_ratio for x in (spot, before))
        return before.lane if other == spot.stride * ratio else None

    def why_none(self, spots: Sequence[Spot], index: int) -> str:
        if index == 0:
            return 'the first of the model'
        return ('the first of its stage, and the keys of the stage before lie on another '
                'grid: its sr_ratio is not that of this stage times the stride between')

    def less_attention(self, spot: Spot, exchange: Exchange, before: Optional[Spot],
                       **mixing) -> nn.Module:
        return LessAttention(spot.holder.attn, downsample_between(before, spot),
                             exchange=exchange, **mixing)

    def keep_scores(self, undo: ExitStack, spot: Spot, exchange: Exchange,
                    before: Optional[Spot]) -> None:
        attn = spot.holder.attn
        attn.__class__, attn.exchange = VanillaAttention, exchange
        attn.downsample = downsample_between(before, spot)
        undo.callback(setattr, attn, '__class__', nn.MultiheadAttention)
        undo.callback(delattr, attn, 'exchange')
        undo.callback(delattr, attn, 'downsample')


def base_grid(layers: nn.ModuleList, stride: int) -> Tuple[int, int]:
    """Of the pre-training size; 224 where positions do not tell (PVTv2)."""
    for layer in layers:
        if isinstance(layer, AbsolutePositionEmbedding):
            return tuple(int(side) for side in layer.pos_shape)
    return (max(224 // stride, 1), ) * 2


def downsample_between(before: Optional[Spot],
                       spot: Spot) -> Optional[AttentionDownsample]:
    """Of the scores of the stage before, if they come from there."""
    if before is None:
        return None
    weight = spot.holder.attn.out_proj.weight
    return AttentionDownsample(before.num_heads, spot.num_heads,
                               spot.stride).to(weight)


FAMILY = PVT()


def firsts(depths: Sequence[int]) -> List[int]:
    """The first layer of each stage."""
    return [sum(depths[:i]) for i in range(len(depths))]


def layers_after(num_va_layers: Optional[Sequence[int]],
                 depths: Sequence[int]) -> List[int]:
    """The layers behind those with vanilla attention, of None: no layer.

    Raises:
        TypeError, ValueError: If it is no possible number for each stage.
    """
    if num_va_layers is None:
        return []
    num_va_layers = require_ints('num_va_layers', num_va_layers, 0)
    require(
        len(num_va_layers) == len(depths)
        and num_va_layers[0] > 0
        and all(va <= depth for va, depth in zip(num_va_layers, depths)),
        'num_va_layers', num_va_layers,
        f'a number for each stage, at most num_layers={depths}, and at least 1 in the '
        'first, which has no scores to inherit')
    return [first + j for first, va, depth in zip(firsts(depths), num_va_layers, depths)
            for j in range(va, depth)]


@MODELS.register_module()
class LessAttentionPVT(MapBackbone, PyramidVisionTransformer):
    """mmdet's PVT (v1) with less attention (our experiment).

    The paper says that less attention works with other attentions than its own, and
    gives no figures. As in `LaViT`, layers of vanilla attention (VA) come first in a
    stage; the layers after have no Q and no K and take over the scores of the layer
    before, mixed by Theta and Psi (LA). A stage can have LA layers alone, and then
    inherits the scores of the stage before, downsampled. Without LA layers it is the
    stock class, bit for bit. Names of weights are the stock's; in LA layers
    ``attn.attn.in_proj_*`` is ``attn.attn.v.*``, and ``attn.attn.theta``, ``.psi`` and
    ``.downsample`` are new. Checkpoints of the stock class load: what LA layers lack is
    dropped, and the log says so. With ``attn_residual`` that takes ``strict=False``, for
    they lack the downsampling of its VA layers. PVTv2 is served by `LaViT`'s presets
    ``pvtv2_b0`` to ``pvtv2_b5``.

    Grids of tokens must be multiples of the spatial reduction, as with images padded to
    a multiple of 32 pixels.

    Args:
        num_va_layers (Sequence[int], optional): Of each stage the number of VA layers,
            with which it begins; 0 is for stages from the second on. Defaults to None:
            all of ``num_layers``.
        la_layers (Sequence[int], optional): The LA layers themselves instead, counted
            from 0 through all stages. Defaults to None.
        attn_residual (bool): Whether a stage that begins with VA adds the scores of the
            stage before, downsampled, to those of its first layer. Defaults to False, for
            weights of the stock class were trained without.
        mixing (str): 'full' or 'low_rank'; see `LaViT`. Defaults to 'full'.
        mixing_rank (int): Rank of 'low_rank'. Defaults to 16.
        max_base_grid (int): Longest side of the grids on which Theta and Psi are
            learned, in tokens. Defaults to 14.
        dp_loss (dict, optional): Arguments of the diagonality-preserving loss,
            ``dict()`` for its defaults; see `LaViT`. Defaults to None: off.
        with_cp (bool): Whether to compute each layer again in the backward pass: less
            memory, more time. Defaults to False.
        kwargs: As for the stock class.

    Raises:
        TypeError, ValueError: For an argument that cannot work.

    Example:
        >>> from mmengine.registry import MODELS
        >>> import mmlavit.models.backbones.la_pvt
        >>> model = MODELS.build(dict(
        ...     type='LessAttentionPVT', num_va_layers=(3, 4, 2, 0)))
    """

    def __init__(self,
                 *,
                 num_va_layers: Optional[Sequence[int]] = None,
                 la_layers: Optional[Sequence[int]] = None,
                 attn_residual: bool = False,
                 mixing: str = 'full',
                 mixing_rank: int = DEFAULT_RANK,
                 max_base_grid: int = MAX_BASE_GRID,
                 dp_loss: Optional[dict] = None,
                 with_cp: bool = False,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        if la_layers is None:
            la_layers = layers_after(num_va_layers, self.num_layers)
        else:
            require(num_va_layers is None, 'num_va_layers', num_va_layers,
                    f'None beside la_layers={la_layers}')
        residual = require_bool('attn_residual', attn_residual)
        convert(self, FAMILY, la_layers,
                residual_layers=firsts(self.num_layers)[1:] if residual else (),
                mixing=mixing, mixing_rank=mixing_rank, max_base_grid=max_base_grid,
                dp_loss=dp_loss, with_cp=with_cp, layers_name='la_layers')

    def stage_channels(self) -> Sequence[int]:
        """As `MapBackbone`."""
        return [self.embed_dims * heads for heads in self.num_heads]

    def maps_have_norms(self) -> bool:
        """As `MapBackbone`."""
        return False

    @property
    def size_divisor(self) -> int:
        """What the sides of images must be multiples of; 1 without LA layers."""
        strides = itertools.accumulate(self.strides, operator.mul)
        return math.lcm(*(
            stride * layer.attn.sr_ratio
            for stride, (_, layers, _) in zip(strides, self.layers) for layer in layers
            if isinstance(layer, PVTLayer) and layer.has_whole_regions()))

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """The stock's maps, as the tuple that mmpretrain's necks and heads ask for."""
        return tuple(super().forward(x))
