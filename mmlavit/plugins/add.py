"""`add_less_attention`: for a model that one already has."""
import importlib
from typing import List, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

from ..models.layers.mixing import DEFAULT_RANK
from ..models.layers.step import Observable
from ..utils.checks import require, require_choice, require_type
from .convert import MAX_BASE_GRID, LessAttentionPlan, convert
from .families import Family

# Stock classes, and the modules that know them. Only those of the model are imported.
FAMILIES = {
    'mmpretrain.models.backbones.vision_transformer.VisionTransformer': 'la_vit',
    'timm.models.vision_transformer.VisionTransformer': 'la_timm',
    'mmdet.models.backbones.pvt.PyramidVisionTransformer': 'la_pvt',
    'mmdet.models.backbones.swin.SwinTransformer': 'la_swin',
    'mmpretrain.models.backbones.swin_transformer.SwinTransformer': 'la_swin_cls',
}
# The class that each of them registers; timm's has none.
REGISTERED = dict(la_vit='LessAttentionViT', la_pvt='LessAttentionPVT',
                  la_swin='LessAttentionSwin', la_swin_cls='LessAttentionSwinClassifier')


def add_less_attention(model: nn.Module,
                       layers: Union[str, Sequence[int]] = 'auto',
                       *,
                       mixing: str = 'full',
                       mixing_rank: int = DEFAULT_RANK,
                       max_base_grid: int = MAX_BASE_GRID,
                       dp_loss: Optional[dict] = None,
                       with_cp: bool = False,
                       images: Optional[Tensor] = None,
                       num_layers: Optional[int] = None,
                       min_similarity: float = 0.8) -> LessAttentionPlan:
    """Gives layers of a ViT, DeiT, PVT or Swin less attention, in place.

    A layer with less attention (LA) drops its Q and K and takes over the scores of the
    layer before, mixed by Theta and Psi, which begin as the identity. V and all other
    weights stay. A short training should follow, for the function of the model changes.

    Args:
        model (nn.Module): mmpretrain's ``VisionTransformer`` or ``SwinTransformer``,
            mmdet's ``PyramidVisionTransformer`` or ``SwinTransformer``, timm's
            ``VisionTransformer``, or a model with exactly one of them inside.
        layers (str | Sequence[int]): The layers, counted from 0 through all stages;
            'auto' chooses. Defaults to 'auto'.
        mixing (str): 'full' or 'low_rank'; see `LaViT`. Defaults to 'full'.
        mixing_rank (int): Rank of 'low_rank'. Defaults to 16.
        max_base_grid (int): Longest side of the grid on which Theta and Psi are
            learned, in tokens. In Swin it is always the window. Defaults to 14.
        dp_loss (dict, optional): Arguments of the diagonality-preserving loss,
            ``dict()`` for its defaults. Add ``plan.dp_loss.take()`` to the training
            loss. Defaults to None: off.
        with_cp (bool): Whether to compute each layer again in the backward pass: less
            memory, more time. Defaults to False.
        images (Tensor, optional): For 'auto': some images (B, 3, H, W) as the model is
            given them, of its usual size. Defaults to None.
        num_layers (int, optional): For 'auto': choose no more. Defaults to None: any
            number.
        min_similarity (float): For 'auto': the least cosine similarity of a
            layer's map to that of the layer it would inherit from. Defaults to 0.8.

    Returns:
        LessAttentionPlan: ``plan.layers``, what was changed; ``plan.remove()`` gives
        the original back; of 'auto', ``plan.report`` says what was chosen and what it
        saves.

    Raises:
        TypeError, ValueError: For a model of an unknown class, layers that cannot
            inherit, and arguments that cannot work.

    Example:
        >>> import timm
        >>> from mmlavit import add_less_attention
        >>> model = timm.create_model('deit_small_patch16_224')
        >>> plan = add_less_attention(model, layers=range(6, 12))
        >>> model = plan.remove()
    """
    part, family = the_stock_part(model)
    options = dict(mixing=mixing, mixing_rank=mixing_rank, max_base_grid=max_base_grid,
                   dp_loss=dp_loss, with_cp=with_cp, root=model)
    if not isinstance(layers, str):
        return convert(part, family, layers, **options)
    require_choice('layers', layers, ('auto', ))
    from .choose import choose_and_convert
    return choose_and_convert(part, family, images, num_layers, min_similarity, options)


def the_stock_part(model: nn.Module) -> Tuple[nn.Module, Family]:
    """The one part of a model that is of a stock class.

    Raises:
        ValueError: If there is none, or several, or it has less attention already.
    """
    require_type(isinstance(model, nn.Module), 'model', model,
                 "a model (eval() and train() of some of the toolboxes' return None)")
    parts = stock_parts(model)
    known = ', '.join(FAMILIES)
    require(len(parts) == 1, 'model', type(model).__name__,
            f'one model of these classes in it, here {len(parts)}: {known}')
    part, family = parts[0]
    require(not any(isinstance(x, Observable) for x in part.modules()), 'model',
            type(part).__name__, 'one without less attention; plan.remove() first')
    return part, family


def stock_parts(model: nn.Module) -> List[Tuple[nn.Module, Family]]:
    """The parts of a model that are of a stock class, and what is known of it."""
    found = ((module, family_of(type(module))) for module in model.modules())
    return [(module, family) for module, family in found if family is not None]


def family_of(stock: type) -> Optional[Family]:
    """What is known of a class, or of the class that it inherits from."""
    name = module_of(stock)
    if name is None:
        return None
    return importlib.import_module(f'mmlavit.models.backbones.{name}').FAMILY


def module_of(stock: type) -> Optional[str]:
    """The module in ``mmlavit.models.backbones`` that knows a class, or its base."""
    names = (module_of_itself(base) for base in stock.__mro__)
    return next((name for name in names if name is not None), None)


def module_of_itself(stock: type) -> Optional[str]:
    """The same, but not of the classes that it inherits from."""
    return FAMILIES.get(f'{stock.__module__}.{stock.__qualname__}')
