"""The method: layers, the backbone, the loss."""
from .backbones import LaViT
from .losses import DiagonalityPreservingLoss

__all__ = ['DiagonalityPreservingLoss', 'LaViT']
