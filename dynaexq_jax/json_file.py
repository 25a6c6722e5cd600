"""JSON files that others wrote: every way in which one can be bad is an InputError."""

import json
from pathlib import Path
from typing import Any

from dynaexq_jax.errors import InputError


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds. Raises InputError naming the file, with the remedy."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    return parse_json_object(data, str(path), remedy)


def parse_json_object(data: bytes, name: str, remedy: str) -> dict[str, Any]:
    """Object in UTF-8 JSON. Raises InputError for bad JSON, a key twice or another type."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{name}: holds a {type(value).__name__}, not an object; {remedy}")
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} occurs twice")
    return result
