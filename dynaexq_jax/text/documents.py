"""Text files as token windows, for perplexity."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.text.tokenizer import Tokenizer

SEPARATOR: Final = "<|endoftext|>"
_SEPARATOR_LINE: Final = re.compile(rf"^{re.escape(SEPARATOR)}(?:\n|\Z)", re.MULTILINE)


def read_text(path: Path | str) -> str:
    """A text file with line ends as ``\\n``. Raises InputError if missing or not UTF-8."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read text file {path}: {error.strerror}; give a file of UTF-8 text"
        ) from error
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start} "
            f"({error.reason}); convert it to UTF-8"
        ) from error


def split_documents(text: str) -> list[str]:
    """Documents between lines that are exactly ``<|endoftext|>``; empty ones are dropped.

    The newline before such a line belongs to it; all others, also at the ends of a document, are
    the document's.
    """
    *ended, last = _SEPARATOR_LINE.split(text)
    documents = [*(part.removesuffix("\n") for part in ended), last]
    return [document for document in documents if document]


def token_stream(text: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each document, followed by the tokenizer's eos id."""
    for document in split_documents(text):
        yield [*tokenizer.encode(document), tokenizer.eos_id]


def read_windows(
    path: Path | str, tokenizer: Tokenizer, window: int, max_windows: int | None = None
) -> np.ndarray:
    """The first windows of a text file: int32 [n, window + 1], n <= ``max_windows``.

    The documents' tokens are concatenated; windows start every ``window`` tokens, so that the
    last token of one is the first of the next and each token but the first is predicted once.
    Only as much text is tokenized as the windows need.

    Raises InputError for a file that is missing, not UTF-8 or too short for one window.
    """
    for name, value in (("window", window), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    ids: list[int] = []
    for document in token_stream(read_text(path), tokenizer):
        ids += document
        if max_windows is not None and len(ids) > max_windows * window:
            break
    if len(ids) <= window:
        raise InputError(
            f"{path} has {len(ids)} tokens, one window of {window} needs {window + 1}: give a "
            "longer text or a smaller window"
        )
    count = (len(ids) - 1) // window
    if max_windows is not None:
        count = min(count, max_windows)
    starts = np.arange(count)[:, None] * window
    return np.asarray(ids, np.int32)[starts + np.arange(window + 1)]
