"""One comparison of given weights with a model's own."""
import re
from typing import Iterator, List, Mapping, NamedTuple

from torch import Tensor, nn


class WeightDifferences(NamedTuple):
    """How given weights differ from those that a model asks for."""
    fitting: List[str]
    missing: List[str]  # asked for, not given
    unexpected: List[str]  # given, not asked for
    sizes: List[str]  # 'NAME is SHAPE in the checkpoint, SHAPE here'

    def describe(self) -> str:
        """The first names of each kind, one sentence."""
        return '; '.join(self._parts())

    def _parts(self) -> Iterator[str]:
        for title, names in (('sizes differ', self.sizes),
                             ('weights are missing', self.missing),
                             ('are unexpected', self.unexpected)):
            if names:
                more = ', ...' if len(names) > 3 else ''
                yield f'{len(names)} {title}: {", ".join(names[:3])}{more}'


def compare_weights(given: Mapping[str, Tensor],
                    own: Mapping[str, Tensor]) -> WeightDifferences:
    """Compares names and sizes; a leading ``module.`` of DDP is left out.

    Args:
        given (Mapping[str, Tensor]): The weights of a checkpoint. What is no
            tensor fits nothing.
        own (Mapping[str, Tensor]): The state dict of the model.
    """
    given = {re.sub(r'^module\.', '', name): x for name, x in given.items()}
    shapes = {name: tuple(getattr(x, 'shape', ())) for name, x in given.items()}
    common = [name for name in own if name in given]
    differ = [n for n in common if shapes[n] != tuple(own[n].shape)]
    return WeightDifferences(
        fitting=[name for name in common if name not in set(differ)],
        missing=[name for name in own if name not in given],
        unexpected=[name for name in given if name not in own],
        sizes=[
            f'{name} is {shapes[name]} in the checkpoint, '
            f'{tuple(own[name].shape)} here' for name in differ
        ])


def load_fitting(model: nn.Module,
                 weights: Mapping[str, Tensor]) -> WeightDifferences:
    """Loads the weights that fit, and says which differ.

    What the model's own loading renames, converts or resizes, such as position
    embeddings, fits.

    Raises:
        ValueError: If a part of the model refuses the weights.
    """
    weights = {re.sub(r'^module\.', '', n): x for n, x in weights.items()}
    own = model.state_dict()
    differences = compare_weights(weights, own)
    try:
        keys = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        wrong = set(re.findall(r'size mismatch for (\S+):', str(error)))
        if not wrong & weights.keys():
            return differences
        # Such as a head of other classes. The rest may still be converted.
        found = load_fitting(model, {name: x for name, x in weights.items()
                                     if name not in wrong})
        return found._replace(
            missing=[name for name in found.missing if name not in wrong],
            sizes=[text for text in differences.sizes if text.split()[0] in wrong]
            + found.sizes)
    # Batch norms begin to count where a checkpoint does not.
    counted = [name for name in own if 'num_batches_tracked' not in name]
    missing = set(keys.missing_keys)
    return WeightDifferences(
        fitting=[name for name in counted if name not in missing],
        missing=[name for name in counted if name in missing],
        unexpected=keys.unexpected_keys, sizes=[])
