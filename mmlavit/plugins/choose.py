"""``layers='auto'``: the layers whose maps hardly differ from those before."""
import math
from typing import Dict, List, Optional

import torch
from torch import Tensor, nn

from ..analysis.complexity import count_macs, count_parameters
from ..analysis.measures import Similarity
from ..utils.checks import require, require_int, require_number, require_type
from ..utils.modes import eval_mode
from .convert import ConvertedLayer, LessAttentionPlan, convert
from .families import Family


def choose_and_convert(part: nn.Module, family: Family, images: Optional[Tensor],
                       num_layers: Optional[int], min_similarity: float,
                       options: dict) -> LessAttentionPlan:
    """See `add_less_attention`; the plan has the report.

    Raises:
        TypeError, ValueError: For arguments that cannot work, or if no layer is
            similar enough.
    """
    require_type(isinstance(images, Tensor), 'images', images,
                 "a tensor (B, 3, H, W) of images for layers='auto'")
    require(images.dim() == 4 and len(images) > 0, 'images.shape', tuple(images.shape),
            '(B, 3, H, W) with at least one image')
    found = layer_similarities(part, images)
    chosen = choose(found, num_layers, min_similarity)
    size = tuple(images.shape[2:])
    before = count_parameters(part), count_macs(part, size)
    plan = convert(part, family, chosen, **options)
    try:
        after = count_parameters(part), count_macs(part, size)
    except BaseException:
        plan.remove()  # nobody else could
        raise
    plan.layers = [ConvertedLayer(layer.index, layer.name, found[layer.index])
                   for layer in plan.layers]
    plan.report = report(plan.layers, size, before, after)
    return plan


def choose(similarities: Dict[int, float], num_layers: Optional[int],
           min_similarity: float) -> List[int]:
    """The layers that are similar enough, deepest first, no more than ``num_layers``.

    Raises:
        TypeError, ValueError: For arguments that cannot work, or if there is none.
    """
    require_number('min_similarity', min_similarity, 0)
    if num_layers is not None:
        num_layers = require_int('num_layers', num_layers, 1)
    require(bool(similarities), 'layers', 'auto',
            'a model with a layer that can inherit from another of its stage')
    alike = [i for i, value in similarities.items() if value >= min_similarity]
    require(bool(alike), 'min_similarity', min_similarity,
            f'at most {math.floor(1000 * max(similarities.values())) / 1000}, the largest '
            'similarity of a layer to the one before')
    return sorted(sorted(alike, reverse=True)[:num_layers])


@torch.no_grad()
def layer_similarities(part: nn.Module, images: Tensor) -> Dict[int, float]:
    """Cosine similarity of each layer's map to the one it would inherit, by index."""
    similarity = Similarity()
    with eval_mode(part), similarity.observe(part):
        part(images)
    values = (layer['map_similarity_to_previous']
              for layer in similarity.result()['layers'])
    return {i: value for i, value in enumerate(values) if value is not None}


def report(layers: List[ConvertedLayer], size: tuple, before: tuple,
           after: tuple) -> str:
    """Which layers, how alike they are, and what they save."""
    lines = [f'{layer.name}: its map is {layer.similarity:.3f} alike to the one before'
             for layer in layers]
    (params, macs), (less_params, less_macs) = before, after
    lines.append(f'parameters: {params / 1e6:.2f} M -> {less_params / 1e6:.2f} M')
    lines.append(f'multiply-adds at {size[0]} x {size[1]}: {macs / 1e9:.2f} G -> '
                 f'{less_macs / 1e9:.2f} G')
    return '\n'.join(lines)
