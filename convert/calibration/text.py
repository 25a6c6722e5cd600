"""Calibration text: files to rows of tokens."""

import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Int32

from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.text.documents import read_windows
from dynaexq_jax.text.tokenizer import load_tokenizer

DEFAULT_ROWS: Final = 72
"""Of each file. With a third of that the error on other text is visibly higher than on these."""
DEFAULT_WINDOW: Final = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Which text a calibrated conversion runs. Raises InputError for what makes no sense."""

    files: tuple[Path, ...]
    rows: int = DEFAULT_ROWS
    """Of each file, from its start; fewer where it is shorter."""
    window: int = DEFAULT_WINDOW
    """Tokens of a row."""

    def __post_init__(self) -> None:
        if not self.files:
            raise InputError("calibration needs at least one text file; give one that is typical")
        for name in ("rows", "window"):
            if getattr(self, name) < 1:
                raise InputError(f"calibration {name} must be positive, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationText:
    """The tokens, and what they were made of."""

    tokens: Int32[np.ndarray, "R W"]
    """The files take turns, so that any run of rows is a mixture."""
    files: list[dict[str, Any]]
    """Of each file: name, sha256, rows."""

    def describe(self) -> dict[str, Any]:
        """As plain JSON data, for the header and for telling one conversion from another."""
        return {"window": self.tokens.shape[1], "files": self.files}


def read_calibration(config: CalibrationConfig, model: HfDirectory) -> CalibrationText:
    """Reads all of it; loads no weights.

    Raises InputError for a file that is missing, not UTF-8 or shorter than a row, and for a model
    without tokenizer, with too few positions or with fewer tokens than its tokenizer.
    """
    positions, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if config.window > positions:
        raise InputError(
            f"a calibration window of {config.window} is longer than the {positions} positions of "
            "this model (max_position_embeddings); lower --calibration-window"
        )
    tokenizer = load_tokenizer(model.tokenizer_dir)
    of_files, files = [], []
    for path in config.files:
        rows = read_windows(path, tokenizer, config.window, config.rows)[:, :-1]
        if rows.max() >= vocabulary:
            raise InputError(
                f"{path}: the tokenizer of {model.path} gives token {rows.max()}, the model knows "
                f"{vocabulary}; use the tokenizer of these weights"
            )
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"name": path.name, "sha256": sha256, "rows": len(rows)})
        of_files.append(rows)
    turns = itertools.zip_longest(*of_files)
    tokens = [row for turn in turns for row in turn if row is not None]
    return CalibrationText(tokens=np.stack(tokens), files=files)
