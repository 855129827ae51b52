"""Checkpoints made from other checkpoints."""
