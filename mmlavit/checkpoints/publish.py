"""A training's checkpoint as a file to be published."""
import hashlib
import io
from pathlib import Path
from typing import Optional

import torch
from mmengine import fileio

from ..analysis.logs import read_validation
from ..engine.checkpoint_hook import as_plain_data
from ..engine.safe_loading import load_from_local
from ..version import __version__

KEPT = ('cfg', 'dataset_meta', 'epoch', 'iter', 'experiment_name')


def publish(source: Path, target: Path, figures: Optional[dict] = None) -> Path:
    """Writes weights, config and figures of a checkpoint, and nothing else of it.

    Args:
        source (Path): A checkpoint of tools/train.py.
        target (Path): Where to; the first 8 digits of the file's SHA-256 are put
            before the suffix, as torch.hub checks them.
        figures (dict): The validation's. Default: those that the log beside the
            checkpoint has of it.

    Returns:
        Path: The file written; torch's safe loader reads it without mmlavit.

    Raises:
        FileNotFoundError, ValueError: If ``source`` is no such checkpoint.
    """
    checkpoint = load_from_local(str(source), map_location='cpu')
    if 'state_dict' not in checkpoint:
        raise ValueError(f'{source}: no state_dict in it: expected a checkpoint '
                         'of tools/train.py')
    meta = checkpoint.get('meta', {})
    if figures is None:
        figures = read_validation(source.parent,
                                  meta.get('epoch') or meta.get('iter'))
    kept = {key: as_plain_data(meta[key]) for key in KEPT if key in meta}
    file = io.BytesIO()
    torch.save(
        dict(
            meta=dict(kept, mmlavit_version=__version__,
                      figures=as_plain_data(figures)),
            # Clones: a view would be saved with all that it is a view of.
            state_dict={name: value.clone()
                        for name, value in checkpoint['state_dict'].items()}),
        file)
    sha = hashlib.sha256(file.getbuffer()).hexdigest()
    final = target.with_name(f'{target.stem}-{sha[:8]}.pth')
    fileio.put(file.getvalue(), str(final))
    return final
