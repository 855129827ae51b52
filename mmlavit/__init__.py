"""LaViT backbone for mmdetection, mmsegmentation and mmpretrain.

Importing this package, or naming it in a config's ``custom_imports``, registers
``type='LaViT'`` in all three.
"""
from . import environment  # isort: skip  (first: says what is missing)
from . import checkpoints, invalid_loss, optim
from .complexity import register_flop_handles
from .dp_loss import DiagonalityPreservingLoss
from .lavit import LaViT
from .version import __version__

register_flop_handles()

__all__ = ['DiagonalityPreservingLoss', 'LaViT', '__version__']
