"""How scores pass between layers whose forward hands on tokens only."""
from typing import Callable, Dict, Hashable, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..models.layers.grid import Grid, Grids
from ..models.layers.scores import FactoredScores, LayerScores


class Handed(NamedTuple):
    """What a layer hands on."""
    scores: LayerScores
    grids: Grids


class Done(NamedTuple):
    """What a layer's attention leaves behind."""
    inherited: Optional[LayerScores]  # on the layer's grids
    scores: Optional[LayerScores]
    attention: Optional[Tensor]  # the map, of attentions that build it anyway


# Objects hold scores as plain tuples: torch.compile (2.11) cannot make named tuples
# again that an object holds at the end of a graph.
def pack(scores: Optional[LayerScores]) -> Optional[tuple]:
    """Factored scores as plain tuples."""
    if scores is None:
        return None
    return tuple(None if part is None else tuple(part) for part in scores)


def unpack(parts: Optional[tuple]) -> Optional[LayerScores]:
    """The scores of `pack`."""
    if parts is None:
        return None
    return LayerScores(*(
        None if part is None else FactoredScores(*part) for part in parts))


class Handover:
    """What the layers of one model hand on during a forward of it.

    All layers share it. Each writes its scores, a layer with less attention reads those
    of its source, and the last layer empties it. Layers read and write **outside** of
    what a backward pass computes again: there, scores are arguments and results, so that
    a recomputed layer sees what it saw. A layer that is not the next one, as where
    somebody else recomputes single layers, finds it empty, and `read` raises an error
    instead of giving the scores of another layer.

    Args:
        find_grid (Callable, optional): From the patch embedding and its output to the
            grid of tokens, where the layers are not told it.
    """

    def __init__(self, find_grid: Optional[Callable] = None) -> None:
        self.find_grid = find_grid
        self.grid: Optional[Grid] = None
        self.dp_loss: Optional[nn.Module] = None
        self.clear()

    def clear(self) -> None:
        """Forgets the scores and losses of a forward."""
        self._next: Optional[int] = None  # index of the layer whose turn it is
        self._whole = False  # whether the layers began with the first
        self._handed: Dict[Hashable, tuple] = {}
        self.dp_losses: Dict[int, List[Tensor]] = {}

    def begin(self, index: int) -> None:
        """A layer begins; forgets all if it does not follow the one before."""
        if index != self._next:
            self.clear()
            self._whole = index == 0
        self._next = index + 1

    def keep_grid(self, patch_embed: nn.Module, args: tuple, output) -> None:
        """Forward hook of the patch embedding."""
        self.grid = tuple(self.find_grid(patch_embed, output))

    def read(self, source: Hashable, name: str) -> Handed:
        """What the layer ``source`` handed on to the layer of this name.

        Raises:
            RuntimeError: If it has handed on nothing in this forward, or scores whose
                gradients are lost.
        """
        scores, grids, with_grad = self._handed.get(source, (None, None, False))
        # Where activations are to be recomputed, PyTorch's reentrant checkpoint turns
        # gradients off: those of the scores would be missing without a word.
        if grids is None or (torch.is_grad_enabled() and not with_grad):
            raise RuntimeError(
                f'LaViT: {name} takes the scores of the layer before, and they did not '
                'reach it with their gradients. If activations are recomputed by '
                'something around single layers (set_grad_checkpointing, '
                'activation_checkpointing), use with_cp=True of mmlavit instead; if '
                'layers are called one by one, begin with the first, and not within '
                'torch.no_grad()')
        return Handed(unpack(scores), Grids(*grids))

    def write(self, lane: Hashable, scores: Optional[LayerScores],
              grids: Grids) -> None:
        """A layer hands on its scores."""
        self._handed[lane] = pack(scores), tuple(grids), torch.is_grad_enabled()

    def hold_dp_losses(self) -> None:
        """Gives the losses of a whole forward, if there are any, to the DP loss."""
        if self.dp_losses and self._whole:
            self.dp_loss.hold(list(self.dp_losses.values()))

    def __getstate__(self) -> dict:
        # Scores have graphs, which can be neither copied nor pickled.
        return {**self.__dict__, '_next': None, '_handed': {}, 'dp_losses': {}}


class Exchange:
    """What passes between a layer and its attention within one call of the layer.

    The attention is called by the stock class's forward, which knows nothing of scores.
    """

    def __init__(self) -> None:
        self.end()

    def begin(self, given: Optional[Handed], grids: Grids, wanted: bool) -> None:
        """A call of the layer begins.

        Args:
            given (Handed, optional): What the layer's source handed on.
            grids (Grids): The layer's.
            wanted (bool): Whether somebody wants the layer's scores or map.
        """
        self._given = (None if given is None else
                       (pack(given.scores), tuple(given.grids)))
        self._grids = tuple(grids)
        self.wanted = wanted

    @property
    def given(self) -> Optional[Handed]:
        """What the layer's source handed on."""
        if self._given is None:
            return None
        scores, grids = self._given
        return Handed(unpack(scores), Grids(*grids))

    @property
    def grids(self) -> Grids:
        """The layer's."""
        return Grids(*self._grids)

    def keep(self, inherited: Optional[LayerScores], scores: LayerScores) -> None:
        """The attention computed its scores, from those inherited if there are any."""
        self._inherited, self._scores = pack(inherited), pack(scores)

    def keep_map(self, softmax: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of a softmax that builds the map."""
        if self.wanted:
            self._attention = output

    def take(self) -> Done:
        """What the attention left, at the end of the call."""
        return Done(unpack(self._inherited), unpack(self._scores), self._attention)

    def end(self) -> None:
        """Forgets all."""
        self._given = self._grids = self._attention = None
        self._inherited = self._scores = None
        self.wanted = False

    def __getstate__(self) -> dict:
        return vars(type(self)())  # as at the beginning: tensors have graphs
