"""Tensors that are not experts, as a checkpoint stores them: as they are, or matrices at 8 bits."""

from collections.abc import Iterable
from typing import Final

import numpy as np
from jaxtyping import Float, Float32, Int8

from dynaexq_jax.checkpoint.units import Arrays
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.models.names import has_8_bits, scale_name
from pallas_kernels.linear.weights import LARGEST_CODE

_SHRINK: Final = tuple(1 - 0.005 * step for step in range(11))
"""Scales that are tried, relative to the one at which nothing is clipped."""
_LEAST: Final = float(np.float32(2.0**-100))
"""A row of smaller weights becomes zero, for its scale would be hard to represent."""
_ROWS: Final = 1024
"""Rows at a time: the rest of a matrix stays in its own dtype."""


def dense_arrays(source: HfDirectory, names: Iterable[str], dense_bits: int) -> Arrays:
    """Arrays of a unit by name, with ``names.scale_name`` beside each matrix at 8 bits.

    Raises InputError for weights that are not finite.
    """
    arrays = {}
    for name in names:
        tensor = source.tensor(name)
        if has_8_bits(name, dense_bits):
            tensor, arrays[scale_name(name)] = quantize_rows(tensor)
        arrays[name] = tensor
    return arrays


def quantize_rows(
    weights: Float[np.ndarray, "N K"],
) -> tuple[Int8[np.ndarray, "N K"], Float32[np.ndarray, " N"]]:
    """Codes and the scale of each row, with ``weights`` about ``codes * scale[:, None]``.

    Of some scales near max|w| / 127 the one with the least squared error, the largest of equals.
    """
    codes = np.empty(weights.shape, np.int8)
    scale = np.empty(len(weights), np.float32)
    for start in range(0, len(weights), _ROWS):
        rows = slice(start, start + _ROWS)
        codes[rows], scale[rows] = _quantize(weights[rows].astype(np.float32))
    return codes, scale


def _quantize(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(weights).max(axis=1, keepdims=True)
    plain = np.where(largest < _LEAST, np.float32(0), largest / np.float32(LARGEST_CODE))
    unit = np.divide(1, plain, out=np.zeros_like(plain), where=plain > 0)
    scaled = weights * unit  # errors in units of ``plain`` do not overflow
    least = np.full(len(weights), np.inf)
    chosen = np.ones(len(weights), np.float32)
    for factor in map(np.float32, _SHRINK):
        error = scaled - _codes(scaled, factor) * factor
        squared = np.square(error).sum(axis=1, dtype=np.float64)
        better = squared < least
        least[better], chosen[better] = squared[better], factor
    codes = _codes(scaled, chosen[:, None])
    return codes.astype(np.int8), plain[:, 0] * chosen


def _codes(scaled: np.ndarray, factor: np.ndarray | np.float32) -> np.ndarray:
    """Nearest codes, still float32."""
    return np.clip(np.rint(scaled / factor), -LARGEST_CODE, LARGEST_CODE)
