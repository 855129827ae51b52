"""The way of a backbone's DP loss into every training loss.

A backbone returns maps, not losses. So that no user has to name another detector,
segmentor or classifier, each `mmengine.model.BaseModel` that is given a module with
a DP loss inside gets a forward hook that adds ``loss_dp`` to the dict of losses it
returns. As part of that output it passes through DDP, gradient scaling and
accumulation like any other loss.
"""
from typing import Iterator, Optional

from mmengine.model import BaseModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..models.losses.dp_loss import DiagonalityPreservingLoss


def dp_losses_in(model: nn.Module) -> Iterator[DiagonalityPreservingLoss]:
    return (module for module in model.modules()
            if isinstance(module, DiagonalityPreservingLoss))


def collect_dp_losses(model: nn.Module, inputs: tuple) -> None:
    """Forward pre-hook: a new loss begins."""
    if not model.training:
        return
    for dp_loss in dp_losses_in(model):
        dp_loss.begin()


def add_dp_loss(model: nn.Module, inputs: tuple, losses):
    """Forward hook: adds ``loss_dp`` to a dict of losses."""
    if not model.training:
        return None
    dp_losses = list(dp_losses_in(model))
    for dp_loss in dp_losses:
        dp_loss.end()
    if not isinstance(losses, dict):
        return None  # who asked for it takes the loss
    values = [dp_loss.take() for dp_loss in dp_losses]
    values = [value for value in values if value is not None]
    if not values:
        return None
    losses = dict(losses)
    if 'loss' in losses:
        # As mmpretrain's heads call theirs: in the log it would hide the total.
        losses['loss_task'] = losses.pop('loss')
    losses['loss_dp'] = sum(values)
    return losses


def attach(parent: nn.Module, name: str, child: Optional[nn.Module]) -> None:
    """Registration hook: a model with a DP loss inside adds it to its losses."""
    if (isinstance(parent, BaseModel) and child is not None
            and add_dp_loss not in parent._forward_hooks.values()
            and any(dp_losses_in(child))):
        parent.register_forward_pre_hook(collect_dp_losses)
        parent.register_forward_hook(add_dp_loss)


def install() -> None:
    """Every module registered from now on is looked into for a DP loss."""
    register_module_module_registration_hook(attach)
