"""What a layer hands out to whoever looks on, the same for every backbone."""
from typing import Callable, Hashable, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .grid import Grid, Grids, merge_heads, pool_tokens, split_heads
from .scores import LayerScores


class Layer(NamedTuple):
    """One attention layer's state for a batch.

    Maps are computed on demand; what a caller does not keep is freed before the
    next layer runs. Tokens outside of the grid, such as a class token, are left out;
    what they draw of a map is no region's, but is not the regions' either.
    """
    kind: str  # 'VA' or 'LA'
    stage: int
    # Layers of a stage that may inherit from each other have the same: in Swin those
    # of the same shift.
    lane: Hashable
    grids: Grids
    tokens: Tensor  # (B, N, C), the layer's output
    scores: LayerScores
    # Attention maps (B, heads, stop - start, M) of the queries from start to stop
    probabilities: Callable[[int, int], Tensor]
    # Where the tokens lie, if not on the grid of the queries: those of windows are on
    # the whole grid of the stage, and each image has many maps.
    token_grid: Optional[Grid] = None
    name: str = ''  # its module's in the model, such as 'stages.2.blocks.1'

    def attention_of(self, queries: Sequence[int]) -> Tensor:
        """Attention maps (B, heads, len(queries), M) of chosen queries."""
        return torch.cat([self.probabilities(i, i + 1) for i in queries], 2)

    def region_scores(self) -> Tensor:
        """Raw scores between regions (B, heads, M, M)."""
        return self.scores.between_regions(self.grids).dense()

    def region_map(self) -> Tensor:
        """Attention map (B, heads, M, M), averaged over each region's queries.

        One row of regions at a time: never the whole N x M map.
        """
        (height, width), ratio = self.grids.queries, self.grids.ratio
        rows = []
        for top in range(0, height, ratio):
            strip = min(ratio, height - top), width
            attn = self.probabilities(top * width, (top + strip[0]) * width)
            # (B, heads, strip, M) -> (B, strip, heads * M) and back
            pooled = pool_tokens(merge_heads(attn), strip, ratio)
            rows.append(split_heads(pooled, attn.shape[1]))
        return torch.cat(rows, 2)


class Observable:
    """Part of a layer that can be observed at work.

    A layer calls `hand_out` at the end of its forward, outside of what is computed
    again in a backward pass.
    """
    observers: Tuple[Callable[[Layer], None], ...] = ()

    def hand_out(self, layer: Layer) -> None:
        """Shows the observers what the layer did."""
        for observer in self.observers:
            observer(layer)
