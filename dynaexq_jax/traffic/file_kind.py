"""What the files of traffic have in common: each says what it is, and belongs to one model."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.traffic.model import RoutedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileKind:
    """A kind of file."""

    name: str
    """What messages call it."""
    version: int
    remedy: str
    """What to do about a file that cannot be used."""

    @property
    def head(self) -> dict[str, Any]:
        """What the JSON object of such a file begins with."""
        return {"format": f"dynaexq {self.name}", "version": self.version}

    def check_head(self, path: Path, body: Mapping[str, Any]) -> None:
        """Raises InputError for a file of another kind or version."""
        if body.get("format") != self.head["format"]:
            raise InputError(f"{path}: is not a {self.name}; {self.remedy}")
        if body.get("version") != self.version:
            raise InputError(
                f"{path}: version is {body.get('version')!r}, this program reads {self.version}; "
                f"{self.remedy}"
            )

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Turns what values of a wrong kind lead to into InputError."""
        try:
            yield
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{path}: is not a valid {self.name} ({error}); {self.remedy}"
            ) from error

    def check_model(self, path: Path, written_for: RoutedModel, model: RoutedModel) -> None:
        """Raises InputError for a file that belongs to another model."""
        if written_for != model:
            raise InputError(
                f"{path}: was made for a model with {written_for}; this one has {model}; "
                f"{self.remedy}"
            )


def read_hotness(body: Mapping[str, Any], name: str, model: RoutedModel) -> np.ndarray:
    """float64 [L, E] from JSON. Raises KeyError, TypeError or ValueError for anything else."""
    hotness = np.array(body[name], np.float64)
    if hotness.shape != (model.layers, model.experts):
        raise ValueError(f"{name} has shape {hotness.shape}, its model {model}")
    if not (np.all(np.isfinite(hotness)) and np.all(hotness >= 0)):
        raise ValueError(f"{name} must be finite and not negative")
    return hotness
