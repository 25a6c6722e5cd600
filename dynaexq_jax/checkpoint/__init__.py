"""Converted checkpoints: their files, their header, and how they are read."""

from dynaexq_jax.checkpoint.reader import Checkpoint, is_converted

__all__ = ["Checkpoint", "is_converted"]
