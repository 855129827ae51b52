"""The models that LaViT is compared with, by short names."""
import ast
import importlib
from pathlib import Path
from typing import Dict, List

import torch
from mmengine.config import Config
from mmengine.registry import MODELS as REGISTRY
from mmengine.registry import init_default_scope
from torch import nn

from ..models.backbones.arch import ARCHS
from .building import build_model


def lavit(arch: str, **kwargs) -> dict:
    return dict(type='LaViT', arch=arch, **kwargs)


def twin(arch: str, **kwargs) -> dict:
    """Without less attention and without residuals: vanilla attention alone."""
    return lavit(arch, num_va_layers=ARCHS[arch]['depths'], attn_residual=False,
                 **kwargs)


def pvtv2(layers: List[int]) -> dict:
    return dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=64,
                num_layers=layers)


def swin(depths: List[int]) -> dict:
    return dict(type='mmdet.SwinTransformer', embed_dims=96, depths=depths,
                num_heads=[3, 6, 12, 24], drop_path_rate=0.)


PEERS: Dict[str, dict] = {
    'LaViT-T': lavit('tiny'),
    'LaViT-S': lavit('small'),
    'LaViT-B': lavit('base'),
    'LaViT-T-twin': twin('tiny'),
    'LaViT-S-twin': twin('small'),
    'LaViT-B-twin': twin('base'),
    'LaViT-S-keys14': lavit('small', max_key_grid=14),
    'LaViT-S-pooled': lavit('small', value_reduction='pool'),
    'LaViT-S-keys14-pooled': lavit('small', max_key_grid=14,
                                   value_reduction='pool'),
    'LaViT-S-keys14-twin': twin('small', max_key_grid=14),
    'LaViT-S-factored': lavit('small', score_path='factored'),
    'LaViT-S-materialised': lavit('small', score_path='materialised'),
    'PVT-S': dict(type='mmdet.PyramidVisionTransformer',
                  num_layers=[3, 4, 6, 3]),
    'PVTv2-B1': pvtv2([2, 2, 2, 2]),
    'PVTv2-B2': pvtv2([3, 4, 6, 3]),
    'PVTv2-B3': pvtv2([3, 4, 18, 3]),
    'Swin-T': swin([2, 2, 6, 2]),
    'Swin-S': swin([2, 2, 18, 2]),
    'ConvNeXt-T': dict(type='mmpretrain.ConvNeXt', arch='tiny',
                       out_indices=(0, 1, 2, 3), gap_before_final_norm=False),
    'ResNet-50': dict(type='mmdet.ResNet', depth=50),
}


def build_backbone(name: str) -> nn.Module:
    """A backbone with the weights that seed 0 gives, on the CPU.

    Args:
        name (str): One of `PEERS`, the path of a config whose backbone is taken, or
            a registered class with its arguments, ``'mmdet.ResNet(depth=101)'``.

    Raises:
        ValueError: If it is none of these.
    """
    torch.manual_seed(0)
    return REGISTRY.build(backbone_config(name))


def build_detector(path: str) -> nn.Module:
    """The whole detector of a config with the weights that seed 0 gives."""
    torch.manual_seed(0)
    return build_model(Config.fromfile(path))


def backbone_config(name: str) -> dict:
    """The config of a backbone; its toolbox is imported."""
    if name in PEERS:
        config = dict(PEERS[name])
    elif Path(name).is_file():
        file = Config.fromfile(name)
        init_default_scope(file.default_scope)
        config = file.model.backbone
    else:
        config = parse_name(name)
    config.pop('init_cfg', None)
    scope = config['type'].partition('.')[0]
    if scope in ('mmdet', 'mmseg', 'mmpretrain'):
        importlib.import_module(f'{scope}.models')  # registers them
    if REGISTRY.get(config['type']) is None:
        raise ValueError(f'{name}: expected the path of a config, a registered '
                         f'name or one of {", ".join(PEERS)}')
    return config


def parse_name(name: str) -> dict:
    """``mmdet.ResNet(depth=101)`` as the config that it stands for."""
    try:
        call = ast.parse(name, mode='eval').body
        if not isinstance(call, ast.Call):
            return dict(type=name)
        return dict(type=ast.unparse(call.func), **{
            each.arg: ast.literal_eval(each.value) for each in call.keywords})
    except (SyntaxError, ValueError):
        return dict(type=name)
