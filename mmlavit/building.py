"""Builds the model of a config of any of the three toolboxes, for the tools."""
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn


def build_model(config: Config) -> nn.Module:
    """The model that mmengine's runner would build, without its pre-training.

    Args:
        config (Config): A config; it is left as it is.

    Returns:
        nn.Module: The model with random weights, SyncBN as plain BN, for it has no
        CPU kernel.
    """
    config = config.copy()
    init_default_scope(config.default_scope)
    model = config.model
    for name in ('backbone', 'decode_head', 'auxiliary_head'):
        if name in model:
            model[name].pop('init_cfg', None)
            if model[name].get('norm_cfg', {}).get('type') == 'SyncBN':
                model[name].norm_cfg.type = 'BN'
    if 'data_preprocessor' in config:
        model.setdefault('data_preprocessor', config.data_preprocessor)
    return MODELS.build(model)
