"""A converted checkpoint beside the Hugging Face directory that it is compared with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynaexq_jax.checkpoint import Checkpoint, is_converted
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.text.documents import read_windows
from dynaexq_jax.text.tokenizer import load_tokenizer

_REMEDY = "give the directory that the checkpoint was converted from"


def shared_windows(
    model: Path,
    reference: Path,
    texts: Sequence[Path],
    *,
    window: int,
    max_windows: int | None = None,
) -> list[np.ndarray]:
    """Windows int32 [n, window + 1] of each text, which both models read as the same tokens.

    Loads no weights. Raises InputError if the reference is converted itself, if the models differ
    in any value of their configuration or read a text differently, and as ``read_windows`` does.
    """
    if is_converted(reference):
        raise InputError(
            f"{reference}: a converted checkpoint does not hold the unquantized experts, so it "
            f"cannot be the reference; {_REMEDY}"
        )
    checkpoint, source = Checkpoint.open(model), HfDirectory.open(reference)
    _check_configs(model, checkpoint.config, reference, source.config)
    ours = load_tokenizer(checkpoint.tokenizer_dir)
    theirs = load_tokenizer(source.tokenizer_dir)
    found = []
    for text in texts:
        windows = read_windows(text, ours, window, max_windows)
        _check_windows(text, model, windows, read_windows(text, theirs, window, max_windows))
        found.append(windows)
    return found


def _check_configs(model: Path, ours: ModelConfig, reference: Path, theirs: ModelConfig) -> None:
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if a != b:
            raise InputError(
                f"{model} and its reference differ: {field.name} is {a}, and {b} in {reference}; "
                f"{_REMEDY}"
            )


def _check_windows(text: Path, model: Path, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compares ids by place: a window begins with the token that the one before ended with."""
    shared = min(len(ours), len(theirs))
    differ = np.argwhere(ours[:shared] != theirs[:shared])
    if differ.size:
        row, column = differ[0]
        raise InputError(
            f"{model} and its reference have different tokenizers: token "
            f"{row * (ours.shape[1] - 1) + column} of {text} is {ours[row, column]}, and "
            f"{theirs[row, column]} to the reference; {_REMEDY}"
        )
    if len(ours) != len(theirs):
        raise InputError(
            f"{model} and its reference have different tokenizers: {text} has {len(ours)} windows, "
            f"and {len(theirs)} to the reference; {_REMEDY}"
        )
