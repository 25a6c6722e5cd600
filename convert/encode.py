"""From the float weights of one expert to its pages, encoded scales and errors."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, UInt32

from convert.quantize import Quantized, Quantizer
from pallas_kernels.layout import pack_pages, padded_columns, tile_scales
from pallas_kernels.levels import LEVEL_BITS, LevelTable
from pallas_kernels.pages import ExpertFormat, Matrices, interleave_gate_up
from pallas_kernels.scales import Scales, encode_scales

_pack = jax.jit(pack_pages)


class Energy(NamedTuple):
    """Sums of squares over weights; relative errors are quotients of these."""

    errors: Float64[np.ndarray, "3"]
    """Of the difference to the weights, at 2, 4 and 8 bits."""
    weights: float

    def __add__(self, other: "Energy") -> "Energy":  # type: ignore[override]
        return Energy(self.errors + other.errors, self.weights + other.weights)

    def relative(self) -> list[float]:
        """Relative squared error by level; 0 for weights that are all zero."""
        return (self.errors / (self.weights or 1.0)).tolist()


class EncodedMatrix(NamedTuple):
    """One matrix as the checkpoint holds it."""

    pages: UInt32[np.ndarray, "4 B C2 256"]
    scales: Scales
    """Codes [B, G, 64]."""
    energy: Energy


def encode_expert(weights: Matrices, fmt: ExpertFormat, quantizer: Quantizer) -> Matrices:
    """``EncodedMatrix`` of both matrices, from float32 [2F, H], gate first, and [H, F]."""
    stored = Matrices(interleaved(weights.gate_up), weights.down)
    return Matrices(*(encode_matrix(w, quantizer(w, fmt), fmt) for w in stored))


def interleaved(gate_up: np.ndarray) -> np.ndarray:
    """Anything by row [2F, ...], gate first, in the order in which rows are stored."""
    return interleave_gate_up(*np.split(gate_up, 2))


def encode_matrix(weights: np.ndarray, quantized: Quantized, fmt: ExpertFormat) -> EncodedMatrix:
    """Packs a quantized matrix; weights and codes [N, K] with rows in the order of storage."""
    encoded = encode_scales(quantized.scales, fmt.scale_encoding)
    return EncodedMatrix(
        pages=np.asarray(_pack(jnp.asarray(quantized.codes))),
        scales=Scales(tile_scales(encoded.codes), encoded.base),
        energy=measure_energy(weights, quantized, fmt),
    )


def measure_energy(weights: np.ndarray, quantized: Quantized, fmt: ExpertFormat) -> Energy:
    """Squared errors of a quantized matrix at each level."""
    sums = _group_sums(weights, *quantized, fmt.group_size, fmt.table)
    squared_scales = np.square(quantized.scales.T.astype(np.float64))
    total = np.einsum("sng,ng->s", np.asarray(sums, np.float64), squared_scales)
    return Energy(total[:-1], float(total[-1]))


@functools.partial(jax.jit, static_argnames=("group_size", "table"))
def _group_sums(weights: Any, codes: Any, scales: Any, group_size: int, table: LevelTable) -> Any:
    """Sums of squares of each group in units of its scale, in which no float32 overflows: errors
    at 2, 4 and 8 bits, then the weights; float32 [4, N, G]."""
    rows, columns = weights.shape
    scale = jnp.repeat(scales.T, group_size, axis=1)[:, :columns]
    scaled = weights / jnp.where(scale > 0, scale, 1.0)
    levels = [jnp.asarray(table.values(bits))[codes >> (8 - bits)] for bits in LEVEL_BITS]
    parts = [*(jnp.square(scaled - values) for values in levels), jnp.square(scaled)]
    padding = ((0, 0), (0, padded_columns(columns) - columns))
    return jnp.stack(
        [jnp.pad(part, padding).reshape(rows, -1, group_size).sum(axis=-1) for part in parts]
    )
