"""The models that LaViT is compared with, by short names."""
import ast
import importlib
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import yaml
from mmengine.registry import MODELS as REGISTRY
from mmengine.registry import init_default_scope
from torch import nn

from ..models.backbones.arch import ARCHS
from ..plugins.add import REGISTERED
from .building import build_model, read_config, registered


def lavit(arch: str, **kwargs) -> dict:
    return dict(type='LaViT', arch=arch, **kwargs)


def twin(arch: str, **kwargs) -> dict:
    """Without less attention and without residuals: vanilla attention alone."""
    return lavit(arch, num_va_layers=ARCHS[arch]['depths'], attn_residual=False,
                 **kwargs)


def pvtv2(layers: List[int], embed_dims: int = 64) -> dict:
    return dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=embed_dims,
                num_layers=layers)


def swin(depths: List[int]) -> dict:
    return dict(type='mmdet.SwinTransformer', embed_dims=96, depths=depths,
                num_heads=[3, 6, 12, 24], drop_path_rate=0.)


def timm(name: str, out_indices: Tuple[int, ...] = (0, 1, 2, 3)) -> dict:
    """A network of timm by mmpretrain's wrapper: its maps, without a head."""
    return dict(type='mmpretrain.TIMMBackbone', model_name=name, features_only=True,
                out_indices=out_indices)


def la_deit(arch: str, **kwargs) -> dict:
    """With less attention from layer 4 of 12 on."""
    return dict(type='LessAttentionViT', arch=arch, first_la_layer=4, **kwargs)


def la_pvt(**kwargs) -> dict:
    return dict(type='LessAttentionPVT', num_layers=[3, 4, 6, 3],
                num_va_layers=(3, 4, 3, 1), **kwargs)


def la_swin(**kwargs) -> dict:
    return dict(swin([2, 2, 6, 2]), type='LessAttentionSwin', la_layers=(6, 7, 8, 9),
                **kwargs)


# Less attention in others' transformers, and those that are not below.
LESS_ATTENTION: Dict[str, dict] = {
    'DeiT-T': dict(type='mmpretrain.VisionTransformer', arch='deit-tiny'),
    'LA-DeiT-T': la_deit('deit-tiny'),
    'LA-DeiT-T-low-rank': la_deit('deit-tiny', mixing='low_rank'),
    'DeiT-S': dict(type='mmpretrain.VisionTransformer', arch='deit-small'),
    'LA-DeiT-S': la_deit('deit-small'),
    'LA-DeiT-S-low-rank': la_deit('deit-small', mixing='low_rank'),
    'LA-PVT-S': la_pvt(),
    'LA-PVT-S-low-rank': la_pvt(mixing='low_rank'),
    'LA-Swin-T': la_swin(),
    'LA-Swin-T-low-rank': la_swin(mixing='low_rank'),
    'LaViT-S-low-rank': lavit('small', mixing='low_rank'),
}
# What registers them; LaViT is registered with the package.
MODULES = {name: module for module, name in REGISTERED.items()}

# Strong networks of about LaViT-S's accuracy, as timm implements them.
TIMM_PEERS: Dict[str, dict] = {
    'EfficientViT-B2': timm('efficientvit_b2'),
    'Twins-SVT-S': timm('twins_svt_small'),
    'ResNet-50-timm': timm('resnet50', (1, 2, 3, 4)),  # 0 is its stem
    'FastViT-SA24': timm('fastvit_sa24'),
    'ConvNeXt-T-timm': timm('convnext_tiny'),
    'EfficientFormerV2-L': timm('efficientformerv2_l'),
    'Hiera-T': timm('hiera_tiny_224'),
    'NextViT-S': timm('nextvit_small'),
    'CAFormer-S18': timm('caformer_s18'),
    'MambaOut-T': timm('mambaout_tiny'),
    'Swin-T-timm': timm('swin_tiny_patch4_window7_224'),
    'PVTv2-B2-timm': timm('pvt_v2_b2'),
    'TinyViT-21M': timm('tiny_vit_21m_224'),
}
# They are built for one size of input.
SIZED = ('EfficientFormerV2-L', 'Hiera-T', 'Swin-T-timm')

PEERS: Dict[str, dict] = {
    'LaViT-N': lavit('nano'),
    'LaViT-T': lavit('tiny'),
    'LaViT-S': lavit('small'),
    'LaViT-B': lavit('base'),
    'LaViT-N-twin': twin('nano'),
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
    'PVTv2-B0': pvtv2([2, 2, 2, 2], embed_dims=32),
    'PVTv2-B1': pvtv2([2, 2, 2, 2]),
    'PVTv2-B2': pvtv2([3, 4, 6, 3]),
    'PVTv2-B3': pvtv2([3, 4, 18, 3]),
    'Swin-T': swin([2, 2, 6, 2]),
    'Swin-S': swin([2, 2, 18, 2]),
    'ConvNeXt-T': dict(type='mmpretrain.ConvNeXt', arch='tiny',
                       out_indices=(0, 1, 2, 3), gap_before_final_norm=False),
    'ResNet-50': dict(type='mmdet.ResNet', depth=50),
    'MobileNetV2': dict(type='mmpretrain.MobileNetV2', out_indices=(1, 2, 4, 6)),
    **LESS_ATTENTION,
    **TIMM_PEERS,
}

# Names that stand for several.
GROUPS: Dict[str, List[str]] = {
    'today': ['LaViT-S', 'LaViT-S-twin', *TIMM_PEERS],
}


def build_backbone(name: str, size: Optional[Tuple[int, int]] = None,
                   fuse: bool = False) -> nn.Module:
    """A backbone with the weights that seed 0 gives, on the CPU.

    Args:
        name (str): One of `PEERS`, the path of a config whose backbone is taken, or
            a registered class with its arguments, ``'mmdet.ResNet(depth=101)'``.
        size (tuple[int, int], optional): (H, W) in pixels, for those that are built
            for one size. Default: None, their own, 224 x 224.
        fuse (bool): Whether those that are made to be fused for inference are, as
            timm does it. Default: False.

    Raises:
        ValueError: If it is none of these.
    """
    torch.manual_seed(0)
    config = backbone_config(name)
    if size and name in SIZED:
        config['img_size'] = size
    model = REGISTRY.build(config)
    if fuse and name in TIMM_PEERS:
        from timm.utils import reparameterize_model
        model.timm_model = reparameterize_model(model.timm_model.eval())
    return model


def published_top1(names: Sequence[str], published: Path) -> Dict[str, float]:
    """Published ImageNet-1K top-1 in percent, of the names that have one.

    Args:
        names (Sequence[str]): Of `PEERS`.
        published (Path): configs/published.yml.
    """
    known = yaml.safe_load(published.read_text())
    top1 = {row['model']: row['top1'] for row in known['classification']
            if 'top1' in row}
    top1.update(known['timm'])
    return {name: top1[name] for name in names if name in top1}


def expand_groups(names: Sequence[str]) -> List[str]:
    """The names, each of `GROUPS` replaced by those that it stands for."""
    return [each for name in names for each in GROUPS.get(name, [name])]


def build_detector(path: str) -> nn.Module:
    """The whole detector of a config with the weights that seed 0 gives."""
    torch.manual_seed(0)
    return build_model(read_config(path))


def backbone_config(name: str) -> dict:
    """The config of a backbone; its toolbox is imported."""
    if name in PEERS:
        config = dict(PEERS[name])
    elif Path(name).is_file():
        file = read_config(name)
        if 'backbone' not in file.model:
            raise ValueError(f'{name}: expected a config with model.backbone')
        init_default_scope(file.default_scope)
        config = file.model.backbone
        if isinstance(config.type, type):  # of a pure Python config
            config.type = f'{file.default_scope}.{config.type.__name__}'
    else:
        config = parse_name(name)
    config.pop('init_cfg', None)
    scope = config['type'].partition('.')[0]
    if scope in ('mmdet', 'mmseg', 'mmpretrain'):
        importlib.import_module(f'{scope}.models')  # registers them
    if config['type'] in MODULES:
        importlib.import_module(
            f'mmlavit.models.backbones.{MODULES[config["type"]]}')
    if registered(REGISTRY, config['type']) is None:
        raise ValueError(
            f'{name}: expected the path of a config, a registered name such as LaViT or '
            f"LaViT(arch='tiny'), or one of {', '.join(PEERS)}")
    return config


def parse_name(name: str) -> dict:
    """``mmdet.ResNet(depth=101)`` as the config that it stands for."""
    try:
        call = ast.parse(name, mode='eval').body
        if not isinstance(call, ast.Call) or call.args or any(
                each.arg is None for each in call.keywords):
            return dict(type=name)
        return dict(type=ast.unparse(call.func), **{
            each.arg: ast.literal_eval(each.value) for each in call.keywords})
    except (SyntaxError, ValueError):
        return dict(type=name)
