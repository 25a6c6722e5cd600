"""Hotness profiles: the hotness of one run as a JSON file, from which the next begins warm."""

import dataclasses
import json
from pathlib import Path
from typing import Final

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.json_file import read_json_object
from dynaexq_jax.output_file import write_whole
from dynaexq_jax.policy import Hotness
from dynaexq_jax.traffic.model import RoutedModel

FORMAT: Final = "dynaexq hotness profile"
VERSION: Final = 1
_REMEDY: Final = "give another file, or delete this one to start cold"


def write_profile(path: Path, model: RoutedModel, hotness: Hotness) -> None:
    """Replaces ``path`` as a whole; numbers are written exactly.

    Raises InputError if it cannot be written.
    """
    body = {
        "format": FORMAT,
        "version": VERSION,
        "model": dataclasses.asdict(model),
        "memory": hotness.memory,
        "tokens": hotness.tokens,
        "mean": hotness.mean.tolist(),
    }
    write_whole(path, json.dumps(body) + "\n")


def read_profile(path: Path, model: RoutedModel) -> Hotness:
    """The hotness that was written, bit for bit.

    Raises InputError for a file that is damaged or belongs to another model than ``model``.
    """
    body = read_json_object(path, _REMEDY)
    if body.get("format") != FORMAT:
        raise InputError(f"{path}: is not a hotness profile; {_REMEDY}")
    if body.get("version") != VERSION:
        raise InputError(
            f"{path}: version is {body.get('version')!r}, this program reads {VERSION}; {_REMEDY}"
        )
    try:
        written_for = RoutedModel.from_json(body["model"])
        hotness = Hotness(
            mean=np.array(body["mean"], np.float64),
            tokens=int(body["tokens"]),
            memory=int(body["memory"]),
        )
        if hotness.mean.shape != (written_for.layers, written_for.experts):
            raise ValueError(f"mean has shape {hotness.mean.shape}, its model {written_for}")
        if not (np.all(np.isfinite(hotness.mean)) and np.all(hotness.mean >= 0)):
            raise ValueError("mean must be finite and not negative")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is not a valid hotness profile ({error}); {_REMEDY}") from error
    if written_for != model:
        raise InputError(
            f"{path}: is the hotness of a model with {written_for}; this one has {model}; {_REMEDY}"
        )
    return hotness
