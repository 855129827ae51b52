"""LaViT: Less-Attention Vision Transformer (CVPR 2024, arXiv 2406.00427)."""
import math
import os
import re
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Iterator, List, Optional, Sequence, Tuple, Union

import torch
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import (AttentionDownsample, Grid, LayerScores, LessAttention,
                        Scores, VanillaAttention, key_ratio, normalise,
                        pooled_grid, to_map, to_tokens)
from .checks import (require, require_bool, require_choice, require_int,
                     require_ints, require_keys, require_layer, require_number,
                     require_type)
from .dp_loss import DiagonalityPreservingLoss

# Our choice: the paper's depths and widths are not public in full. These meet
# its parameters and FLOPs within 4 %.
ARCHS = dict(
    tiny=dict(
        embed_dims=(64, 128, 320, 448),
        depths=(2, 2, 2, 2),
        num_va_layers=(2, 2, 1, 0),
        num_heads=(1, 2, 5, 7)),
    small=dict(
        embed_dims=(64, 128, 320, 448),
        depths=(3, 4, 7, 3),
        num_va_layers=(3, 4, 2, 0),
        num_heads=(1, 2, 5, 7)),
    base=dict(
        embed_dims=(64, 128, 320, 448),
        depths=(4, 5, 18, 3),
        num_va_layers=(4, 5, 3, 0),
        num_heads=(1, 2, 5, 7)),
)
# What an `arch` dict may leave out.
ARCH_DEFAULTS = dict(
    mlp_ratios=(4, 4, 4, 4), patch_sizes=(7, 3, 3, 3), strides=(4, 2, 2, 2))

SCORE_PATHS = ('auto', 'factored', 'materialised')
VALUE_REDUCTIONS = ('conv', 'pool')
TRANSFORMS = ('token_mix', 'identity', 're_attention')


def init_module(module: nn.Module) -> None:
    """Linear, convolution and norm weights as PVT and Swin begin with them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels
        nn.init.normal_(module.weight, 0,
                        math.sqrt(2 * module.groups / fan_out))
    elif isinstance(module, (nn.LayerNorm, _BatchNorm, nn.GroupNorm)):
        nn.init.ones_(module.weight)
    if getattr(module, 'bias', None) is not None:
        nn.init.zeros_(module.bias)


def resolve_arch(arch: Union[str, dict], num_va_layers: Optional[Sequence[int]],
                 sr_ratios: Sequence[int]) -> dict:
    """The arch as a complete, checked dict of tuples, one value a stage.

    Raises:
        TypeError, ValueError: As `LaViT` does for ``arch``, ``num_va_layers`` and
            ``sr_ratios``.
    """
    names = f'one of {tuple(ARCHS)}, or a dict'
    if isinstance(arch, str):
        require(arch in ARCHS, 'arch', arch, names)
        arch = ARCHS[arch]
    require_type(isinstance(arch, dict), 'arch', arch, names)
    require_keys('arch', arch, ARCHS['tiny'], {*ARCHS['tiny'], *ARCH_DEFAULTS})
    num_stages = len(require_ints('depths', arch['depths'], 1))
    require(num_stages > 0, 'depths', arch['depths'], 'at least one stage')
    defaults = {k: values[:num_stages] for k, values in ARCH_DEFAULTS.items()}
    arch = {**defaults, **arch}
    if num_va_layers is not None:
        arch['num_va_layers'] = num_va_layers

    for key, values in {**arch, 'sr_ratios': sr_ratios}.items():
        least = 0 if key == 'num_va_layers' else 1
        if key == 'mlp_ratios':
            require_type(
                isinstance(values, (list, tuple)), key, values,
                'a sequence of numbers')
            for value in values:
                require_number(key, value, 0)
        else:
            values = require_ints(key, values, least)
        require(
            len(values) == num_stages, key, values,
            f'one value for each of the {num_stages} stages that '
            f'depths={arch["depths"]} has')
        if key in arch:
            arch[key] = tuple(values)

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
    return arch


def check_layers(norm_cfg: dict, act_cfg: dict,
                 embed_dims: Sequence[int]) -> None:
    """Raises unless the layers work on tokens."""
    grid = 2, 2  # some norms refuse the statistics of a single position
    for dims in embed_dims:
        tokens = torch.ones(1, 4, dims)
        require_layer(
            'norm_cfg', norm_cfg,
            f"a norm that fits {dims} channels: 'LN', 'BN', 'GN' ...",
            lambda: normalise(
                build_norm_layer(norm_cfg, dims)[1].eval(), tokens, grid
            ).shape == tokens.shape)
    require_layer(
        'act_cfg', act_cfg, "an activation: 'GELU', 'ReLU' ...",
        lambda: build_activation_layer(act_cfg)(tokens).shape == tokens.shape)


def check_init_cfg(init_cfg: Union[dict, Sequence[dict], None]) -> None:
    """Raises unless its form is mmengine's, who checks what is in it."""
    if init_cfg is None:
        return
    expected = ("None, or a dict or list of dicts with a type, as in "
                "dict(type='Pretrained', checkpoint=PATH)")
    cfgs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    for cfg in cfgs:
        require_type(isinstance(cfg, dict), 'init_cfg', init_cfg, expected)
        require(
            'type' in cfg
            and (cfg['type'] != 'Pretrained' or 'checkpoint' in cfg),
            'init_cfg', init_cfg, expected)


class ConvFFN(nn.Module):
    """Feed-forward network with a depth-wise 3x3 convolution, as in PVTv2.

    Args:
        dims (int): Number of channels.
        hidden_dims (int): Channels of the hidden layer.
        act_cfg (dict): Config of the activation.
        drop (float): Dropout rate.
    """

    def __init__(self, dims: int, hidden_dims: int, act_cfg: dict,
                 drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden_dims)
        self.dwconv = nn.Conv2d(
            hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)
        self.act = build_activation_layer(act_cfg)
        self.fc2 = nn.Linear(hidden_dims, dims)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = self.fc1(x)
        x = to_tokens(self.dwconv(to_map(x, grid)))
        return self.drop(self.fc2(self.drop(self.act(x))))


@contextmanager
def keep_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms inside count no batch: a recomputed one was counted before."""
    norms = [(x, x.momentum, x.num_batches_tracked) for x in module.modules()
             if isinstance(x, _BatchNorm)]
    for norm, *_ in norms:
        norm.momentum, norm.num_batches_tracked = 0., None
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count


class Block(nn.Module):
    """Pre-norm attention and FFN, with the scores passing through beside.

    Args:
        attn (VanillaAttention | LessAttention): The attention.
        dims (int): Number of channels.
        mlp_ratio (float): Width of the FFN's hidden layer over ``dims``.
        norm_cfg (dict): Config of the norms.
        act_cfg (dict): Config of the activation.
        drop (float): Dropout rate of the FFN.
        drop_path (float): Rate of stochastic depth.
        with_cp (bool): Whether to recompute activations in the backward pass.
    """

    def __init__(self, attn: nn.Module, dims: int, mlp_ratio: float,
                 norm_cfg: dict, act_cfg: dict, drop: float, drop_path: float,
                 with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = build_norm_layer(norm_cfg, dims)[1]
        self.attn = attn
        self.norm2 = build_norm_layer(norm_cfg, dims)[1]
        self.ffn = ConvFFN(dims, int(dims * mlp_ratio), act_cfg, drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid,
                scores: LayerScores) -> Tuple[Tensor, LayerScores]:
        """x (B, N, C) and the scores of the layer before."""
        if self.with_cp and x.requires_grad:
            again = {}
            if any(isinstance(module, _BatchNorm) for module in self.modules()):
                again['context_fn'] = lambda: (nullcontext(),
                                               keep_statistics(self))
            return checkpoint(
                self._forward, x, grid, scores, use_reentrant=False, **again)
        return self._forward(x, grid, scores)

    def _forward(self, x, grid, scores):
        z, scores = self.attn(normalise(self.norm1, x, grid), grid, scores)
        x = x + self.drop_path(z)
        z = self.ffn(normalise(self.norm2, x, grid), grid)
        return x + self.drop_path(z), scores


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and a norm, as in PVTv2.

    Args:
        in_channels (int): Channels of the map that comes in.
        dims (int): Channels of the tokens.
        patch_size (int): Kernel size, odd, so that an input of ``n`` rows
            gives ``ceil(n / stride)``.
        stride (int): Stride.
        norm_cfg (dict): Config of the norm.
    """

    def __init__(self, in_channels: int, dims: int, patch_size: int,
                 stride: int, norm_cfg: dict) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, dims, patch_size, stride, padding=patch_size // 2)
        self.norm = build_norm_layer(norm_cfg, dims)[1]

    def forward(self, x: Tensor) -> Tuple[Tensor, Grid]:
        """(B, C_in, H, W) -> (B, h * w, C), (h, w)."""
        x = self.conv(x)
        grid = tuple(x.shape[2:])
        return normalise(self.norm, to_tokens(x), grid), grid


class Stage(nn.Module):
    """Patch embedding, then VA layers, then LA layers.

    Args:
        patch_embed (PatchEmbed): The embedding.
        blocks (Sequence[Block]): The layers.
        dp_layers (Sequence[bool]): For each layer whether the DP loss is on it.
        downsample (AttentionDownsample, optional): Takes the scores of the
            stage before to this stage's first layer. Defaults to None: nothing
            is inherited.
    """

    def __init__(self,
                 patch_embed: PatchEmbed,
                 blocks: Sequence[Block],
                 dp_layers: Sequence[bool],
                 downsample: Optional[AttentionDownsample] = None) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.dp_layers = dp_layers

    def forward(
        self,
        x: Tensor,
        last_scores: Optional[Scores],
        last_grid: Optional[Grid],
        dp_loss: Optional[nn.Module] = None
    ) -> Tuple[Tensor, Scores, Grid, List[Tensor]]:
        """A map (B, C_in, H, W) and the scores that the stage before passes on.

        Returns:
            tuple: Tokens (B, N, C), the scores to pass on, the grid (h, w), and
            if ``dp_loss`` is given, its values for the layers it is on.
        """
        dp_losses = []
        x, grid = self.patch_embed(x)
        scores = LayerScores()
        if self.downsample is not None:
            scores = LayerScores(
                inherited=self.downsample(last_scores, last_grid))
        for i, block in enumerate(self.blocks):
            if isinstance(block.attn, VanillaAttention) and i > 0:
                scores = LayerScores()  # only the first VA layer has a residual
            x, scores = block(x, grid, scores)
            if dp_loss is not None and self.dp_layers[i]:
                args = scores, grid, block.attn.ratio(grid)
                dp_losses.append(
                    checkpoint(dp_loss, *args, use_reentrant=False)
                    if block.with_cp else dp_loss(*args))
        return x, scores.to_next_stage(), grid, dp_losses


@MODELS.register_module()
class LaViT(BaseModule):
    """LaViT backbone, for detection, segmentation and classification.

    Source: "You Only Need Less Attention at Each Stage in Vision Transformers"
    (CVPR 2024, arXiv 2406.00427). Known from the paper: four stages, in each
    ``num_va_layers`` vanilla attention (VA) layers and then less-attention (LA)
    layers ``S_l = Psi(Theta(S_{l-1})^T)^T``; LA-only stages inherit downsampled
    scores, which are a residual where a stage begins with VA. Our choices:
    spatially reduced keys and values, overlapping patches and convolutional
    FFNs as in PVTv2, the presets, Theta and Psi as factored maps that work at
    any input size (see `mmlavit.attention`).

    Args:
        arch (str | dict): 'tiny', 'small', 'base', or a dict with
            ``embed_dims``, ``depths``, ``num_heads`` and ``num_va_layers``, and
            if need be ``mlp_ratios`` (default (4, 4, 4, 4)), ``strides``
            (default (4, 2, 2, 2)) and ``patch_sizes`` (odd, at least the
            strides, default (7, 3, 3, 3)); each with a value for every stage.
            Defaults to 'small'.
        in_channels (int): Channels of the input. Defaults to 3.
        pretrain_img_size (int): Input size in pixels that fixes the base grids
            of Theta and Psi. Keep it when fine-tuning at another size: the
            backbone takes any. Defaults to 224.
        out_indices (Sequence[int]): Stages whose maps are returned, ascending.
            Later stages are not built. Defaults to (0, 1, 2, 3).
        num_va_layers (Sequence[int], optional): Overrides the arch's number of
            VA layers of each stage; equal to ``depths`` there is no LA layer,
            and with ``attn_residual=False`` and ``dp_loss=None`` nothing of
            LaViT's: the all-VA twin. Defaults to None.
        sr_ratios (Sequence[int]): Spatial reduction of keys and values in each
            stage; at stages that inherit scores, ratio times total stride must
            not change. Defaults to (8, 4, 2, 1).
        attn_residual (bool): Whether scores are added across stages where a
            stage begins with VA. LA-only stages inherit them in any case.
            Defaults to True.
        transform (str): What LA layers do with the scores they inherit:
            'token_mix', the method; for ablations 'identity' (plain reuse) or
            're_attention' (plain reuse, and DeepViT's Re-Attention on the
            attention map, which is then built). Defaults to 'token_mix'.
        dp_loss (dict, optional): Arguments of the diagonality-preserving loss
            (`DiagonalityPreservingLoss`), ``dict()`` for its defaults. Models
            of the three toolboxes then have ``loss_dp`` among their training
            losses; at test time, in frozen stages and without gradients it is
            not computed. Defaults to None: off.
        score_path (str): 'materialised': the literal formulas on N x M score
            matrices. 'factored': never builds one; the same values from the
            mixed Q and K. 'auto': factored, but scores inherited across stages,
            whose factors are wide, are built for some queries at a time.
            Defaults to 'auto'.
        max_query_grid (int): Largest side of Psi's base grid, in tokens.
            Defaults to 14.
        max_key_grid (int, optional): Largest side of the key grid, in tokens.
            Where an input would have more keys, tokens are averaged before the
            spatial reduction, in the smallest square windows that suffice, so
            that time is linear in the pixels (our choice). 14 changes nothing up
            to 448 x 448. Weights fit any value that leaves the key grid of
            ``pretrain_img_size`` as it is. Defaults to None: as many keys as
            ``sr_ratios`` leaves.
        value_reduction (str): How LA layers reduce the tokens that their values
            are projected from: 'conv' as VA layers do, or 'pool', means over
            the same windows, without parameters and nearly without cost (our
            choice). Defaults to 'conv'.
        qkv_bias (bool): Whether the q, k, v projections have a bias. Defaults
            to True.
        drop_rate (float): Dropout behind projections and in the FFN. Defaults
            to 0.
        attn_drop_rate (float): Dropout of attention probabilities. Defaults to
            0.
        drop_path_rate (float): Stochastic depth of the last layer, rising
            linearly from 0 at the first. Defaults to 0.
        norm_cfg (dict): Config of norms. Defaults to
            ``dict(type='LN', eps=1e-6)``.
        act_cfg (dict): Config of the FFN's activation. Defaults to
            ``dict(type='GELU')``.
        with_cp (bool): Whether to checkpoint each layer: less memory, more
            time. Defaults to False.
        frozen_stages (int): Stages 0 to this are frozen and in eval mode; -1
            freezes none. Defaults to -1.
        norm_eval (bool): Whether batch norms (if ``norm_cfg`` says so) keep
            their running statistics in training. Defaults to False.
        init_cfg (dict | list[dict], optional): Config of the initialisation on
            top of the default (linear layers truncated normal of std 0.02,
            convolutions normal by fan-out, Theta and Psi the identity).
            Defaults to None.

    Raises:
        TypeError, ValueError: For an argument that cannot work; the message
            names it, its value and what would be right.

    Example:
        >>> import torch
        >>> from mmengine.registry import MODELS
        >>> import mmlavit
        >>> model = MODELS.build(dict(type='LaViT', arch='tiny'))
        >>> maps = model(torch.rand(1, 3, 224, 224))
        >>> [tuple(x.shape) for x in maps]
        [(1, 64, 56, 56), (1, 128, 28, 28), (1, 320, 14, 14), (1, 448, 7, 7)]
    """

    def __init__(self,
                 arch: Union[str, dict] = 'small',
                 in_channels: int = 3,
                 pretrain_img_size: int = 224,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 num_va_layers: Optional[Sequence[int]] = None,
                 sr_ratios: Sequence[int] = (8, 4, 2, 1),
                 attn_residual: bool = True,
                 transform: str = 'token_mix',
                 dp_loss: Optional[dict] = None,
                 score_path: str = 'auto',
                 max_query_grid: int = 14,
                 max_key_grid: Optional[int] = None,
                 value_reduction: str = 'conv',
                 qkv_bias: bool = True,
                 drop_rate: float = 0.,
                 attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0.,
                 norm_cfg: dict = dict(type='LN', eps=1e-6),
                 act_cfg: dict = dict(type='GELU'),
                 with_cp: bool = False,
                 frozen_stages: int = -1,
                 norm_eval: bool = False,
                 init_cfg: Union[dict, Sequence[dict], None] = None) -> None:
        check_init_cfg(init_cfg)
        super().__init__(init_cfg)
        arch = resolve_arch(arch, num_va_layers, sr_ratios)
        sr_ratios = require_ints('sr_ratios', sr_ratios, 1)
        num_stages = len(arch['depths'])
        in_channels = require_int('in_channels', in_channels, 1)
        pretrain_img_size = require_int('pretrain_img_size', pretrain_img_size,
                                        1)
        max_query_grid = require_int('max_query_grid', max_query_grid, 1)
        if max_key_grid is not None:
            max_key_grid = require_int('max_key_grid', max_key_grid, 1)
        frozen_stages = require_int('frozen_stages', frozen_stages, -1,
                                    num_stages - 1)
        for name, flag in dict(
                attn_residual=attn_residual,
                qkv_bias=qkv_bias,
                with_cp=with_cp,
                norm_eval=norm_eval).items():
            require_bool(name, flag)
        for name, rate in dict(
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
                drop_path_rate=drop_path_rate).items():
            require_number(name, rate, 0, 1)
        require_choice('transform', transform, TRANSFORMS)
        require_choice('value_reduction', value_reduction, VALUE_REDUCTIONS)
        require_choice('score_path', score_path, SCORE_PATHS)
        check_layers(norm_cfg, act_cfg, arch['embed_dims'])
        out_indices = require_ints('out_indices', out_indices, 0,
                                    num_stages - 1)
        require(out_indices and list(out_indices) == sorted(set(out_indices)),
                 'out_indices', out_indices,
                 'stage indices, ascending and each once')

        self.arch = arch
        self.in_channels = in_channels
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        embed_dims, depths, strides, heads, va_layers = (
            arch[key] for key in ('embed_dims', 'depths', 'strides',
                                  'num_heads', 'num_va_layers'))
        # From 0 at the first layer to drop_path_rate at the last.
        step = drop_path_rate / max(sum(depths) - 1, 1)
        num_stages = out_indices[-1] + 1
        dp_layers = [False] * sum(depths)
        self.dp_loss = None
        if dp_loss is not None:
            require_keys(
                'dp_loss', dp_loss, (),
                signature(DiagonalityPreservingLoss).parameters)
            self.dp_loss = DiagonalityPreservingLoss(**dp_loss)
            dp_layers = self.dp_loss.select([
                j >= va_layers[i] for i in range(num_stages)
                for j in range(depths[i])
            ])
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            first = sum(depths[:i])
            total_stride = math.prod(strides[:i + 1])
            # Grids of the pre-training size, on which Psi and Theta are learned
            q_side = math.ceil(pretrain_img_size / total_stride)
            q_grid = (q_side, q_side)
            k_grid = pooled_grid(
                q_grid, key_ratio(q_grid, sr_ratios[i], max_key_grid))
            q_side = min(q_side, max_query_grid)
            common = dict(
                dims=embed_dims[i],
                num_heads=heads[i],
                sr_ratio=sr_ratios[i],
                max_key_grid=max_key_grid,
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate,
                norm_cfg=norm_cfg,
                score_path=score_path)
            blocks = []
            for j in range(depths[i]):
                if j < va_layers[i]:
                    attn = VanillaAttention(**common)
                else:
                    attn = LessAttention(
                        **common,
                        reduction=value_reduction,
                        q_base_grid=(q_side, q_side),
                        k_base_grid=k_grid,
                        transform=transform)
                blocks.append(
                    Block(attn, embed_dims[i], arch['mlp_ratios'][i], norm_cfg,
                          act_cfg, drop_rate, step * (first + j),
                          with_cp))
            inherits = i > 0 and (attn_residual or va_layers[i] == 0)
            if inherits:
                last = total_stride // strides[i] * sr_ratios[i - 1]
                require(
                    last == total_stride * sr_ratios[i], 'sr_ratios',
                    sr_ratios,
                    f'stage {i} inherits scores, so its total stride times '
                    f'ratio ({total_stride} x {sr_ratios[i]}) must equal that '
                    f'of stage {i - 1} ({last}), as with (8, 4, 2, 1) at '
                    'strides (4, 2, 2, 2); or set attn_residual=False and begin '
                    'the stage with a VA layer')
            self.stages.append(
                Stage(
                    PatchEmbed(embed_dims[i - 1] if i else in_channels,
                               embed_dims[i], arch['patch_sizes'][i],
                               strides[i], norm_cfg), blocks,
                    dp_layers[first:first + depths[i]],
                    AttentionDownsample(heads[i - 1], heads[i], strides[i])
                    if inherits else None))
            if i in out_indices:
                # On the outputs alone: the trunk itself is pre-norm.
                self.add_module(f'norm{i}',
                                build_norm_layer(norm_cfg, embed_dims[i])[1])
        # As the maps are: no reordering at each call, and gradients laid out as
        # DDP expects them.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        self._freeze()

    def init_weights(self) -> None:
        """Initialises all weights, then as ``init_cfg`` says.

        Raises:
            FileNotFoundError: If a 'Pretrained' checkpoint is a local file
                that does not exist.
            ValueError: If its weights are not of this architecture.
        """
        if self.is_init:
            return
        self.apply(init_module)
        cfgs, paths = self.init_cfg or [], []
        for cfg in [cfgs] if isinstance(cfgs, dict) else cfgs:
            if cfg.get('type') != 'Pretrained':
                continue
            path = cfg['checkpoint']
            if '://' not in path and not os.path.isfile(
                    os.path.expanduser(path)):
                raise FileNotFoundError(
                    f'LaViT: the pre-trained checkpoint {path!r} of init_cfg '
                    'does not exist. Give its path with --cfg-options '
                    'model.backbone.init_cfg.checkpoint=PATH, or train from '
                    'scratch with --cfg-options model.backbone.init_cfg=None')
            paths.append(path)
        try:
            super().init_weights()
        except (AssertionError, ValueError) as error:
            if not paths:
                raise
            raise ValueError(
                f'LaViT: init_cfg: {", ".join(paths)}: {error}') from error

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Images to feature maps.

        Args:
            x (Tensor): (B, in_channels, H, W), floating point. Any H and W of
                at least one pixel: below a stage's stride its map is 1 x 1.
                An empty batch (B = 0) gives empty maps. Values are not
                checked, for that would wait for the GPU at each call: NaN or
                infinite pixels give NaN maps of their image, and of it alone
                (but with batch norms in training).

        Returns:
            tuple[Tensor]: For every stage in ``out_indices`` a map (B, C_i,
            ceil(H / stride_i), ceil(W / stride_i)), contiguous as the input is
            (channels-last if that is).

        Raises:
            ValueError: If ``x`` is not of that shape.
            TypeError: If ``x`` is not floating point, as raw images are not.
        """
        require(
            x.dim() == 4 and x.shape[1] == self.in_channels
            and x.shape[2] > 0 and x.shape[3] > 0, 'x.shape', tuple(x.shape),
            f'(B, {self.in_channels}, H, W), as in_channels='
            f'{self.in_channels}, with H and W of at least 1')
        require_type(x.is_floating_point(), 'x.dtype', x.dtype,
                     'floating point: normalised images, as a data '
                     'preprocessor makes them')
        memory_format = (
            torch.contiguous_format
            if x.is_contiguous() else torch.channels_last)
        # Channels-last maps and tokens share their memory: no copies between.
        x = x.contiguous(memory_format=torch.channels_last)
        outs, dp_losses, scores, grid = [], [], None, None
        for i, stage in enumerate(self.stages):
            x, scores, grid, values = stage(
                x, scores, grid,
                self.dp_loss if stage.training and torch.is_grad_enabled() else
                None)
            dp_losses.append(values)
            if i in self.out_indices:
                out = normalise(getattr(self, f'norm{i}'), x, grid)
                outs.append(
                    to_map(out, grid).contiguous(memory_format=memory_format))
            x = to_map(x, grid)
        if any(dp_losses):
            self.dp_loss.hold(dp_losses)
        return tuple(outs)

    def train(self, mode: bool = True) -> 'LaViT':
        """Sets the mode; frozen stages stay in eval mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        for i, stage in enumerate(self.stages[:self.frozen_stages + 1]):
            for module in (stage, getattr(self, f'norm{i}', None)):
                if module is not None:
                    module.eval().requires_grad_(False)

    def _load_from_state_dict(self, state_dict, prefix, *args,
                              **kwargs) -> None:
        """Refuses the weights of another architecture instead of skipping."""
        own = self.state_dict()
        given = {
            name[len(prefix):]: value
            for name, value in state_dict.items() if name.startswith(prefix)
        }
        wrong = [
            f'{name} is {tuple(given[name].shape)} in the checkpoint, '
            f'{tuple(value.shape)} here' for name, value in own.items()
            if name in given and given[name].shape != value.shape
        ]
        here, there = self._blocks(own), self._blocks(given)
        if given:  # else they are of other parts of the model
            wrong += [f'{block} is not in the checkpoint'
                      for block in here if block not in there]
            wrong += [f'{block} is in the checkpoint alone'
                      for block in there if block not in here]
        if wrong:
            raise ValueError(
                f'LaViT: these are not the weights of this LaViT: {len(wrong)} '
                f'differences, {"; ".join(wrong[:3])}. ' +
                (f'The checkpoint begins with {next(iter(given))!r}; with that '
                 "of a whole model, set init_cfg's prefix='backbone.'"
                 if not there else 'Check arch, in_channels, '
                 'pretrain_img_size and max_query_grid'))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _blocks(self, names) -> List[str]:
        """The layers, of the stages that are built, that have these weights."""
        found = (re.match(r'stages\.(\d+)\.blocks\.\d+', name)
                 for name in names)
        return list(
            dict.fromkeys(match[0] for match in found
                          if match and int(match[1]) < len(self.stages)))
