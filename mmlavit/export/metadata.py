"""What a runtime must know of a model, as JSON strings by name."""
import json
import math
from typing import Dict, List, Optional

from mmengine.config import Config
from torch import nn

from ..analysis.building import type_name
from ..version import __version__
from .parts import Part

# How the names of those steps of a test pipeline begin that leave an image as it is.
READING = ('Load', 'Pack')


def describe(part: Part, model: nn.Module, config: Config,
             classes: Optional[List[str]]) -> Dict[str, str]:
    """Metadata of an exported part.

    Args:
        part (Part): What is exported.
        model (nn.Module): The model it is of, whose preprocessor is described.
        config (Config): Its config, whose test pipeline is described.
        classes (list[str], optional): The class names.

    Returns:
        dict[str, str]: 'task', 'classes', 'mean' and 'std' of the channels in the
        order 'channels' ('rgb' or 'bgr'), pixels of 0 to 255; 'resize', the steps
        of the test pipeline between reading and packing; 'pad_divisor', to a multiple
        of which images are padded with zeros after normalisation; 'mmlavit', the
        version.
    """
    preprocessor = model.data_preprocessor
    # mmengine's and mmdetection's, mmsegmentation's, mmpretrain's.
    swaps = any(getattr(preprocessor, name, False) for name in (
        '_channel_conversion', 'channel_conversion', 'to_rgb'))
    normalises = getattr(preprocessor, '_enable_normalize', False)
    values = dict(
        task=part.task,
        classes=classes,
        mean=preprocessor.mean.flatten().tolist() if normalises else [0.] * 3,
        std=preprocessor.std.flatten().tolist() if normalises else [1.] * 3,
        channels='rgb' if swaps else 'bgr',
        resize=preparation(config),
        pad_divisor=math.lcm(part.divisor, padding_of(preprocessor)),
        mmlavit=__version__)
    return {name: json.dumps(value, default=str) for name, value in values.items()}


def padding_of(preprocessor: nn.Module) -> int:
    """The number that a data preprocessor pads sides to a multiple of, in a test.

    Raises:
        ValueError: If it pads with other values than zeros.
    """
    in_test = getattr(preprocessor, 'test_cfg', None) or {}  # mmsegmentation's
    value = getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0))
    if value != 0:
        raise ValueError(f'data_preprocessor: pads with {value}: expected 0, as runtimes '
                         'pad')
    return (getattr(preprocessor, 'pad_size_divisor', None)
            or in_test.get('size_divisor') or 1)


def preparation(config: Config) -> List[dict]:
    """The steps of the test pipeline that change images, known to a runtime or not."""
    dataset = (config.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset.get('dataset') or dataset['datasets'][0]  # of a wrapper
    steps = dataset.get('pipeline') or []
    named = [dict(step, type=type_name(step['type'])) for step in steps]
    return [step for step in named if not step['type'].startswith(READING)]
