"""How scores pass between layers whose forward hands on tokens only."""
from typing import Callable, Dict, Hashable, List, NamedTuple, Optional

from torch import Tensor, nn

from ..models.layers.grid import Grid, Grids
from ..models.layers.scores import LayerScores


class Handed(NamedTuple):
    """What a layer hands on."""
    scores: LayerScores
    grids: Grids


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
        self.handed: Dict[Hashable, Handed] = {}
        self.dp_losses: Dict[int, List[Tensor]] = {}

    def keep_grid(self, patch_embed: nn.Module, args: tuple, output) -> None:
        """Forward hook of the patch embedding."""
        self.grid = tuple(self.find_grid(patch_embed, output))

    def read(self, source: Hashable, name: str) -> Handed:
        """What the layer ``source`` handed on to the layer of this name.

        Raises:
            RuntimeError: If it has handed on nothing in this forward.
        """
        if source not in self.handed:
            raise RuntimeError(
                f'LaViT: {name} has less attention, and the scores of the layer '
                'before did not reach it. If its activations are recomputed by '
                'something around the layer (set_grad_checkpointing, '
                'activation_checkpointing), use with_cp=True of mmlavit instead; if '
                'layers are called one by one, begin with the first')
        return self.handed[source]

    def hold_dp_losses(self) -> None:
        """Gives the losses of a forward, if there are any, to the DP loss."""
        if self.dp_losses:
            self.dp_loss.hold(list(self.dp_losses.values()))

    def __getstate__(self) -> dict:
        # Scores have graphs, which can be neither copied nor pickled.
        return {**self.__dict__, 'handed': {}, 'dp_losses': {}}


class Exchange:
    """What passes between a layer and its attention within one call of the layer.

    The attention is called by the stock class's forward, which knows nothing of scores.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.given: Optional[Handed] = None  # by the source
        self.grids: Optional[Grids] = None  # of this layer
        self.inherited: Optional[LayerScores] = None  # on this layer's grids
        self.scores: Optional[LayerScores] = None  # of this layer
        self.attention: Optional[Tensor] = None  # the map, where it is built
        self.wanted = False  # whether somebody wants scores or the map

    def keep_map(self, softmax: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of a softmax that builds the map."""
        if self.wanted:
            self.attention = output

    def __getstate__(self) -> dict:
        return vars(type(self)())  # as at the beginning: tensors have graphs
