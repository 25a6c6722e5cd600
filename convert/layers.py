"""Converts one layer: its dense tensors, and the pages and scales of its experts."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convert.dense import dense_arrays
from convert.encode import encode_expert
from convert.expert_units import ExpertUnits
from convert.quantize import LARGEST_WEIGHT, Quantizer
from convert.workdir import reporting_write_errors
from dynaexq_jax.checkpoint.units import Arrays, dense_unit, save_unit
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.models.names import dense_shapes_of_layer
from pallas_kernels.pages import ExpertFormat, Matrices

Advance = Callable[[], Any]
Record = dict[str, Any]
"""Of a finished step, as plain JSON data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What a conversion found out beside codes and scales, for the header."""

    benefit: list[list[list[float]]] | None = None
    """[L, S, E], or nothing where no text was run."""
    pinned: Sequence[tuple[int, int]] = ()
    """(number of the layer, expert)."""


class Converter(Protocol):
    """Converts layers, in the order in which it asks for them."""

    def describe_quantizer(self) -> dict[str, Any]:
        """What chooses the codes: its name and all that they depend on, as plain JSON data."""

    def todo(self, unfinished: list[int]) -> list[int]:
        """The layers to convert, ascending: those that are not finished, and what they need."""

    def extra_bytes(self) -> int:
        """Bytes of disk that the work takes beside the checkpoint."""

    def convert(self, layer: int, advance: Advance) -> Record:
        """Writes the units of a layer; the record of it.

        ``advance`` is called after each expert. Raises InputError for weights that are not finite
        and for a disk that is full.
        """

    def finished(self, layer: int) -> None:
        """Told once the record of a layer is durable."""

    def knowledge(self, records: list[Record]) -> Knowledge:
        """From the records of the layers with experts, in their order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConverter:
    """Uses no data: every layer is converted by itself."""

    source: HfDirectory
    fmt: ExpertFormat
    quantizer: Quantizer
    dense_bits: int
    output: Path

    def describe_quantizer(self) -> dict[str, Any]:
        """Of the quantizer itself."""
        return self.quantizer.describe()

    def todo(self, unfinished: list[int]) -> list[int]:
        """These and no others."""
        return unfinished

    def extra_bytes(self) -> int:
        """None."""
        return 0

    def convert(self, layer: int, advance: Advance) -> Record:
        """As ``Converter`` says."""
        names = dense_shapes_of_layer(self.source.config, layer)
        units = {dense_unit(layer): dense_arrays(self.source, names, self.dense_bits)}
        errors = None
        if self.source.config.is_sparse(layer):
            experts = self._experts(layer, advance)
            units |= experts.units(layer)
            errors = experts.errors()
        return {"units": save_units(self.output, units), "errors": errors}

    def finished(self, layer: int) -> None:
        """Nothing is left to do."""

    def knowledge(self, records: list[Record]) -> Knowledge:
        """Without text there is none."""
        return Knowledge()

    def _experts(self, layer: int, advance: Advance) -> ExpertUnits:
        count = self.source.config.num_experts
        experts = ExpertUnits(self.fmt, count)

        def encode(expert: int) -> None:
            weights = Matrices(
                *(matrix.astype(np.float32) for matrix in read_expert(self.source, layer, expert))
            )
            for name, matrix in encode_expert(weights, self.fmt, self.quantizer)._asdict().items():
                experts.put(name, expert, matrix)

        with concurrent.futures.ThreadPoolExecutor(_workers()) as executor:
            for _ in executor.map(encode, range(count)):
                advance()
        return experts


def read_expert(source: HfDirectory, layer: int, expert: int) -> Matrices:
    """Weights of one expert in their own dtype. Raises InputError for absurd ones."""
    weights = source.expert(layer, expert)
    largest = max(float(np.abs(matrix.astype(np.float32)).max()) for matrix in weights)
    if largest > LARGEST_WEIGHT:
        raise InputError(
            f"{source.path}: layer {layer}, expert {expert} has a weight of magnitude "
            f"{largest:.3g}, at most {LARGEST_WEIGHT:.3g} can be quantized; use an undamaged "
            "copy of the model"
        )
    return weights


def _workers() -> int:
    """Experts at a time: XLA leaves cores idle on one; each takes memory."""
    return min(4, os.cpu_count() or 1)


def save_units(output: Path, units: dict[str, Arrays]) -> dict[str, Any]:
    """Writes units; their records as plain JSON data. Raises InputError if the disk is full."""
    records = {}
    for unit, arrays in units.items():
        with reporting_write_errors(output / unit):
            records[unit] = dataclasses.asdict(save_unit(output, unit, arrays))
    return records
