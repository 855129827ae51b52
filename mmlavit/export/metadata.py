"""A model's weights, and what a runtime must know of it as JSON strings by name."""
import json
from pathlib import Path
from typing import Dict, List, Optional, Union

from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import load_checkpoint
from torch import nn

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
        pad_divisor=getattr(preprocessor, 'pad_size_divisor', 1),
        mmlavit=__version__)
    return {name: json.dumps(value, default=str) for name, value in values.items()}


def preparation(config: Config) -> List[dict]:
    """The steps of the test pipeline that change images, known to a runtime or not."""
    steps = config.get('test_dataloader', {}).get('dataset', {}).get('pipeline', [])
    named = [dict(step, type=type_name(step['type'])) for step in steps]
    return [step for step in named if not step['type'].startswith(READING)]


def type_name(kind: Union[str, type]) -> str:
    """A step's class by name, without the toolbox in front."""
    return kind.split('.')[-1] if isinstance(kind, str) else kind.__name__


def class_names(config: Config, checkpoint: dict) -> Optional[List[str]]:
    """From the checkpoint, else from the config, else from its data set's class."""
    dataset = config.get('test_dataloader', {}).get('dataset', {})
    stock = DATASETS.get(dataset.type) if 'type' in dataset else None
    for meta in (checkpoint.get('meta', {}).get('dataset_meta') or {},
                 dataset.get('metainfo', {}), getattr(stock, 'METAINFO', {})):
        names = meta.get('classes', meta.get('CLASSES'))
        if names:
            return list(names)
    return None


def load_weights(model: nn.Module, checkpoint: Optional[Path]) -> dict:
    """Loads all weights, or initialises them if there is no checkpoint.

    Returns:
        dict: The checkpoint; empty without one.

    Raises:
        RuntimeError, ValueError: If it does not have exactly the model's weights.
    """
    if checkpoint is None:
        model.init_weights()
        return {}
    return load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True)
