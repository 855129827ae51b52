"""Builds the model of a config of any of the three toolboxes, for the tools."""
import copy
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional, Union

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, Registry, init_default_scope
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from ..utils.weights import load_fitting


def read_config(path: Union[str, Path]) -> Config:
    """A config of a whole model of one of the toolboxes.

    Args:
        path (str | Path): The file.

    Raises:
        FileNotFoundError, ValueError: If it is not there, or no such config.
    """
    try:
        config = Config.fromfile(path)
    except FileNotFoundError:
        raise
    except OSError:  # by its suffix
        raise ValueError(f'{path}: expected a config, a .py, .yml, .yaml or .json '
                         'file') from None
    for name in 'model', 'default_scope':
        if not config.get(name):
            raise ValueError(f'{path}: {name}={config.get(name)!r}: expected a config '
                             'of a whole model, with default_scope such as mmdet')
    return config


def build_model(config: Config) -> nn.Module:
    """The model that mmengine's runner would build, without its pre-training.

    Args:
        config (Config): A config; it is left as it is.

    Returns:
        nn.Module: The model, not yet initialised; SyncBN is plain BN, for it has no
        CPU kernel.
    """
    init_default_scope(config.default_scope)
    model = copy.deepcopy(config.model)
    for part in model, model.get('backbone', {}):
        part.pop('init_cfg', None)
        part.pop('pretrained', None)  # mmsegmentation's older name of it
    if 'data_preprocessor' in config:
        model.setdefault('data_preprocessor', config.data_preprocessor)
    return revert_sync_batchnorm(MODELS.build(model))


def load_model(config: str, checkpoint: str, device: str) -> nn.Module:
    """The model of a config, of which the backbone is to be looked at, in eval mode.

    Args:
        config (str): Path of the config.
        checkpoint (str): Path of a checkpoint that has at least the backbone's
            weights, or 'none': the initial weights that seed 0 gives.
        device (str): Such as 'cpu' or 'cuda'.

    Raises:
        FileNotFoundError, ValueError: If the config is of no whole model, or the
            checkpoint does not fit.
    """
    torch.manual_seed(0)
    model = build_model(read_config(config))
    model.init_weights()
    if checkpoint != 'none':
        loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
        try:  # of a whole model, only the backbone is looked at
            found = load_fitting(model, loaded.get('state_dict', loaded))
        except ValueError as error:
            raise ValueError(f'{checkpoint}: {error}') from None
        if not any(name.startswith('backbone.') for name in found.fitting):
            raise ValueError(f'{checkpoint}: none of its weights are of the '
                             f'backbone of {config}')
    return model.eval().to(device)


def type_name(kind: Union[str, type]) -> str:
    """The class of a ``type`` by name, without the toolbox in front."""
    return kind.split('.')[-1] if isinstance(kind, str) else kind.__name__


def registered(registry: Registry, kind: Union[str, type]) -> Optional[type]:
    """The class of a ``type``: pure Python configs have the class itself there."""
    if isinstance(kind, type):
        return kind
    with registry.switch_scope_and_registry(None) as scoped:  # the default scope's
        return scoped.get(kind)


def class_names(config: Config, checkpoint: dict) -> Optional[List[str]]:
    """From the checkpoint, else from the config, else from its data set's class."""
    dataset = (config.get('test_dataloader') or {}).get('dataset') or {}
    stock = registered(DATASETS, dataset.type) if 'type' in dataset else None
    for meta in (checkpoint.get('meta', {}).get('dataset_meta') or {},
                 dataset.get('metainfo') or {}, getattr(stock, 'METAINFO', {})):
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


@contextmanager
def quiet() -> Iterator[None]:
    """No log of each parameter's initialisation."""
    # Not logging.disable: mmengine's loggers remember that they were disabled.
    logger = MMLogger.get_current_instance()
    before = logger.level
    logger.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(before)
