"""LaViT: Less-Attention Vision Transformer (CVPR 2024, arXiv 2406.00427)."""
import math
import os
import re
from typing import List, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from ...utils.checks import (require, require_bool, require_int, require_ints,
                             require_number, require_type)
from ...utils.weights import compare_weights
from ..layers.block import Stage
from ..layers.grid import to_map
from ..layers.mixing import DEFAULT_RANK
from ..losses.dp_loss import build_dp_loss, select_layers
from .arch import (check_init_cfg, check_layer_options, check_out_indices,
                   is_less_attention, is_pretrained, plan_stages, resolve_arch)
from .maps import MapBackbone
from .pvt_weights import (for_less_attention, naming_of, to_lavit_names,
                          weights_in)


def init_module(module: nn.Module) -> None:
    """Linear, convolution and norm weights as PVT and Swin begin with them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels
        nn.init.normal_(module.weight, 0,
                        math.sqrt(2 * module.groups / fan_out))
    elif isinstance(module, (nn.LayerNorm, _BatchNorm, nn.GroupNorm)):
        if module.weight is not None:  # affine=False
            nn.init.ones_(module.weight)
    if getattr(module, 'bias', None) is not None:
        nn.init.zeros_(module.bias)


@WEIGHT_INITIALIZERS.register_module()
class LaViTInit:
    """The default initialisation, which mmengine runs and logs as its own."""

    def __call__(self, module: nn.Module) -> None:
        module.apply(init_module)
        known = getattr(module, '_params_init_info', {})
        for parameter in module.parameters() if known else ():
            known[parameter].update(
                init_info='LaViTInit: linear layers truncated normal of std 0.02, '
                'convolutions normal by fan-out, biases 0, norms and the maps of '
                'scores the identity',
                tmp_mean_value=parameter.data.mean().cpu())


@MODELS.register_module()
class LaViT(MapBackbone, BaseModule):
    """LaViT backbone, for detection, segmentation and classification.

    Source: "You Only Need Less Attention at Each Stage in Vision Transformers"
    (CVPR 2024, arXiv 2406.00427). Known from the paper: four stages, in each
    ``num_va_layers`` vanilla attention (VA) layers and then less-attention (LA)
    layers ``S_l = Psi(Theta(S_{l-1})^T)^T``; LA-only stages inherit downsampled
    scores, which are a residual where a stage begins with VA. Our choices:
    spatially reduced keys and values, overlapping patches and convolutional
    FFNs as in PVTv2, the presets, Theta and Psi as factored maps that work at
    any input size (see `mmlavit.models.layers`).

    Args:
        arch (str | dict): 'nano' (our choice), 'tiny', 'small', 'base';
            'pvtv2_b0' to 'pvtv2_b5', less attention in PVTv2's layout, which its
            weights fit; or a dict with ``embed_dims``, ``depths``, ``num_heads``
            and ``num_va_layers``, and if need be ``mlp_ratios`` (default
            (4, 4, 4, 4)), ``strides`` (default (4, 2, 2, 2)) and ``patch_sizes``
            (odd, at least the strides, default (7, 3, 3, 3)), each with a value
            for every stage, and the flags ``trunk_norm`` (default True) and ``attn_residual``
            (default True). Defaults to 'small'.
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
        attn_residual (bool, optional): Whether scores are added across stages
            where a stage begins with VA. LA-only stages inherit them in any case.
            Defaults to None: as ``arch`` says, True but in PVTv2's presets.
        trunk_norm (bool, optional): Whether the norm at the end of each stage is
            in the trunk, as in PVTv2: the next stage and the output see its
            result. Else only the output does. Defaults to None: as ``arch`` says,
            True in all presets.
        transform (str): What LA layers do with the scores they inherit:
            'token_mix', the method; for ablations 'identity' (plain reuse) or
            're_attention' (plain reuse, and DeepViT's Re-Attention on the
            attention map, which is then built). Defaults to 'token_mix'.
        mixing (str): Theta and Psi: 'full', matrices of all tokens of the base
            grid, or 'low_rank', ``I + U V^T / sqrt(n rank)``, bounded as 'full' is and
            cheaper (our choice). Defaults to 'full'.
        mixing_rank (int): Columns of U and V of 'low_rank'. Defaults to 16.
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
            convolutions normal by fan-out, Theta and Psi the identity), which
            ``init_weights()`` does. The toolboxes' runners call it. Defaults to
            None.

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
                 attn_residual: Optional[bool] = None,
                 trunk_norm: Optional[bool] = None,
                 transform: str = 'token_mix',
                 mixing: str = 'full',
                 mixing_rank: int = DEFAULT_RANK,
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
        # Check
        init_cfgs = check_init_cfg(init_cfg)
        super().__init__([dict(type='LaViTInit'), *init_cfgs])
        arch = resolve_arch(arch, num_va_layers, sr_ratios, attn_residual,
                            trunk_norm)
        num_stages = len(arch['depths'])
        out_indices = check_out_indices(out_indices, num_stages)
        self.arch = arch
        self.in_channels = require_int('in_channels', in_channels, 1)
        self.out_indices = out_indices
        self.frozen_stages = require_int('frozen_stages', frozen_stages, -1,
                                         num_stages - 1)
        self.norm_eval = require_bool('norm_eval', norm_eval)
        layer_options = check_layer_options(
            max_key_grid=max_key_grid,
            qkv_bias=qkv_bias,
            value_reduction=value_reduction,
            transform=transform,
            mixing=mixing,
            mixing_rank=mixing_rank,
            score_path=score_path,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            with_cp=with_cp)
        # Plan
        self.dp_loss = build_dp_loss(dp_loss)
        require(
            transform == 'token_mix' or getattr(self.dp_loss, 'form', '') != 'preserve',
            'dp_loss', dp_loss,
            f"None, or form='bounded', with transform={transform!r}: the default form is "
            'a loss on Theta and Psi, which it lacks')
        stages = plan_stages(
            arch,
            out_indices,
            dp_layers=select_layers(
                self.dp_loss, is_less_attention(arch, out_indices[-1] + 1)),
            in_channels=self.in_channels,
            pretrain_img_size=require_int('pretrain_img_size',
                                          pretrain_img_size, 1),
            sr_ratios=require_ints('sr_ratios', sr_ratios, 1),
            max_query_grid=require_int('max_query_grid', max_query_grid, 1),
            max_key_grid=layer_options['max_key_grid'],
            drop_path_rate=require_number('drop_path_rate', drop_path_rate, 0, 1))
        # Build
        self.stages = nn.ModuleList(
            Stage(**stage._asdict(), **layer_options) for stage in stages)
        # As the maps are: no reordering at each call, and gradients laid out as
        # DDP expects them.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        self._freeze()

    def stage_channels(self) -> Sequence[int]:
        """As `MapBackbone`."""
        return self.arch['embed_dims']

    def maps_have_norms(self) -> bool:
        """As `MapBackbone`."""
        return not self.arch['trunk_norm']

    def init_weights(self) -> None:
        """Initialises all weights, then as ``init_cfg`` says.

        Raises:
            FileNotFoundError: If a 'Pretrained' checkpoint is a local file
                that does not exist.
            ValueError: If its weights have other layers or shapes. For layers that
                have less attention in one of the two alone mmengine's warning of
                missing keys is all.
        """
        if self.is_init:
            return
        paths = [cfg['checkpoint'] for cfg in check_init_cfg(self.init_cfg)
                 if is_pretrained(cfg)]
        for path in paths:
            if '://' not in path and not os.path.isfile(
                    os.path.expanduser(path)):
                raise FileNotFoundError(
                    f'LaViT: the pre-trained checkpoint {path!r} of init_cfg '
                    'does not exist. Give its path with --cfg-options '
                    'model.backbone.init_cfg.checkpoint=PATH, or train from '
                    'scratch with --cfg-options model.backbone.init_cfg=None')
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
            ceil(H / stride_i), ceil(W / stride_i)), contiguous if the input is,
            else channels-last.

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
        outs, dp_losses, last = [], [], None
        for i, stage in enumerate(self.stages):
            trains = stage.training and torch.is_grad_enabled()
            last = stage(x, last, self.dp_loss if trains else None)
            dp_losses.append(last.dp_losses)
            if i in self.out_indices:
                out = to_map(last.output, last.grid)
                outs.append(out.contiguous(memory_format=memory_format))
            x = to_map(last.tokens, last.grid)
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
        for stage in self.stages[:self.frozen_stages + 1]:
            stage.eval().requires_grad_(False)

    def _load_from_state_dict(self, state_dict, prefix, *args,
                              **kwargs) -> None:
        """Converts PVTv2's weights; refuses those of another architecture."""
        given = {
            name[len(prefix):]: value
            for name, value in state_dict.items() if name.startswith(prefix)
        }
        # The authors' files may hold more than weights.
        if naming_of(weights_in(given)) is not None:
            given = self._from_pvt(weights_in(given))
            for name in [n for n in state_dict if n.startswith(prefix)]:
                del state_dict[name]
            state_dict.update({f'{prefix}{n}': x for n, x in given.items()})
        self._check_weights(given)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_layer_depth(self, param_name: str,
                        prefix: str = '') -> Tuple[int, int]:
        """How deep a parameter lies, for a learning rate that decays by layer.

        mmpretrain's ``LearningRateDecayOptimWrapperConstructor`` and our
        ``MergedGroupsConstructor`` ask for it. Our choice: what a stage begins
        with (patches, inherited scores) counts to its first layer, but for the
        first stage's patches, which lie below all layers; the norm behind a
        stage counts to its last layer.

        Args:
            param_name (str): Name of the parameter in a model.
            prefix (str): Of the backbone's own parameters there. Defaults to ''.

        Returns:
            tuple[int, int]: The depth, from 0, the first patches, to that of
            whatever follows the backbone; and the number of depths.
        """
        depths = self.arch['depths'][:len(self.stages)]
        behind = sum(depths) + 1
        found = re.match(rf'{re.escape(prefix)}stages\.(\d+)\.(\w+)\.(\d*)',
                         param_name)
        if found is None:
            return behind, behind + 1
        stage, part = int(found[1]), found[2]
        first = sum(depths[:stage]) + 1
        if part == 'blocks':
            depth = first + int(found[3])
        elif part == 'norm':
            depth = first + depths[stage] - 1
        else:
            depth = 0 if part == 'patch_embed' and stage == 0 else first
        return depth, behind + 1

    def less_attention_layers(self) -> List[str]:
        """Names of the LA layers, as 'stages.2.blocks.1'."""
        return [
            f'stages.{i}.blocks.{j}' for i, stage in enumerate(self.stages)
            for j, layer in enumerate(stage.layers) if layer.kind == 'LA'
        ]

    def _from_pvt(self, weights: dict) -> dict:
        """PVTv2's weights for these layers; says what is dropped."""
        naming, weights = to_lavit_names(weights)
        weights, dropped = for_less_attention(weights,
                                              self.less_attention_layers())
        MMLogger.get_current_instance().info(
            f"LaViT: PVTv2's weights, named as those of {naming}. Less attention has "
            f'no Q and K: those of {", ".join(dropped) or "no layer"} are dropped, and '
            'Theta and Psi begin at the identity.')
        return {
            name: x for name, x in weights.items()
            if int(name.split('.')[1]) < len(self.stages)
        }

    def _check_weights(self, given: dict) -> None:
        """Raises ValueError if these are not the weights of this architecture."""
        own = self.state_dict()
        here, there = self._blocks(own), self._blocks(given)
        old = [name for name in given
               if there and re.fullmatch(r'norm\d\.weight', name)]
        require(
            not old, 'checkpoint', old,
            'weights of mmlavit 0.2 or later. These are older: the norms of their '
            'maps lie outside of the stages, and their token mixing has no '
            'bounded gain. Train anew')
        wrong = compare_weights(given, own).sizes
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
                 if not any(name.startswith('stages.') for name in given)
                 else 'Check arch, in_channels, '
                 'pretrain_img_size and max_query_grid'))

    def _blocks(self, names) -> List[str]:
        """The layers, of the stages that are built, that have these weights."""
        found = (re.match(r'stages\.(\d+)\.blocks\.\d+', name)
                 for name in names)
        return list(
            dict.fromkeys(match[0] for match in found
                          if match and int(match[1]) < len(self.stages)))
