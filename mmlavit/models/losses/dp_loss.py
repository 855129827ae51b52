"""The diagonality-preserving (DP) loss of a backbone.

Known from the paper: a loss on the scores of the less-attention layers, added
to the task loss, that keeps (1) symmetry ``A_ij = A_ji`` and (2) a dominant
diagonal ``A_ii > A_ij``; without it less attention costs accuracy. Our choice:
everything else, see `DiagonalityPreservingLoss`.

A backbone returns maps, not losses, so it holds the loss of a forward until the
training loss takes it: `LossAccumulator`. `mmlavit.engine.dp_loss` does that in
the models of the toolboxes.
"""
import warnings
from inspect import signature
from typing import List, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from torch import Tensor, nn

from ...utils.checks import (require, require_choice, require_int, require_ints,
                             require_keys, require_number, require_type)
from ..layers.grid import Grids
from ..layers.scores import LayerScores
from ..layers.tracing import is_compiling

FORMS = ('preserve', 'bounded', 'paper')
# Side of the grid of regions that maps are compared on: larger regions where there
# are more keys, so that the loss stays cheap for large images (our choice).
MAX_REGION_GRID = 14


class LossAccumulator(nn.Module):
    """Holds the losses of a backbone's forwards until the training loss takes them.

    Between `begin` and `end`, which frame a model's forward, all of them: a model
    may run its backbone several times for one loss. Else only the last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: List[Tensor] = []
        self.collects = False

    def begin(self) -> None:
        """A model's forward begins."""
        self.values, self.collects = [], True

    def end(self) -> None:
        """A model's forward ends."""
        self.collects = False

    def add(self, value: Tensor) -> None:
        """Holds the loss of one forward of the backbone."""
        if not self.collects:
            if not is_compiling() and self.values:
                warnings.warn(
                    'LaViT: the DP loss of the last forward reached no training '
                    'loss. Add `backbone.dp_loss.take()` to it, or set dp_loss=None')
            self.values = []
        self.values = [*self.values, value]

    def pop(self) -> Optional[Tensor]:
        """The sum of what is held, once; None if there is nothing."""
        values, self.values = self.values, []
        return sum(values) if values else None

    def __getstate__(self) -> dict:
        # A value has a graph, which can be neither copied nor pickled.
        return {**self.__dict__, 'values': [], 'collects': False}


@MODELS.register_module()
class DiagonalityPreservingLoss(LossAccumulator):
    """DP loss on region-level scores.

    The queries are averaged over the region of each key, so that scores are a
    square matrix S over M regions at any spatial reduction, of size
    (heads, M, M); beyond 14 x 14 keys a region is that of several. With
    ``A = softmax(S)``:

    - ``form='preserve'``: what a less-attention layer loses of the two properties
      that the map it inherits has. ``symmetry_weight * max(0, a - a') +
      diagonal_weight * max(0, d - d')``, where ``a = mean_i sum_j |A_ij - A_ji|``
      and ``d = mean_i sum_j max(0, A_ij - A_ii)``, and a', d' are those of the
      inherited map; averaged over heads and images, then over the layers of a
      stage, then over stages. **Gradients reach Theta and Psi alone**: through the
      inherited Q and K, every form flattens the vanilla attention that they come
      from (measured, see docs/reports/dp_loss.md). Between 0 and
      ``2 * symmetry_weight + diagonal_weight`` before ``loss_weight``.
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
        form (str): 'preserve', 'bounded' or 'paper'. Defaults to 'preserve'.
        loss_weight (float): Weight of the whole. Defaults to 0.1.
        symmetry_weight (float): Weight of condition (1). Defaults to 1.
        diagonal_weight (float): Weight of condition (2). Defaults to 1.
        margin (float): Of form 'bounded': by how much the diagonal is to exceed
            the other entries, in units of their mean 1 / M. Defaults to 0.
        layers (str | Sequence[int]): 'la' (less-attention layers, as the paper
            does), 'all', or indices of layers counted from 0 through all
            stages. 'preserve' takes LA layers alone. Defaults to 'la'.
        warmup_iters (int): The weight rises linearly from 0 over this many
            training iterations of the runner; 0 for none. Defaults to 0.

    Raises:
        TypeError, ValueError: For an argument that cannot work.
    """

    def __init__(self,
                 form: str = 'preserve',
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
                f'0, for form={form!r} has no margin')
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

    def select(self, is_la: Sequence[bool]) -> List[bool]:
        """Which of the layers, in order, the loss is on.

        Raises:
            ValueError: If there is no such layer.
        """
        preserves = self.form == 'preserve'
        if self.layers == 'all':
            require(
                all(is_la) or not preserves, 'dp_loss.layers', self.layers,
                "less-attention layers, for form='preserve' compares with what a "
                "layer inherits; or form='bounded'")
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
        require(
            all(is_la[i] for i in self.layers) or not preserves,
            'dp_loss.layers', self.layers,
            "indices of less-attention layers, for form='preserve' compares with "
            f'what a layer inherits: {[i for i, la in enumerate(is_la) if la]}')
        return [i in self.layers for i in range(len(is_la))]

    def forward(self, scores: LayerScores, grids: Grids,
                inherited: LayerScores, attn: nn.Module) -> Tensor:
        """The loss of one layer, unweighted; float32 under autocast too.

        Args:
            scores (LayerScores): The layer's scores.
            grids (Grids): Their grids of queries and keys.
            inherited (LayerScores): The scores that the layer was given.
            attn (nn.Module): The layer's attention. Of one with less attention
                ``transform_scores`` makes the scores from the inherited ones.
        """
        if self.form == 'preserve':
            inherited = inherited.detach()
            scores = attn.transform_scores(inherited, grids)
        with torch.autocast(scores.device.type, enabled=False):
            s = self.region_scores(scores, grids)
            if self.form == 'preserve':
                return self.lost(s, self.region_scores(inherited, grids))
            return self.on_scores(s)

    @staticmethod
    def region_scores(scores: LayerScores, grids: Grids) -> Tensor:
        """Raw scores between regions, (B, heads, M, M)."""
        factor = -(-max(grids.keys) // MAX_REGION_GRID)
        return scores.between_regions(grids, factor).dense()

    def lost(self, s: Tensor, inherited: Tensor) -> Tensor:
        """What raw scores (B, heads, M, M) lose against those they come from."""
        here, there = self.violations(s), self.violations(inherited)
        lost = [(x - y).relu() for x, y in zip(here, there)]  # (B, heads) each
        total = self.symmetry_weight * lost[0] + self.diagonal_weight * lost[1]
        return total.sum() / max(total.numel(), 1)

    @staticmethod
    def violations(s: Tensor) -> Tuple[Tensor, Tensor]:
        """Of both conditions by the maps of raw scores: (B, heads) each."""
        a = s.softmax(dim=-1)
        diagonal = a.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        return ((a - a.mT).abs().sum(dim=-1).mean(dim=-1),
                (a - diagonal).relu().sum(dim=-1).mean(dim=-1))

    def on_scores(self, s: Tensor) -> Tensor:
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
        """Holds a forward's total of the layers' losses, a list a stage."""
        stages = [torch.stack(losses) for losses in stages if losses]
        if self.form != 'paper':
            self.add(torch.stack([x.mean() for x in stages]).mean())
        else:
            self.add(torch.cat(stages).sum())

    def take(self) -> Optional[Tensor]:
        """The weighted loss of the backbone's last training forward.

        Their sum, where a model runs its backbone several times for one loss.
        None if there is none or it was taken already. For training loops of
        one's own; models of the three toolboxes do it by themselves.
        """
        value = self.pop()
        if value is None:
            return None
        weight = self.loss_weight
        iteration = MessageHub.get_current_instance().get_info('iter')
        if self.warmup_iters and iteration is not None:
            weight *= min(1, (iteration + 1) / self.warmup_iters)
        return weight * value

    def extra_repr(self) -> str:
        return (f'form={self.form!r}, loss_weight={self.loss_weight}, '
                f'margin={self.margin}, layers={self.layers!r}')


def build_dp_loss(cfg: Optional[dict]) -> Optional[DiagonalityPreservingLoss]:
    """The loss of a backbone's ``dp_loss``; None for None.

    Raises:
        TypeError, ValueError: For an argument that is unknown or cannot work.
    """
    if cfg is None:
        return None
    require_keys('dp_loss', cfg, (),
                 signature(DiagonalityPreservingLoss).parameters)
    return DiagonalityPreservingLoss(**cfg)


def select_layers(dp_loss: Optional[DiagonalityPreservingLoss],
                  is_la: Sequence[bool]) -> List[bool]:
    """For each layer whether the loss, if any, is on it."""
    return [False] * len(is_la) if dp_loss is None else dp_loss.select(is_la)
