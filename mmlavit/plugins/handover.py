"""How scores pass between layers whose forward hands on tokens only."""
from typing import Callable, Dict, Hashable, List, NamedTuple, Optional

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

    All layers share it. The first layer empties it, each writes its scores, a layer
    with less attention reads those of its source, and the last layer empties it again.
    Layers read and write **outside** of what a backward pass computes again: there,
    scores are arguments and results, so that a recomputed layer sees what it saw.
    Where somebody else recomputes single layers, nothing is there to read, and `read`
    raises an error instead of giving the scores of another forward.

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
        self._handed: Dict[Hashable, tuple] = {}
        self.dp_losses: Dict[int, List[Tensor]] = {}

    def keep_grid(self, patch_embed: nn.Module, args: tuple, output) -> None:
        """Forward hook of the patch embedding."""
        self.grid = tuple(self.find_grid(patch_embed, output))

    def read(self, source: Hashable, name: str) -> Handed:
        """What the layer ``source`` handed on to the layer of this name.

        Raises:
            RuntimeError: If it has handed on nothing in this forward.
        """
        if source not in self._handed:
            raise RuntimeError(
                f'LaViT: {name} has less attention, and the scores of the layer '
                'before did not reach it. If its activations are recomputed by '
                'something around the layer (set_grad_checkpointing, '
                'activation_checkpointing), use with_cp=True of mmlavit instead; if '
                'layers are called one by one, begin with the first')
        scores, grids = self._handed[source]
        return Handed(unpack(scores), Grids(*grids))

    def write(self, lane: Hashable, scores: Optional[LayerScores],
              grids: Grids) -> None:
        """A layer hands on its scores."""
        self._handed[lane] = pack(scores), tuple(grids)

    def hold_dp_losses(self) -> None:
        """Gives the losses of a forward, if there are any, to the DP loss."""
        if self.dp_losses:
            self.dp_loss.hold(list(self.dp_losses.values()))

    def __getstate__(self) -> dict:
        # Scores have graphs, which can be neither copied nor pickled.
        return {**self.__dict__, '_handed': {}, 'dp_losses': {}}


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
        """The attention has computed its scores, from those inherited if there are any."""
        self._inherited, self._scores = pack(inherited), pack(scores)

    def keep_map(self, softmax: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of a softmax that builds the map."""
        if self.wanted:
            self._attention = output

    def take(self) -> Done:
        """What the attention left, at the end of the call."""
        done = Done(unpack(self._inherited), unpack(self._scores), self._attention)
        self.end()
        return done

    def end(self) -> None:
        """Forgets all."""
        self._given = self._grids = self._attention = None
        self._inherited = self._scores = None
        self.wanted = False

    def __getstate__(self) -> dict:
        return vars(type(self)())  # as at the beginning: tensors have graphs
