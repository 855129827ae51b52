"""Norms and activations of tokens, built from configs."""
from typing import Callable

import torch
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.utils.dl_utils.parrots_wrapper import (_BatchNorm,
                                                       _InstanceNorm)
from torch import Tensor, nn

from ...utils.checks import require, require_type
from .grid import Grid, to_map, to_tokens


def normalise(norm: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """Applies a norm to tokens; batch, instance and group norms see a map."""
    if isinstance(norm, (_BatchNorm, _InstanceNorm, nn.GroupNorm)):
        return to_tokens(norm(to_map(x, grid)))
    return norm(x)


def build_norm(norm_cfg: dict, dims: int) -> nn.Module:
    """The norm of ``dims`` channels, tried on tokens.

    Raises:
        TypeError, ValueError: If ``norm_cfg`` is no config of a norm of tokens.
    """
    grid = 2, 2  # some norms refuse the statistics of a single position
    return build_tried(
        'norm_cfg', norm_cfg,
        f"a norm that fits {dims} channels: 'LN', 'BN', 'GN' ...", dims,
        lambda: build_norm_layer(norm_cfg, dims)[1],
        lambda norm, tokens: normalise(norm, tokens, grid))


def build_activation(act_cfg: dict, dims: int) -> nn.Module:
    """The activation, tried on tokens of ``dims`` channels.

    Raises:
        TypeError, ValueError: If ``act_cfg`` is no config of an activation.
    """
    return build_tried('act_cfg', act_cfg, "an activation: 'GELU', 'ReLU' ...",
                       dims, lambda: build_activation_layer(act_cfg),
                       lambda act, tokens: act(tokens))


def build_tried(name: str, cfg: dict, expected: str, dims: int,
                build: Callable[[], nn.Module],
                apply: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A layer that has been applied to tokens once.

    A trial, for the registries hold more layers than a list here could name.
    """
    expected = f'a dict with the type of {expected}'
    require_type(isinstance(cfg, dict), name, cfg, expected)
    tokens = torch.ones(1, 4, dims)
    try:
        layer = build()
        training = layer.training
        with torch.no_grad():
            ok = apply(layer.eval(), tokens).shape == tokens.shape
        why = 'another shape comes out'
    except Exception as error:  # whatever the layer may raise
        ok, why = False, error
    require(ok, name, cfg, f'{expected}; tried: {why}')
    return layer.train(training)
