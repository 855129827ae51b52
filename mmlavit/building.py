"""Builds the model of a config of any of the three toolboxes, for the tools."""
import copy

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn


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
    if 'backbone' in model:
        model.backbone.pop('init_cfg', None)
    if 'data_preprocessor' in config:
        model.setdefault('data_preprocessor', config.data_preprocessor)
    return revert_sync_batchnorm(MODELS.build(model))
