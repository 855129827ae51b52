"""Less attention in mmdet's Swin."""
from typing import Optional, Sequence

from mmdet.models.backbones.swin import SwinBlock, SwinTransformer, WindowMSA
from mmengine.registry import MODELS

from ...plugins.convert import convert
from ...plugins.swin import Swin, SwinMaps, WindowLayer
from ..layers.mixing import DEFAULT_RANK


class SwinLayer(WindowLayer, SwinBlock):
    """A layer that takes and gives scores."""


FAMILY = Swin(SwinLayer, SwinBlock, WindowMSA)


@MODELS.register_module()
class LessAttentionSwin(SwinMaps, SwinTransformer):
    """mmdet's Swin with less attention (our experiment).

    The paper says that less attention works with other attentions than its own, and
    gives no figures. Layers with less attention (LA) have no Q and no K: they take
    over the scores of the nearest earlier layer **of the same shift** in their stage,
    mixed within windows by Theta and Psi, for windows of shifted and unshifted layers
    do not align. Relative position bias and shift mask stay each layer's own. A window
    is the base grid, so any input size works. Without LA layers it is the stock class,
    bit for bit. Names of weights are the stock's; in LA layers ``w_msa.qkv`` is
    ``w_msa.qkv.v``, ``.theta`` and ``.psi``. Checkpoints of the stock class load: what
    LA layers lack is dropped, and the log says so.

    Args:
        la_layers (Sequence[int]): The layers with less attention, counted from 0
            through all stages; not the first two of a stage. Defaults to (): none.
        mixing (str): 'full' or 'low_rank'; see `LaViT`. Defaults to 'full'.
        mixing_rank (int): Rank of 'low_rank'. Defaults to 16.
        dp_loss (dict, optional): Arguments of the diagonality-preserving loss,
            ``dict()`` for its defaults; see `LaViT`. Defaults to None: off.
        kwargs: As for the stock class, ``with_cp`` and ``frozen_stages`` among them.

    Raises:
        TypeError, ValueError: For an argument that cannot work.

    Example:
        >>> from mmengine.registry import MODELS
        >>> import mmlavit.models.backbones.la_swin
        >>> model = MODELS.build(dict(
        ...     type='LessAttentionSwin', la_layers=(6, 7, 8, 9)))
    """

    def __init__(self,
                 *,
                 la_layers: Sequence[int] = (),
                 mixing: str = 'full',
                 mixing_rank: int = DEFAULT_RANK,
                 dp_loss: Optional[dict] = None,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        convert(self, FAMILY, la_layers, mixing=mixing, mixing_rank=mixing_rank,
                dp_loss=dp_loss, layers_name='la_layers')
