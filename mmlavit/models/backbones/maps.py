"""What a model can ask of a backbone about the maps that it returns."""
from typing import Sequence


class MapBackbone:
    """A backbone with a map at the end of each stage.

    `mmlavit.engine.feature_maps` looks whether a model reads those that it returns.

    Attributes:
        out_indices (Sequence[int]): The stages whose maps are returned, ascending.
    """
    out_indices: Sequence[int]

    def stage_channels(self) -> Sequence[int]:
        """Channels of the map of each stage, whether it is returned or not."""
        raise NotImplementedError

    def maps_have_norms(self) -> bool:
        """Whether a map has a norm that the stage behind it does not read."""
        raise NotImplementedError
