"""What data sets of painted digits have in common: the scans, and their folder."""
import json
import shutil
import sys
import tempfile
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Callable, Dict, Tuple

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


def make_once(args: Namespace, script: str, write: Callable[[Path], None]) -> None:
    """Makes the data set of a tool's arguments, unless it is there already.

    It is written beside its place and moved there at the end, so that a run that is cut
    off leaves no half data set.

    Args:
        args (Namespace): With the folder as ``out``. All other arguments are written
            into it, so that a data set of others is made anew.
        script (str): The tool's file; so is one of another version of it.
        write (Callable): Writes the files into the folder that it is given.

    Raises:
        SystemExit: If the folder holds something that is no such data set.
    """
    out = args.out.resolve()
    settings = json.loads(json.dumps(
        {name: value for name, value in vars(args).items() if name != 'out'}))
    settings['generator'] = zlib.crc32(Path(script).read_bytes())
    if is_made(out, settings):
        print(f'{out} is already there.')
        return
    if out.exists() and any(out.iterdir()) and 'generator' not in read_stamp(out):
        sys.exit(f'{out} holds something else: name another folder.')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory('.part', f'{out.name}.', out.parent) as folder:
        part = Path(folder) / out.name
        part.mkdir()
        write(part)
        (part / STAMP).write_text(json.dumps(settings))
        # Another process may have made it meanwhile, and be reading it.
        if not is_made(out, settings):
            shutil.rmtree(out, ignore_errors=True)
            part.rename(out)
    print(f'Wrote {out}: {args.train} + {args.val} images.')


def is_made(out: Path, settings: dict) -> bool:
    """Whether a folder has the data set of these settings."""
    return read_stamp(out) == settings


def read_stamp(out: Path) -> dict:
    """The settings of the data set in a folder; empty if none of ours is in it."""
    try:
        stamp = json.loads((out / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}
