"""Official PVTv2 weights as the start of a LaViT: see tools/convert_pvt.py."""
import io
import re
from pathlib import Path
from typing import Dict, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from mmengine import fileio
from torch import Tensor

from ..engine.safe_loading import load_from_local
from ..models.backbones.lavit import LaViT
from ..models.backbones.pvt_weights import (NAMINGS, for_less_attention,
                                            to_lavit_names, weights_in)
from .fit import FittedLayer, fit, make_teacher, read_images

Weights = Dict[str, Tensor]
LAYER = re.compile(r'(stages\.\d+\.blocks)\.(\d+)\.')


def resize(x: Tensor, like: Tensor) -> Tensor:
    """``x`` cropped at the end of each axis; ``like`` where x does not reach.

    Not zeros there: channels that are zero throughout would never learn.
    """
    out = like.clone()
    common = tuple(slice(min(a, b)) for a, b in zip(x.shape, like.shape))
    out[common] = x[common]
    return out


def resize_like(name: str, x: Tensor, like: Tensor) -> Tensor:
    """`resize`; keys and values, which lie one above the other, each for itself."""
    parts = 2 if '.attn.kv.' in name else 1
    return torch.cat([
        resize(*part) for part in zip(x.chunk(parts), like.chunk(parts))
    ])


def depths_of(names) -> Dict[str, int]:
    """'stages.N.blocks' -> the number of its layers."""
    depths = {}
    for match in filter(None, map(LAYER.match, names)):
        depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths


class Converted(NamedTuple):
    """PVTv2's weights as a LaViT's."""
    naming: str  # whose names they had
    weights: Weights
    missing: Set[str]  # LaViT's that keep their initial values
    dropped: Set[str]  # LA layers, whose Q and K are not used
    unused: Set[str]  # of PVTv2, not used or only in part, by LaViT's names
    fitted: Sequence[FittedLayer] = ()


def convert(pvt: Weights, model: LaViT, exact: bool = False) -> Converted:
    """PVTv2's weights in the model's names and sizes.

    Layers that differ in number are spread evenly; see `resize` for sizes.

    Args:
        pvt (dict[str, Tensor]): The weights.
        model (LaViT): Whose they become.
        exact (bool): Takes weights of the model's depths and widths alone. Defaults to
            False.

    Raises:
        ValueError: If they are not PVTv2's, or, with ``exact``, of other depths or
            widths.
    """
    naming, pvt = to_lavit_names(pvt)
    if naming is None:
        raise ValueError(
            f'begins with {next(iter(pvt), None)!r}: expected PVTv2 weights by '
            f'the names of {", ".join(NAMINGS)} or mmpretrain')
    own = model.state_dict()
    if exact and depths_of(pvt) != depths_of(own):
        raise ValueError(f'has {list(depths_of(pvt).values())} layers in its stages: '
                         f'expected {list(depths_of(own).values())}')
    sources = spread_layers(pvt, depths_of(own))
    given, dropped = for_less_attention(
        {name: pvt[source] for name, source in sources.items()},
        model.less_attention_layers())
    differ = [f'{name} is {tuple(x.shape)}, expected {tuple(own[name].shape)}'
              for name, x in given.items() if name in own and x.shape != own[name].shape]
    if exact and differ:
        raise ValueError(f'{len(differ)} sizes differ: {", ".join(differ[:3])}')
    weights = {
        name: resize_like(name, x, own[name])
        for name, x in given.items() if name in own
    }
    whole = {
        source for name, source in sources.items()
        if name in weights and pvt[source].shape == weights[name].shape
    }
    return Converted(naming, weights, own.keys() - weights.keys(), set(dropped),
                     pvt.keys() - whole)


def spread_layers(pvt: Weights, depths: Dict[str, int]) -> Dict[str, str]:
    """Which of PVTv2's weights each of the model's comes from."""
    theirs, sources = depths_of(pvt), {}
    for stage, depth in depths.items():
        last = theirs.get(stage, 0) - 1
        for layer in range(depth if last >= 0 else 0):
            source = f'{stage}.{round(layer * last / max(depth - 1, 1))}.'
            sources.update({
                f'{stage}.{layer}.{name[len(source):]}': name
                for name in pvt if name.startswith(source)
            })
    sources.update({name: name for name in pvt if not LAYER.match(name)})
    return sources


def convert_file(source: Path, target: Path, arch: str,
                 num_va_layers: Optional[Sequence[int]] = None,
                 images: Optional[Path] = None) -> Tuple[Converted, int]:
    """Converts a file into one that configs take as a pre-training.

    In a config's ``init_cfg`` it needs ``prefix='backbone.'``.

    Args:
        source (Path): PVTv2's weights, such as ``pvt_v2_b2.pth``.
        target (Path): Where to; the weights are named as a classifier's.
        arch (str): LaViT's. A preset 'pvtv2_*' takes its own weights alone; for the
            others, tensors are cropped.
        num_va_layers (Sequence[int], optional): As for `LaViT`.
        images (Path, optional): Folder of images to fit Theta and Psi on, see
            `mmlavit.checkpoints.fit`; for the presets 'pvtv2_*'.

    Returns:
        tuple: What became of the weights, and how many the model has.

    Raises:
        FileNotFoundError, ValueError: If ``source`` does not hold such weights, or
            those of another preset, or ``images`` too few images.
    """
    torch.manual_seed(0)
    model = LaViT(arch=arch, num_va_layers=num_va_layers)
    model.init_weights()
    pvt = weights_in(load_from_local(str(source), map_location='cpu'))
    try:
        found = convert(pvt, model, exact=str(arch).startswith('pvtv2_'))
        teacher = None if images is None else make_teacher(pvt, model)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from None
    if teacher is not None:
        model.load_state_dict(found.weights, strict=False)
        fitted = fit(model, teacher, read_images(images))
        found = found._replace(
            weights=model.state_dict(), missing=set(), fitted=fitted)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    torch.save(
        dict(
            meta=dict(source=source.name, arch=arch,
                      num_va_layers=model.arch['num_va_layers']),
            state_dict={f'backbone.{k}': v for k, v in found.weights.items()}),
        file)
    fileio.put(file.getvalue(), str(target))
    return found, len(model.state_dict())
