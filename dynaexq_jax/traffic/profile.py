"""Hotness profiles: the hotness of one run as a JSON file, from which the next begins warm."""

import dataclasses
import json
from pathlib import Path
from typing import Final

from dynaexq_jax.json_file import read_json_object
from dynaexq_jax.output_file import write_whole
from dynaexq_jax.policy import Hotness
from dynaexq_jax.traffic.file_kind import FileKind, read_hotness
from dynaexq_jax.traffic.model import RoutedModel

KIND: Final = FileKind(
    name="hotness profile",
    version=1,
    remedy="give another file, or delete this one to start cold",
)


def write_profile(path: Path, model: RoutedModel, hotness: Hotness) -> None:
    """Replaces ``path`` as a whole; numbers are written exactly.

    Raises InputError if it cannot be written.
    """
    body = {
        **KIND.head,
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
    body = read_json_object(path, KIND.remedy)
    KIND.check_head(path, body)
    with KIND.reading(path):
        written_for = RoutedModel.from_json(body["model"])
        hotness = Hotness(
            mean=read_hotness(body, "mean", written_for),
            tokens=int(body["tokens"]),
            memory=int(body["memory"]),
        )
    KIND.check_model(path, written_for, model)
    return hotness
