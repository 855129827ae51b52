"""Registered losses."""
from .dp_loss import DiagonalityPreservingLoss

__all__ = ['DiagonalityPreservingLoss']
