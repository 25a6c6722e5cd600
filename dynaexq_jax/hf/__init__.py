"""Hugging Face model directories, read strictly."""

from dynaexq_jax.hf.directory import TOKENIZER_FILES, HfDirectory

__all__ = ["TOKENIZER_FILES", "HfDirectory"]
