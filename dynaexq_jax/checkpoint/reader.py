"""Reads a converted checkpoint: any level without the others, every file verified."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from dynaexq_jax.checkpoint.files import verify_files
from dynaexq_jax.checkpoint.header import HEADER_NAME, Header
from dynaexq_jax.checkpoint.units import (
    DENSE_OUTER,
    HF_FOLDER,
    ArrayRecord,
    Arrays,
    dense_unit,
    level_unit,
    load_unit,
    scales_unit,
)
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.models.weights import DenseWeights
from dynaexq_jax.trees import abstract_array
from pallas_kernels.levels import LEVEL_BITS, Bits
from pallas_kernels.pages import ExpertFormat, Matrices
from pallas_kernels.scales import Scales

Result = TypeVar("Result")


def is_converted(path: str | Path) -> bool:
    """Whether a path is a converted checkpoint (and not, say, a Hugging Face directory)."""
    return (Path(path) / HEADER_NAME).is_file()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: its header was read, no array was."""

    path: Path
    header: Header
    config: ModelConfig
    format: ExpertFormat

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads the header. Raises InputError if there is none or it cannot be used."""
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such directory; give a converted checkpoint")
        if not is_converted(path):
            raise InputError(
                f"{path}: has no {HEADER_NAME}, so it is not a converted checkpoint; "
                "make one with: dynaexq convert HF_DIR OUT_DIR"
            )
        header = Header.read(path)
        return cls(
            path=path,
            header=header,
            config=header.model_config(),
            format=header.expert_format(),
        )

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the sparse layers: axis L of the expert arrays."""
        return self.config.sparse_layers

    @property
    def experts(self) -> int:
        """Experts of each sparse layer: axis E."""
        return self.config.num_experts

    @property
    def available_bits(self) -> tuple[Bits, ...]:
        """Levels that can be read: those whose folder is there, and all below them.

        Raises InputError if that is none.
        """
        present = [(self.path / level_unit(bits, self.layers[0])).is_dir() for bits in LEVEL_BITS]
        if not present[0]:
            raise InputError(
                f"{self.path}: level2 is missing, which every expert needs; copy the checkpoint "
                "again or convert the model again"
            )
        return LEVEL_BITS[: present.index(False) if False in present else len(LEVEL_BITS)]

    @property
    def pinned(self) -> tuple[tuple[int, int], ...]:
        """(row of axis L, expert) of the experts that are never demoted."""
        return tuple((self.layers.index(layer), expert) for layer, expert in self.header.pinned)

    @property
    def benefit(self) -> np.ndarray:
        """What each step of the ladder gains, S one less than the levels.

        Of a calibrated conversion float64 [L, S, E]: nats a token for a unit of hotness, which
        compares all steps of all experts. Otherwise float64 [L, S]: the relative squared weight
        error that the step takes away, which compares steps of one layer, not layers.
        """
        if self.header.benefit is not None:
            return np.asarray(self.header.benefit)[:, : len(self.available_bits) - 1]
        errors = [self.header.errors_by_level[str(bits)] for bits in self.available_bits]
        return np.maximum(-np.diff(np.asarray(errors), axis=0), 0).T

    def dense_records(self) -> dict[str, ArrayRecord]:
        """Shape and dtype of every tensor of ``dense``, from the header alone."""
        units = [DENSE_OUTER, *map(dense_unit, range(self.config.num_hidden_layers))]
        parts = [self.header.units[unit].arrays for unit in units]
        return {name: record for part in parts for name, record in part.items()}

    def abstract_dense(self) -> DenseWeights:
        """Shapes and dtypes of ``dense_weights``, from the header alone."""
        records = self.dense_records().items()
        tensors = {name: abstract_array(r.shape, np.dtype(r.dtype)) for name, r in records}
        return DenseWeights.abstract(self.config, tensors)

    def dense_weights(self) -> DenseWeights:
        """Every weight that is not an expert's, on the device."""
        return DenseWeights.load(self.config, self.dense())

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer's files, verified. Raises InputError."""
        folder = self.path / HF_FOLDER
        verify_files(folder, self.header.tokenizer_files)
        return folder

    def dense(self) -> Arrays:
        """Every tensor that is not an expert, by Hugging Face name, in the source's dtype.

        At 8 dense bits matrices are int8, with float32 scales by ``names.scale_name``.
        """
        units = [DENSE_OUTER, *map(dense_unit, range(self.config.num_hidden_layers))]
        parts = _parallel(self._load, units)
        return {name: array for part in parts for name, array in part.items()}

    def scales(self) -> Matrices:
        """``Scales`` of both matrices: codes [L, E, B, G, 64], for log8 also bases [L, E]."""
        parts = _parallel(self._load, map(scales_unit, self.layers))

        def stack(name: str) -> np.ndarray:
            return np.stack([part[name] for part in parts])

        is_log8 = self.format.scale_encoding == "log8"
        return Matrices(
            *(
                Scales(stack(name), stack(f"{name}_base") if is_log8 else None)
                for name in Matrices._fields
            )
        )

    def level(self, bits: Bits) -> tuple[Matrices, ...]:
        """The pages that a level adds: one each at 2 and 4 bits, two at 8.

        Each is uint32 [L, E, B, 2C, 256], contiguous. Raises InputError if this level is missing.
        """
        first = self.header.units[level_unit(bits, self.layers[0])].arrays
        shapes = {name: record.shape for name, record in first.items()}
        stacks = {
            name: [np.empty((len(self.layers), experts, *page), np.uint32) for _ in range(pages)]
            for name, (experts, pages, *page) in shapes.items()
        }

        def fill(row: int) -> None:
            for name, array in self._load(level_unit(bits, self.layers[row])).items():
                for page, stacked in enumerate(stacks[name]):
                    stacked[row] = array[:, page]

        _parallel(fill, range(len(self.layers)))
        by_page = zip(*(stacks[name] for name in Matrices._fields), strict=True)
        return tuple(Matrices(*pair) for pair in by_page)

    def _load(self, unit: str) -> Arrays:
        return load_unit(self.path, unit, self.header.units[unit])


def _parallel(function: Callable[[Any], Result], items: Iterable[Any]) -> list[Result]:
    """Results in the order of the items; a few threads, for reading and hashing release the GIL."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        return list(executor.map(function, items))
