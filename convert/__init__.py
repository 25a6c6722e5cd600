"""Hugging Face safetensors to converted checkpoints."""

from convert.pipeline import Summary, convert

__all__ = ["Summary", "convert"]
