"""Converts one layer: its dense tensors, and the pages and scales of its experts."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.dense import dense_arrays
from convert.encode import Energy, encode_expert
from convert.quantize import LARGEST_WEIGHT, Quantizer
from convert.workdir import reporting_write_errors
from dynaexq_jax.checkpoint.units import Arrays, dense_unit, level_unit, save_unit, scales_unit
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.models.names import dense_shapes_of_layer
from pallas_kernels.layout import page_shape
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS
from pallas_kernels.pages import ExpertFormat, Matrices
from pallas_kernels.scales import Scales

Advance = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConverter:
    """What is the same for every layer."""

    source: HfDirectory
    fmt: ExpertFormat
    quantizer: Quantizer
    dense_bits: int
    output: Path

    def convert(self, layer: int, advance: Advance) -> dict[str, Any]:
        """Writes the units of a layer; the record of it as plain JSON data.

        ``advance`` is called after each expert. Raises InputError for weights that are not finite
        and for a disk that is full.
        """
        names = dense_shapes_of_layer(self.source.config, layer)
        units = {dense_unit(layer): dense_arrays(self.source, names, self.dense_bits)}
        errors = None
        if self.source.config.is_sparse(layer):
            experts, energy = self._experts(layer, advance)
            units |= experts
            errors = energy.relative()
        return {"units": save_units(self.output, units), "errors": errors}

    def _experts(self, layer: int, advance: Advance) -> tuple[dict[str, Arrays], Energy]:
        """Units of the experts of a layer, and what their quantization costs."""
        pages = self._empty_pages()

        def encode(expert: int) -> dict[str, tuple[Scales, Energy]]:
            encoded = encode_expert(self._weights(layer, expert), self.fmt, self.quantizer)
            _place(pages, expert, encoded)
            return {name: (m.scales, m.energy) for name, m in encoded._asdict().items()}

        scales: dict[str, list[np.ndarray]] = {}
        energy = Energy(np.zeros(len(LEVEL_BITS)), 0.0)
        with concurrent.futures.ThreadPoolExecutor(_workers()) as executor:
            for encoded in executor.map(encode, range(self.source.config.num_experts)):
                for name, (scale, cost) in encoded.items():
                    scales.setdefault(name, []).append(scale.codes)
                    if scale.base is not None:
                        scales.setdefault(f"{name}_base", []).append(scale.base)
                    energy += cost
                advance()
        units = {level_unit(bits, layer): arrays for bits, arrays in pages.items()}
        units[scales_unit(layer)] = {name: np.stack(parts) for name, parts in scales.items()}
        return units, energy

    def _weights(self, layer: int, expert: int) -> Matrices:
        """Float32 weights of one expert. Raises InputError for absurd ones."""
        weights = Matrices(
            *(matrix.astype(np.float32) for matrix in self.source.expert(layer, expert))
        )
        largest = max(float(np.abs(matrix).max()) for matrix in weights)
        if largest > LARGEST_WEIGHT:
            raise InputError(
                f"{self.source.path}: layer {layer}, expert {expert} has a weight of magnitude "
                f"{largest:.3g}, at most {LARGEST_WEIGHT:.3g} can be quantized; use an undamaged "
                "copy of the model"
            )
        return weights

    def _empty_pages(self) -> dict[int, Arrays]:
        """By bits and matrix: uint32 [E, n, B, 2C, 256] for the n pages that the level adds."""
        experts = self.source.config.num_experts
        shapes = {name: page_shape(*shape) for name, shape in self.fmt.matrix_shapes.items()}
        return {
            bits: {
                name: np.empty((experts, span.stop - span.start, *shape), np.uint32)
                for name, shape in shapes.items()
            }
            for bits, span in _page_spans().items()
        }


def _workers() -> int:
    """Experts at a time: XLA leaves cores idle on one; each takes memory."""
    return min(4, os.cpu_count() or 1)


def _page_spans() -> dict[int, slice]:
    """Pages that each level adds to the one below, by bits."""
    stops = [PAGES_OF_BITS[bits] for bits in LEVEL_BITS]
    spans = map(slice, [0, *stops[:-1]], stops)
    return dict(zip(LEVEL_BITS, spans, strict=True))


def _place(pages: dict[int, Arrays], expert: int, encoded: Matrices) -> None:
    for bits, span in _page_spans().items():
        for name, matrix in encoded._asdict().items():
            pages[bits][name][expert] = matrix.pages[span]


def save_units(output: Path, units: dict[str, Arrays]) -> dict[str, Any]:
    """Writes units; their records as plain JSON data. Raises InputError if the disk is full."""
    records = {}
    for unit, arrays in units.items():
        with reporting_write_errors(output / unit):
            records[unit] = dataclasses.asdict(save_unit(output, unit, arrays))
    return records
