"""LaViT backbone for mmdetection, mmsegmentation and mmpretrain.

Importing this package, or naming it in a config's ``custom_imports``, registers
``type='LaViT'`` in all three; what else it does is in `mmlavit.engine.install`.
"""
from .engine import install

install()

from .models import DiagonalityPreservingLoss, LaViT  # noqa: E402
from .plugins import add_less_attention  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    'DiagonalityPreservingLoss', 'LaViT', '__version__', 'add_less_attention'
]
