"""What data sets of painted digits have in common: the scans, and their folder."""
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, Tuple

import numpy as np

STAMP = 'dataset.json'


def split_digits(rng: np.random.Generator) -> Dict[str, Tuple[np.ndarray, np.ndarray]]:
    """Scikit-learn's 1,797 scans, one fifth of each class held out.

    Args:
        rng (np.random.Generator): Chooses what is held out.

    Returns:
        dict[str, tuple[np.ndarray, np.ndarray]]: For 'train' and 'val', scans
        (n, 8, 8), float32 from 0 to 1, and their digits (n, ).
    """
    from sklearn.datasets import load_digits
    digits = load_digits()
    held_out = np.zeros(len(digits.target), bool)
    for label in range(10):
        indices = rng.permutation(np.flatnonzero(digits.target == label))
        held_out[indices[:len(indices) // 5]] = True
    scans = (digits.images / 16).astype(np.float32)
    return dict(
        train=(scans[~held_out], digits.target[~held_out]),
        val=(scans[held_out], digits.target[held_out]))


def is_made(out: Path, settings: dict) -> bool:
    """Whether a folder holds the data set of these settings.

    Raises:
        FileExistsError: If it holds something that is no such data set.
    """
    stamp = out / STAMP
    if stamp.is_file():
        return json.loads(stamp.read_text()) == settings
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f'{out} holds something else: name another folder.')
    return False


@contextmanager
def making(out: Path, settings: dict) -> Iterator[Path]:
    """A folder that takes the place of ``out`` when the block ends without an error.

    It lies beside it, so that a run that is cut off leaves no half data set there.

    Args:
        out (Path): The data set's folder; an older data set in it is removed.
        settings (dict): Written into the new one, for `is_made`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory('.part', f'{out.name}.', out.parent) as folder:
        part = Path(folder) / out.name
        part.mkdir()
        yield part
        (part / STAMP).write_text(json.dumps(settings))
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
