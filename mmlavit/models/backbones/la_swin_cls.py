"""Less attention in mmpretrain's Swin."""
from typing import Optional, Sequence

from mmengine.registry import MODELS
from mmpretrain.models.backbones.swin_transformer import (SwinBlock,
                                                          SwinTransformer)
from mmpretrain.models.utils.attention import WindowMSA

from ...plugins.convert import convert
from ...plugins.swin import Swin, SwinMaps, WindowLayer
from ..layers.mixing import DEFAULT_RANK


class SwinLayer(WindowLayer, SwinBlock):
    """A layer that takes and gives scores."""


FAMILY = Swin(SwinLayer, SwinBlock, WindowMSA)


@MODELS.register_module()
class LessAttentionSwinClassifier(SwinMaps, SwinTransformer):
    """mmpretrain's Swin with less attention, as `LessAttentionSwin` is mmdet's.

    As in the stock class, maps smaller than a window need ``pad_small_map=True``.

    Args:
        arch (str | dict): As for the stock class. Defaults to 'tiny'.
        la_layers, mixing, mixing_rank, dp_loss: As for `LessAttentionSwin`.
        kwargs: As for the stock class, ``with_cp`` and ``frozen_stages`` among them.

    Raises:
        TypeError, ValueError: For an argument that cannot work.
    """

    def __init__(self,
                 arch='tiny',
                 *,
                 la_layers: Sequence[int] = (),
                 mixing: str = 'full',
                 mixing_rank: int = DEFAULT_RANK,
                 dp_loss: Optional[dict] = None,
                 **kwargs) -> None:
        super().__init__(arch, **kwargs)
        convert(self, FAMILY, la_layers, mixing=mixing, mixing_rank=mixing_rank,
                dp_loss=dp_loss, layers_name='la_layers')

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args,
                              **kwargs) -> None:
        """Names of old checkpoints, which the stock class knows of itself alone."""
        for name in [n for n in state_dict if n.startswith(prefix)]:
            if name.startswith(f'{prefix}norm.'):
                last = f'{prefix}norm{len(self.stages) - 1}.'
                state_dict[name.replace(f'{prefix}norm.', last)] = state_dict.pop(name)
            elif name.endswith('attn_mask'):
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
