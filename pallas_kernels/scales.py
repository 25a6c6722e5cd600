"""Scales of the groups: one positive factor for each (row, group of columns), for all levels.

Two encodings, named in the checkpoint's header:

    "bf16"  the scale itself, bfloat16 [..., G, N]; 0 for a group that lies wholly in the padding
    "log8"  scale = base * 2**(-code / 32): uint8 [..., G, N] with one float32 base a matrix [...],
            its largest scale; scales under base / 250, zero among them, become base / 250

Stored, codes are cut into tiles of 64 rows, [..., B, G, 64] (``layout.tile_scales``): the scales of
a tile are contiguous, and its rows read those of a group side by side.
"""

from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32

from pallas_kernels.layout import CHUNK, padded_columns

ScaleEncoding = Literal["bf16", "log8"]

SCALE_ENCODINGS: Final[tuple[ScaleEncoding, ...]] = ("bf16", "log8")
GROUP_SIZES: Final = (16, 32, 64, 128)
LOG8_STEPS_PER_OCTAVE: Final = 32
LOG8_MAX_CODE: Final = 255


class Scales(NamedTuple):
    """Encoded scales of a stack of matrices; a pytree."""

    codes: Any
    """bfloat16 or uint8 [..., G, N]; stored [..., B, G, 64]."""
    base: Any
    """float32 [...] for log8, None for bf16."""


def groups_per_row(columns: int, group_size: int) -> int:
    """Groups of one row, those of the padding included."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group size must be one of {GROUP_SIZES}, got {group_size}")
    assert CHUNK % group_size == 0
    return padded_columns(columns) // group_size


def encode_scales(scales: Float[np.ndarray, "*B G N"], encoding: ScaleEncoding) -> Scales:
    """Rounds float32 scales to an encoding (numpy). Raises ValueError unless finite and >= 0."""
    if not np.all(np.isfinite(scales) & (scales >= 0)):
        raise ValueError("scales must be finite and not negative")
    if encoding == "bf16":
        return Scales(scales.astype(ml_dtypes.bfloat16), None)
    if encoding != "log8":
        raise ValueError(f"scale encoding must be one of {SCALE_ENCODINGS}, got {encoding!r}")
    base = scales.max(axis=(-2, -1)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.log2(base[..., None, None]) - np.log2(scales)
    octaves = np.nan_to_num(octaves, nan=np.inf, posinf=np.inf)  # 0 / 0 in an all-zero matrix
    codes = np.clip(np.round(octaves * LOG8_STEPS_PER_OCTAVE), 0, LOG8_MAX_CODE)
    return Scales(codes.astype(np.uint8), base)


def decode_scales(scales: Scales) -> Float32[Any, "*B G N"]:
    """Encoded scales as float32; numpy in, numpy out; jax in, jax out."""
    if scales.base is None:
        return scales.codes.astype(np.float32)
    xp = jnp if isinstance(scales.codes, jax.Array) else np
    octaves = scales.codes.astype(np.float32) * np.float32(-1 / LOG8_STEPS_PER_OCTAVE)
    return scales.base[..., None, None] * xp.exp2(octaves)
