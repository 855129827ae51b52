"""Which part of a model is exported, by what the model can do."""
import copy
from typing import Optional, Type

from torch import nn

from .detections import Detections
from .parts import (BackboneMaps, ClassLogits, DenseDetections, Part,
                    PixelLogits)


def choose_part(model: nn.Module, part: str) -> Part:
    """A part of a copy of the model, in eval mode and without gradients.

    Args:
        model (nn.Module): A model of any of the three toolboxes; it is left as it
            is.
        part (str): 'model', all of it up to the head's output; 'backbone'; or
            'end-to-end', a dense detector with decoding and NMS.

    Raises:
        ValueError: If the model has no such part.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    kind = kind_of(model, part)
    if kind is None:
        raise ValueError(
            f'export: part={part!r}: {type(model).__name__} has no such part: expected '
            "'backbone', 'model' of an image classifier, an encoder-decoder segmentor "
            "or a single-stage detector, or 'end-to-end' of the latter")
    chosen = kind(model).eval()
    chosen.divisor = getattr(getattr(model, 'backbone', None), 'size_divisor', 1)
    return chosen


def kind_of(model: nn.Module, part: str) -> Optional[Type[Part]]:
    """The kind of `Part` that fits, by what the model can do; None if none does."""
    if part == 'backbone':
        return BackboneMaps if hasattr(model, 'backbone') else None
    if hasattr(getattr(model, 'bbox_head', None), 'prior_generator'):
        return Detections if part == 'end-to-end' else DenseDetections
    if part == 'end-to-end':
        return None
    if hasattr(model, 'encode_decode'):
        return PixelLogits
    return ClassLogits if hasattr(model, 'head') else None
