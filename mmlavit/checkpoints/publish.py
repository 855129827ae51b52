"""A training's checkpoint as a file to be published."""
import hashlib
import io
import re
from pathlib import Path
from typing import Dict, Optional

import torch
from mmengine import fileio
from mmengine.config import Config
from torch import Tensor, nn

from ..analysis.building import build_model
from ..analysis.logs import read_validation
from ..engine.checkpoint_hook import as_plain_data
from ..engine.safe_loading import load_from_local
from ..utils.images import image_channels
from ..version import __version__

KEPT = ('dataset_meta', 'epoch', 'iter', 'experiment_name')
# Of the config: where and how this training was started, on whose machine.
LOCAL = re.compile(r'^(work_dir|load_from|resume|launcher) = .*\n', re.M)
# And the folders of absolute paths, of data or of the weights it began with.
FOLDERS = re.compile(r'''(['"])/(?:[^'"\n/]+/)*([^'"\n/]+/?)\1''')
# Of the largest value of a map, by which half precision may change it.
MAX_CHANGE = 1e-2


def publish(source: Path, target: Path, figures: Optional[dict] = None,
            half: bool = False) -> Path:
    """Writes weights, config and figures of a checkpoint, and nothing else of it.

    Args:
        source (Path): A checkpoint of tools/train.py.
        target (Path): Where to; the first 8 digits of the file's SHA-256 are put
            before the suffix, as torch.hub checks them.
        figures (dict): The validation's. Default: those that the log beside the
            checkpoint has of it.
        half (bool): Stores weights in float16, in half the space. PyTorch turns
            them to float32 on loading. To compare the maps the config in ``source`` is
            run: use it on your own checkpoints. Defaults to False.

    Returns:
        Path: The file written; torch's safe loader reads it without mmlavit.

    Raises:
        FileNotFoundError, ValueError: If ``source`` is no such checkpoint, or half
            precision changes the backbone's maps by more than `MAX_CHANGE`.
    """
    checkpoint = load_from_local(str(source), map_location='cpu')
    if 'state_dict' not in checkpoint:
        raise ValueError(f'{source}: no state_dict in it: expected a checkpoint '
                         'of tools/train.py')
    meta = checkpoint.get('meta', {})
    if figures is None:
        figures = read_validation(source.parent,
                                  meta.get('epoch') or meta.get('iter'))
    # Clones: a view would be saved with all that it is a view of.
    weights = {k: x.clone() for k, x in checkpoint['state_dict'].items()}
    if half:
        weights = halve(weights, meta.get('cfg', ''), source)
    kept = {key: as_plain_data(meta[key]) for key in KEPT if key in meta}
    if 'cfg' in meta:
        kept['cfg'] = FOLDERS.sub(r'\1\2\1', LOCAL.sub('', meta['cfg']))
    file = io.BytesIO()
    torch.save(
        dict(
            meta=dict(kept, mmlavit_version=__version__,
                      figures=as_plain_data(figures)),
            state_dict=weights),
        file)
    sha = hashlib.sha256(file.getbuffer()).hexdigest()
    name = target.stem if target.suffix == '.pth' else target.name
    final = target.with_name(f'{name}-{sha[:8]}.pth')
    fileio.put(file.getvalue(), str(final))
    return final


def halve(weights: Dict[str, Tensor], config: str, source: Path) -> Dict[str, Tensor]:
    """Weights in float16; whole numbers stay.

    Args:
        weights (dict[str, Tensor]): Of the whole model.
        config (str): The model's, as mmengine writes it into checkpoints. It is run,
            as any config is.
        source (Path): What errors name.

    Raises:
        ValueError: If the backbone's maps of a random image change by more than
            `MAX_CHANGE` of their largest value, or a weight of any part is beyond
            float16.
    """
    halved = {k: x.half() if x.is_floating_point() else x for k, x in weights.items()}
    beyond = [k for k, x in weights.items()
              if x.isfinite().all() and not halved[k].isfinite().all()]
    if beyond:
        raise ValueError(f'{source}: half: {beyond[0]} has values of up to '
                         f'{weights[beyond[0]].abs().max():.3g}, beyond float16: '
                         'publish it without half')
    try:
        model = build_model(Config.fromstring(config, '.py')).eval()
    except Exception as error:  # of other tools, a checkpoint may hold any text
        raise ValueError(f'{source}: half: the maps cannot be compared, for its config '
                         f'builds no model: {error}') from None
    change = largest_change(model, weights, halved)
    if not change <= MAX_CHANGE:
        raise ValueError(f'{source}: half: float16 weights change the maps by '
                         f'{change:.2g} of their largest value, more than {MAX_CHANGE}: '
                         'publish it without half')
    return halved


@torch.no_grad()
def largest_change(model: nn.Module, one: Dict[str, Tensor],
                   other: Dict[str, Tensor], side: int = 224) -> float:
    """Of the backbone's maps of a random image, relative to their largest value."""
    image = torch.randn(1, image_channels(model), side, side,
                        generator=torch.Generator().manual_seed(0))
    maps = []
    for weights in one, other:
        model.load_state_dict(weights)
        maps.append(model.backbone(image))
    # torch's max keeps a NaN.
    return torch.stack([(a - b).abs().max() / a.abs().max()
                        for a, b in zip(*maps)]).max().item()
