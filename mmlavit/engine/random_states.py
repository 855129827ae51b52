"""Random numbers go on where an interrupted training was.

`CheckpointHook` puts the states of a process's generators into its checkpoints, and
back. Workers of a data loader begin each epoch with seeds that follow from it.
"""
import random
from functools import partial
from typing import Iterator

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_world_size
from torch.utils.data import DataLoader


def get_random_states() -> dict:
    """The states of this process's generators, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    states = dict(
        python=random.getstate(),
        numpy=(kind, keys.tolist(), *rest),
        torch=torch.get_rng_state())
    if torch.cuda.is_available():
        states['cuda'] = torch.cuda.get_rng_state()  # of this rank's device
    return states


def set_random_states(states: dict) -> None:
    """Takes up what `get_random_states` gave, on any device."""
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])
    torch.set_rng_state(states['torch'].cpu())
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())


def begin_workers(loader: DataLoader, seed: int, epoch: int) -> None:
    """Lets the random numbers of a loader's workers follow from the epoch.

    mmengine's persistent workers go on with those of the epoch before, which a
    resumed training has not drawn; others draw the same in every epoch. Persistent
    workers are started anew. A ``worker_init_fn`` of the user's is left alone.

    Args:
        loader (DataLoader): That of the training, between two epochs.
        seed (int): The runner's.
        epoch (int): The one that begins, from 0.
    """
    init = loader.worker_init_fn
    if (loader.num_workers == 0 or not isinstance(init, partial)
            or init.func is not worker_init_fn):
        return
    workers = loader.num_workers * get_world_size()
    loader.worker_init_fn = partial(init, seed=seed + epoch * workers)
    loader._iterator = None


class SkippedBatches:
    """Batches of which a resumed training first passes over some.

    Args:
        batches (Iterator): The batches.
        skip (int): How many the training has already seen.
        states (dict): Those of the generators, set behind the skipped batches.
    """

    def __init__(self, batches: Iterator, skip: int, states: dict) -> None:
        self.batches, self.skip, self.states = batches, skip, states

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        if self.skip == 0:
            # OneDL's mmengine begins its loader only now, and that draws a number.
            begin = getattr(self.batches, '_ensure_iterator', None)
            if begin is not None:
                begin()
            set_random_states(self.states)
        self.skip -= 1
        return next(self.batches)

    def skip_iter(self, number: int) -> None:
        """Passes over so many, as the loop of OneDL's mmengine asks for."""
        self.batches.skip_iter(number)
        self.skip -= number
