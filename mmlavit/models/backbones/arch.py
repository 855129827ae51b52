"""From arguments to a plan: presets, checks, and one `StageSpec` a stage."""
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

from mmengine.model import PretrainedInit

from ...utils.checks import (require, require_bool, require_choice, require_int,
                             require_ints, require_keys, require_number,
                             require_type)
from ..layers.attention import TRANSFORMS, VALUE_REDUCTIONS
from ..layers.block import LayerSpec
from ..layers.grid import Grid, Grids
from ..layers.mixing import MIXINGS
from ..layers.scores import SCORE_PATHS

# Our choice: the paper's depths and widths are not public in full. These meet
# its parameters and FLOPs within 4 %.
LAVIT = dict(embed_dims=(64, 128, 320, 448), num_heads=(1, 2, 5, 7))
# PVTv2's own layout (arXiv 2106.13797), so that its weights fit; where less
# attention begins is our choice. Stage 4 keeps its first VA layer, for scores of
# stage 3 would take the place of those that its weights were trained for.
PVTV2 = dict(
    embed_dims=(64, 128, 320, 512),
    num_heads=(1, 2, 5, 8),
    attn_residual=False)
ARCHS = dict(
    # Our choice, by the rules of the others: for CPUs.
    nano=dict(
        embed_dims=(32, 64, 128, 192),
        num_heads=(1, 2, 4, 6),
        depths=(2, 2, 4, 2),
        num_va_layers=(2, 2, 1, 0)),
    tiny=dict(LAVIT, depths=(2, 2, 2, 2), num_va_layers=(2, 2, 1, 0)),
    small=dict(LAVIT, depths=(3, 4, 7, 3), num_va_layers=(3, 4, 2, 0)),
    base=dict(LAVIT, depths=(4, 5, 18, 3), num_va_layers=(4, 5, 3, 0)),
    pvtv2_b0=dict(
        PVTV2,
        embed_dims=(32, 64, 160, 256),
        depths=(2, 2, 2, 2),
        num_va_layers=(2, 2, 1, 1),
        mlp_ratios=(8, 8, 4, 4)),
    pvtv2_b1=dict(
        PVTV2,
        depths=(2, 2, 2, 2),
        num_va_layers=(2, 2, 1, 1),
        mlp_ratios=(8, 8, 4, 4)),
    pvtv2_b2=dict(
        PVTV2,
        depths=(3, 4, 6, 3),
        num_va_layers=(3, 4, 3, 1),
        mlp_ratios=(8, 8, 4, 4)),
    pvtv2_b3=dict(
        PVTV2,
        depths=(3, 4, 18, 3),
        num_va_layers=(3, 4, 9, 1),
        mlp_ratios=(8, 8, 4, 4)),
    pvtv2_b4=dict(
        PVTV2,
        depths=(3, 8, 27, 3),
        num_va_layers=(3, 8, 14, 1),
        mlp_ratios=(8, 8, 4, 4)),
    pvtv2_b5=dict(
        PVTV2,
        depths=(3, 6, 40, 3),
        num_va_layers=(3, 6, 20, 1),
        mlp_ratios=(4, 4, 4, 4)),
)
NEEDED = ('embed_dims', 'depths', 'num_heads', 'num_va_layers')
# What an `arch` dict may leave out.
ARCH_DEFAULTS = dict(
    mlp_ratios=(4, 4, 4, 4), patch_sizes=(7, 3, 3, 3), strides=(4, 2, 2, 2))
# The norm's place made no difference to accuracy (docs/reports/norm.md).
ARCH_FLAGS = dict(trunk_norm=True, attn_residual=True)


class StageSpec(NamedTuple):
    """What one stage is to be: the arguments of `Stage` that differ by stage."""
    layers: Sequence[LayerSpec]
    in_channels: int
    dims: int
    num_heads: int
    source_heads: int
    patch_size: int
    stride: int
    mlp_ratio: float
    sr_ratio: int
    q_base_grid: Grid
    k_base_grid: Grid
    norm: Optional[str]
    number: int


def resolve_arch(arch: Union[str, dict], num_va_layers: Optional[Sequence[int]],
                 sr_ratios: Sequence[int], attn_residual: Optional[bool] = None,
                 trunk_norm: Optional[bool] = None) -> dict:
    """The arch as a complete, checked dict: tuples of a value a stage, and flags.

    Args:
        arch, num_va_layers, sr_ratios, attn_residual, trunk_norm: As for `LaViT`.

    Raises:
        TypeError, ValueError: As `LaViT` does for these arguments.
    """
    names = f'one of {tuple(ARCHS)}, or a dict'
    if isinstance(arch, str):
        require(arch in ARCHS, 'arch', arch, names)
        arch = ARCHS[arch]
    require_type(isinstance(arch, dict), 'arch', arch, names)
    require_keys('arch', arch, NEEDED, {*NEEDED, *ARCH_DEFAULTS, *ARCH_FLAGS})
    num_stages = len(require_ints('depths', arch['depths'], 1))
    require(num_stages > 0, 'depths', arch['depths'], 'at least one stage')
    defaults = {k: values[:num_stages] for k, values in ARCH_DEFAULTS.items()}
    arch = {**defaults, **arch}
    overrides = dict(
        num_va_layers=num_va_layers,
        attn_residual=attn_residual,
        trunk_norm=trunk_norm)
    arch.update({k: v for k, v in overrides.items() if v is not None})
    flags = {
        key: require_bool(key, arch.pop(key, default))
        for key, default in ARCH_FLAGS.items()
    }
    for key, values in {**arch, 'sr_ratios': sr_ratios}.items():
        check_values(key, values, arch['depths'])
    arch = {key: tuple(values) for key, values in arch.items()}
    check_arch(arch)
    return {**arch, **flags}


def check_values(key: str, values: Sequence, depths: Sequence[int]) -> None:
    """Raises unless there is a number in range for every stage."""
    if key == 'mlp_ratios':
        require_type(
            isinstance(values, (list, tuple)), key, values,
            'a sequence of numbers')
        for value in values:
            require_number(key, value, 0)
    else:
        values = require_ints(key, values, 0 if key == 'num_va_layers' else 1)
    require(
        len(values) == len(depths), key, values,
        f'one value for each of the {len(depths)} stages that depths={depths} has')


def check_arch(arch: dict) -> None:
    """Raises unless the values of a complete arch fit together."""
    for dims, heads in zip(arch['embed_dims'], arch['num_heads']):
        require(dims % heads == 0, 'num_heads', arch['num_heads'],
                f'numbers that divide embed_dims={arch["embed_dims"]}; '
                f'{heads} does not divide {dims}')
    for dims, ratio in zip(arch['embed_dims'], arch['mlp_ratios']):
        require(dims * ratio >= 1, 'mlp_ratios', arch['mlp_ratios'],
                f'at least 1 / embed_dims={arch["embed_dims"]}, so that the '
                'FFN has a hidden channel')
    for size, stride in zip(arch['patch_sizes'], arch['strides']):
        require(size % 2 and size >= stride, 'patch_sizes',
                arch['patch_sizes'], 'odd numbers of at least strides='
                f'{arch["strides"]}, so that every pixel is seen')
    for va, depth in zip(arch['num_va_layers'], arch['depths']):
        require(va <= depth, 'num_va_layers', arch['num_va_layers'],
                f'at most depths={arch["depths"]} in every stage')
    require(arch['num_va_layers'][0] > 0, 'num_va_layers',
            arch['num_va_layers'],
            'at least 1 in the first stage, which has no scores to inherit')


def is_pretrained(cfg: dict) -> bool:
    """Whether a config of an initialisation names a checkpoint."""
    return cfg['type'] in ('Pretrained', PretrainedInit)


def check_init_cfg(init_cfg: Union[dict, Sequence[dict], None]) -> List[dict]:
    """The configs as a list.

    Raises:
        TypeError, ValueError: Unless the form is mmengine's, who checks what is in
            it.
    """
    expected = ("None, or a dict or list of dicts with a type, as in "
                "dict(type='Pretrained', checkpoint=PATH)")
    cfgs = [] if init_cfg is None else init_cfg
    cfgs = list(cfgs) if isinstance(cfgs, (list, tuple)) else [cfgs]
    for cfg in cfgs:
        require_type(isinstance(cfg, dict), 'init_cfg', init_cfg, expected)
        require(
            'type' in cfg
            and (not is_pretrained(cfg) or isinstance(cfg.get('checkpoint'), str)),
            'init_cfg', init_cfg, expected)
    return cfgs


def check_out_indices(out_indices: Sequence[int],
                      num_stages: int) -> Tuple[int, ...]:
    """The indices as a tuple; raises unless they are of stages, ascending."""
    out_indices = require_ints('out_indices', out_indices, 0, num_stages - 1)
    require(out_indices and list(out_indices) == sorted(set(out_indices)),
            'out_indices', out_indices,
            'stage indices, ascending and each once')
    return out_indices


def check_layer_options(*, max_key_grid: Optional[int], qkv_bias: bool,
                        value_reduction: str, transform: str, mixing: str,
                        mixing_rank: int, score_path: str,
                        drop_rate: float, attn_drop_rate: float,
                        norm_cfg: dict, act_cfg: dict, with_cp: bool) -> dict:
    """The arguments of `Stage` that are the same for all stages.

    What is in the configs of norms and activations is checked where they are built.

    Raises:
        TypeError, ValueError: Naming the argument, its value and what is right.
    """
    if max_key_grid is not None:
        max_key_grid = require_int('max_key_grid', max_key_grid, 1)
    return dict(
        max_key_grid=max_key_grid,
        qkv_bias=require_bool('qkv_bias', qkv_bias),
        value_reduction=require_choice('value_reduction', value_reduction,
                                       VALUE_REDUCTIONS),
        transform=require_choice('transform', transform, TRANSFORMS),
        mixing=require_choice('mixing', mixing, MIXINGS),
        mixing_rank=require_int('mixing_rank', mixing_rank, 1),
        score_path=require_choice('score_path', score_path, SCORE_PATHS),
        drop_rate=require_number('drop_rate', drop_rate, 0, 1),
        attn_drop_rate=require_number('attn_drop_rate', attn_drop_rate, 0, 1),
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
        with_cp=require_bool('with_cp', with_cp))


def score_source(stage: int, layer: int, num_va_layers: int,
                 attn_residual: bool) -> Optional[str]:
    """Who inherits scores from whom: the source of a layer, as in `LayerSpec`.

    Known: LA inherits from the layer before it; a stage that begins with LA
    inherits from the stage before, and one that begins with VA adds those scores
    to its first layer's. What a stage hands on is `LayerScores.to_next_stage`.
    """
    if layer == 0 and stage > 0:
        inherits = attn_residual or num_va_layers == 0
        return 'stage' if inherits else None
    return None if layer < num_va_layers else 'layer'


def is_less_attention(arch: dict, num_stages: int) -> List[bool]:
    """For each layer of the first stages whether it is LA."""
    return [
        j >= arch['num_va_layers'][i] for i in range(num_stages)
        for j in range(arch['depths'][i])
    ]


def plan_stages(arch: dict, out_indices: Sequence[int], *,
                dp_layers: Sequence[bool], in_channels: int,
                pretrain_img_size: int, sr_ratios: Sequence[int],
                max_query_grid: int, max_key_grid: Optional[int],
                drop_path_rate: float) -> List[StageSpec]:
    """What the stages up to the last whose map is returned are to be.

    Args:
        arch (dict): As `resolve_arch` returns it.
        out_indices (Sequence[int]): Stages whose maps are returned.
        dp_layers (Sequence[bool]): For each layer whether the DP loss is on it.
        in_channels, pretrain_img_size, sr_ratios, max_query_grid, max_key_grid,
            drop_path_rate: As for `LaViT`, checked.

    Raises:
        ValueError: If a stage inherits scores over another grid of keys.
    """
    depths, dims, heads = (
        arch[key] for key in ('depths', 'embed_dims', 'num_heads'))
    # From 0 at the first layer to drop_path_rate at the last.
    step = drop_path_rate / max(sum(depths) - 1, 1)
    specs = []
    for i in range(out_indices[-1] + 1):
        first, num_va_layers = sum(depths[:i]), arch['num_va_layers'][i]
        layers = [
            LayerSpec(
                kind='VA' if j < num_va_layers else 'LA',
                source=score_source(i, j, num_va_layers, arch['attn_residual']),
                drop_path_rate=step * (first + j),
                dp_loss=dp_layers[first + j]) for j in range(depths[i])
        ]
        if layers[0].source == 'stage':
            check_key_grid(i, arch['strides'], sr_ratios)
        q_base_grid, k_base_grid = base_grids(
            pretrain_img_size, math.prod(arch['strides'][:i + 1]), sr_ratios[i],
            max_query_grid, max_key_grid)
        specs.append(
            StageSpec(
                layers=layers,
                in_channels=dims[i - 1] if i else in_channels,
                dims=dims[i],
                num_heads=heads[i],
                source_heads=heads[i - 1] if i else 0,
                patch_size=arch['patch_sizes'][i],
                stride=arch['strides'][i],
                mlp_ratio=arch['mlp_ratios'][i],
                sr_ratio=sr_ratios[i],
                q_base_grid=q_base_grid,
                k_base_grid=k_base_grid,
                norm=norm_place(arch['trunk_norm'], i in out_indices),
                number=i))
    return specs


def norm_place(trunk_norm: bool, returned: bool) -> Optional[str]:
    """Where a stage's norm is, as in `Stage`."""
    return 'trunk' if trunk_norm else 'output' if returned else None


def base_grids(pretrain_img_size: int, total_stride: int, sr_ratio: int,
               max_query_grid: int,
               max_key_grid: Optional[int]) -> Tuple[Grid, Grid]:
    """Grids of the pre-training size, on which Psi and Theta are learned."""
    side = math.ceil(pretrain_img_size / total_stride)
    keys = Grids.of((side, side), sr_ratio, max_key_grid).keys
    side = min(side, max_query_grid)
    return (side, side), keys


def check_key_grid(stage: int, strides: Sequence[int],
                   sr_ratios: Sequence[int]) -> None:
    """Raises unless a stage that inherits has the keys of the stage before."""
    last = math.prod(strides[:stage]) * sr_ratios[stage - 1]
    stride, ratio = math.prod(strides[:stage + 1]), sr_ratios[stage]
    require(
        last == stride * ratio, 'sr_ratios', sr_ratios,
        f'stage {stage} inherits scores, so its total stride times ratio '
        f'({stride} x {ratio}) must equal that of stage {stage - 1} ({last}), as '
        'with (8, 4, 2, 1) at strides (4, 2, 2, 2); or set attn_residual=False and '
        'begin the stage with a VA layer')
