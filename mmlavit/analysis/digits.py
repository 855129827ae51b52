"""The real scanned digits that made data sets are painted with."""
from typing import Dict, Tuple

import numpy as np


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
