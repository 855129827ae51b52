"""Which part of a model is exported, by what the model can do."""
import copy
from typing import Optional, Type

from torch import nn

from ..utils.checks import require_choice
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
        ValueError: If there is no such part, the model lacks it, or its head is one that
            runtimes misread.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    kind = kind_of(model, part)
    if kind is None:
        raise ValueError(
            f'export: part={part!r}: {type(model).__name__} has no such part: expected '
            "'backbone', 'model' of an image classifier, an encoder-decoder segmentor "
            "or a single-stage detector, or 'end-to-end' of the latter")
    chosen = kind(model).eval()
    check_classes(model, chosen)
    chosen.divisor = getattr(getattr(model, 'backbone', None), 'size_divisor', 1)
    return chosen


def check_classes(model: nn.Module, part: Part) -> None:
    """Refuses heads whose classes do not exclude each other, which runtimes misread.

    Raises:
        ValueError: If there is a threshold for each class in place of a highest score.
    """
    head = getattr(model, 'decode_head', None)
    if part.task == 'segmentation' and getattr(head, 'out_channels', 0) == 1:
        raise ValueError('export: decode_head.out_channels=1: expected one channel for '
                         'each class: out_channels=2 for two classes')
    kinds = [kind.__name__ for kind in type(getattr(model, 'head', None)).__mro__]
    if part.task == 'classification' and 'MultiLabelClsHead' in kinds:
        raise ValueError(f'export: head {kinds[0]}: expected a head of classes that '
                         "exclude each other; part='backbone' exports the maps")


def kind_of(model: nn.Module, part: str) -> Optional[Type[Part]]:
    """The kind of `Part` that fits, by what the model can do; None if none does.

    Raises:
        ValueError: If there is no such ``part``.
    """
    require_choice('part', part, ('model', 'backbone', 'end-to-end'))
    if part == 'backbone':
        return BackboneMaps if hasattr(model, 'backbone') else None
    if hasattr(getattr(model, 'bbox_head', None), 'prior_generator'):
        return Detections if part == 'end-to-end' else DenseDetections
    if part == 'end-to-end':
        return None
    if hasattr(model, 'encode_decode'):
        return PixelLogits
    return ClassLogits if hasattr(model, 'head') else None
