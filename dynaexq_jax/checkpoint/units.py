"""The units of a checkpoint: small dictionaries of arrays, each an Orbax checkpoint of its own.

One definition for the writer and the reader of where units lie, how they are saved and loaded,
and what the header records of them. Units are folders below the checkpoint:

    dense/outer      dense/layer_NNN     tensors that are not experts, by Hugging Face name; at 8
                                         dense bits matrices int8 [N, K], beside NAME_scale [N]
    scales/layer_NNN                     gate_up, down: codes [E, B, G, 64]; for log8 also
                                         gate_up_base, down_base: float32 [E]
    level2|4|8/layer_NNN                 gate_up, down: uint32 [E, n, B, 2C, 256], n pages
"""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import orbax.checkpoint as ocp

from dynaexq_jax.checkpoint.files import FileRecord, FileRecords, record_files, verify_files
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError
from pallas_kernels.levels import LEVEL_BITS

DENSE_OUTER: Final = "dense/outer"
HF_FOLDER: Final = "hf"
"""Folder of the tokenizer's and the other files that travel with the weights."""
Arrays = dict[str, np.ndarray]


def dense_unit(layer: int) -> str:
    """Unit of a layer's tensors that are not experts."""
    return f"dense/layer_{layer:03d}"


def scales_unit(layer: int) -> str:
    """Unit of the scales of a layer's experts."""
    return f"scales/layer_{layer:03d}"


def level_unit(bits: int, layer: int) -> str:
    """Unit of the pages that ``bits`` adds to a layer's experts."""
    return f"level{bits}/layer_{layer:03d}"


def layer_units(config: ModelConfig, layer: int) -> list[str]:
    """Units of one layer."""
    experts = [scales_unit(layer), *(level_unit(bits, layer) for bits in LEVEL_BITS)]
    return [dense_unit(layer), *(experts if config.is_sparse(layer) else [])]


def all_units(config: ModelConfig) -> list[str]:
    """Every unit of a model."""
    layers = range(config.num_hidden_layers)
    return [DENSE_OUTER, *(unit for layer in layers for unit in layer_units(config, layer))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """An array of a unit. ``sha256`` is of its bytes in C order: it compares conversions."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @classmethod
    def of(cls, array: np.ndarray) -> "ArrayRecord":
        """Records an array."""
        digest = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data)
        return cls(shape=array.shape, dtype=array.dtype.name, sha256=digest.hexdigest())


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What the header says of a unit: its arrays, and the files that hold them."""

    arrays: dict[str, ArrayRecord]
    files: FileRecords

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "UnitRecord":
        """Inverse of ``dataclasses.asdict``. Raises KeyError or TypeError for other data."""
        return cls(
            arrays={
                name: ArrayRecord(
                    shape=tuple(record["shape"]), dtype=record["dtype"], sha256=record["sha256"]
                )
                for name, record in data["arrays"].items()
            },
            files={name: FileRecord.from_json(record) for name, record in data["files"].items()},
        )


def save_unit(root: Path, unit: str, arrays: Mapping[str, np.ndarray]) -> UnitRecord:
    """Writes a unit, replacing what is there; on return its files are complete.

    Raises OSError, or what Orbax makes of one, if the disk is full or not writable.
    """
    records = {name: ArrayRecord.of(array) for name, array in arrays.items()}
    folder = root / unit
    with _quiet_orbax(), _checkpointer() as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(arrays)), force=True)
    return UnitRecord(arrays=records, files=record_files(folder))


def load_unit(root: Path, unit: str, record: UnitRecord) -> Arrays:
    """Reads a unit. Raises InputError if a file is missing or is not what was written."""
    folder = root / unit
    if not folder.is_dir():
        raise InputError(
            f"{folder}: this part of the checkpoint is missing; copy the checkpoint again, whole, "
            "or convert the model again"
        )
    verify_files(folder, record.files)
    with _checkpointer() as checkpointer:
        arrays = checkpointer.restore(folder.absolute())
    for name, expected in record.arrays.items():
        assert (arrays[name].shape, arrays[name].dtype.name) == (expected.shape, expected.dtype)
    return arrays


def _checkpointer() -> ocp.Checkpointer:
    """Plain zarr files, one folder an array; not compressed, for bit planes hardly shrink."""
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False)
    )


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax logs what it also raises, with one traceback a thread."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
