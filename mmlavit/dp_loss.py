"""The diagonality-preserving (DP) loss, and its way into every training loss.

Known from the paper: a loss on the scores of the less-attention layers, added
to the task loss, that keeps (1) symmetry ``A_ij = A_ji`` and (2) a dominant
diagonal ``A_ii > A_ij``; without it less attention costs accuracy. Our choice:
everything else, see `DiagonalityPreservingLoss`.

A backbone returns maps, not losses. So that no user has to name another
detector, segmentor or classifier, each `mmengine.model.BaseModel` that is given
a module with a DP loss inside gets a forward hook that adds ``loss_dp`` to the
dict of losses it returns. As part of that output it passes through DDP,
gradient scaling and accumulation like any other loss.
"""
import warnings
from typing import Iterator, List, Optional, Sequence, Union

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .attention import Grid, LayerScores, is_compiling
from .checks import (require, require_choice, require_int, require_ints,
                     require_number, require_type)

FORMS = ('bounded', 'paper')


@MODELS.register_module()
class DiagonalityPreservingLoss(nn.Module):
    """DP loss on region-level scores.

    The queries are averaged over the region of each key, so that scores are a
    square matrix S over M regions at any spatial reduction, of size
    (heads, M, M). With ``A = softmax(S)``:

    - ``form='bounded'``: ``symmetry_weight * sum_j |A_ij - A_ji| +
      diagonal_weight * sum_{j != i} max(0, A_ij - A_ii + margin / M)``, averaged
      over rows, heads and images, then over the layers of a stage, then over
      stages: every stage weighs the same, whatever its size. Non-negative, at
      most ``2 * symmetry_weight + (1 + margin) * diagonal_weight`` before
      ``loss_weight``. Without a margin the uniform map, in which nothing
      dominates, has no loss.
    - ``form='paper'``: ``symmetry_weight * sum_ij |S_ij - S_ji| +
      diagonal_weight * sum_ij (S_ij - S_ii)``, averaged over heads and images,
      summed over layers; the sign is the one that makes the diagonal dominant.
      It weighs large maps more and its second term is unbounded below: it
      can swamp the task loss and diverge. For comparisons.

    Args:
        form (str): 'bounded' or 'paper'. Defaults to 'bounded'.
        loss_weight (float): Weight of the whole. Defaults to 0.1.
        symmetry_weight (float): Weight of condition (1). Defaults to 1.
        diagonal_weight (float): Weight of condition (2). Defaults to 1.
        margin (float): Of form 'bounded': by how much the diagonal is to exceed
            the other entries, in units of their mean 1 / M. Defaults to 0.
        layers (str | Sequence[int]): 'la' (less-attention layers, as the paper
            does), 'all', or indices of layers counted from 0 through all
            stages. Defaults to 'la'.
        warmup_iters (int): The weight rises linearly from 0 over this many
            training iterations of the runner; 0 for none. Defaults to 0.

    Raises:
        TypeError, ValueError: For an argument that cannot work.
    """

    def __init__(self,
                 form: str = 'bounded',
                 loss_weight: float = 0.1,
                 symmetry_weight: float = 1.,
                 diagonal_weight: float = 1.,
                 margin: float = 0.,
                 layers: Union[str, Sequence[int]] = 'la',
                 warmup_iters: int = 0) -> None:
        super().__init__()
        require_choice('dp_loss.form', form, FORMS)
        for name, weight in dict(
                loss_weight=loss_weight,
                symmetry_weight=symmetry_weight,
                diagonal_weight=diagonal_weight,
                margin=margin).items():
            require_number(f'dp_loss.{name}', weight, 0)
        require(form == 'bounded' or margin == 0, 'dp_loss.margin', margin,
                "0, for form='paper' has no margin")
        warmup_iters = require_int('dp_loss.warmup_iters', warmup_iters, 0)
        choices = "'la', 'all' or a sequence of layer indices"
        if isinstance(layers, str):
            require(layers in ('la', 'all'), 'dp_loss.layers', layers, choices)
        else:
            require_type(
                isinstance(layers, (list, tuple)), 'dp_loss.layers', layers,
                choices)
            layers = require_ints('dp_loss.layers', layers, 0)
        self.form = form
        self.loss_weight = loss_weight
        self.symmetry_weight = symmetry_weight
        self.diagonal_weight = diagonal_weight
        self.margin = margin
        self.layers = layers
        self.warmup_iters = warmup_iters
        # Of the forwards since the model's last training loss began.
        self.values: List[Tensor] = []
        self.collects = False  # within a model's forward: all of them

    def select(self, is_la: Sequence[bool]) -> List[bool]:
        """Which of the layers, in order, the loss is on.

        Raises:
            ValueError: If there is no such layer.
        """
        if self.layers == 'all':
            return [True] * len(is_la)
        if self.layers == 'la':
            require(
                any(is_la), 'dp_loss.layers', 'la',
                'a backbone with less-attention layers; without any set '
                "dp_loss=None, or layers='all' for vanilla attention too")
            return list(is_la)
        require(
            self.layers and max(self.layers) < len(is_la), 'dp_loss.layers',
            self.layers, f'indices of layers from 0 to {len(is_la) - 1}')
        return [i in self.layers for i in range(len(is_la))]

    def forward(self, scores: LayerScores, grid: Grid, ratio: int) -> Tensor:
        """The loss of one layer, unweighted; float32 under autocast too.

        Args:
            scores (LayerScores): The layer's scores.
            grid (tuple[int, int]): Grid of its queries.
            ratio (int): Spatial reduction from queries to keys.
        """
        with torch.autocast(scores.device.type, enabled=False):
            return self.of_matrix(scores.pool_queries(grid, ratio).dense())

    def of_matrix(self, s: Tensor) -> Tensor:
        """The loss of square raw scores (B, heads, M, M)."""
        a = s.softmax(dim=-1) if self.form == 'bounded' else s
        diagonal = a.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        margin = self.margin / s.shape[-1]
        excess = a - diagonal + margin
        if self.form == 'bounded':
            excess = excess.relu()
        rows = (
            self.symmetry_weight * (a - a.mT).abs().sum(dim=-1) +
            # but for the diagonal itself, which is the margin
            self.diagonal_weight * (excess.sum(dim=-1) - margin))
        # (B, heads, M)
        if self.form == 'paper':
            rows = rows.sum(dim=-1)
        # The mean, and 0 for an empty batch.
        return rows.sum() / max(rows.numel(), 1)

    def hold(self, stages: Sequence[Sequence[Tensor]]) -> None:
        """Keeps a forward's total of the layers' losses, a list a stage.

        Outside of a model that collects them only the last one is kept.
        """
        if not self.collects:
            if not is_compiling() and self.values:
                warnings.warn(
                    'LaViT: the DP loss of the last forward reached no training '
                    'loss. Add `backbone.dp_loss.take()` to it, or set dp_loss=None')
            self.values = []
        stages = [torch.stack(losses) for losses in stages if losses]
        if self.form == 'bounded':
            value = torch.stack([x.mean() for x in stages]).mean()
        else:
            value = torch.cat(stages).sum()
        self.values = [*self.values, value]

    def take(self) -> Optional[Tensor]:
        """The weighted loss of the backbone's last training forward.

        Their sum, where a model runs its backbone several times for one loss.
        None if there is none or it was taken already. For training loops of
        one's own; models of the three toolboxes do it by themselves.
        """
        values, self.values = self.values, []
        if not values:
            return None
        weight = self.loss_weight
        iteration = MessageHub.get_current_instance().get_info('iter')
        if self.warmup_iters and iteration is not None:
            weight *= min(1, (iteration + 1) / self.warmup_iters)
        return weight * sum(values)

    def __getstate__(self) -> dict:
        # A value has a graph, which can be neither copied nor pickled.
        return {**self.__dict__, 'values': [], 'collects': False}

    def extra_repr(self) -> str:
        return (f'form={self.form!r}, loss_weight={self.loss_weight}, '
                f'margin={self.margin}, layers={self.layers!r}')


def dp_losses_in(model: nn.Module) -> Iterator[DiagonalityPreservingLoss]:
    return (module for module in model.modules()
            if isinstance(module, DiagonalityPreservingLoss))


def collect_dp_losses(model: nn.Module, inputs: tuple) -> None:
    """Forward pre-hook: a new loss begins."""
    if not model.training:
        return
    for dp_loss in dp_losses_in(model):
        dp_loss.values, dp_loss.collects = [], True


def add_dp_loss(model: nn.Module, inputs: tuple, losses):
    """Forward hook: adds ``loss_dp`` to a dict of losses."""
    if not model.training:
        return None
    values = []
    for dp_loss in dp_losses_in(model):
        dp_loss.collects = False
        values.append(dp_loss.take())
    values = [value for value in values if value is not None]
    if not isinstance(losses, dict) or not values:
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


register_module_module_registration_hook(attach)
