"""How bit planes and pages lie in memory: THE definition, for numpy and for jax.numpy.

A weight matrix has N rows (outputs) and K columns (inputs). Every weight is an 8-bit code whose
bits, most significant first, are the planes 0..7. Two planes of a matrix make one page:

    page 0: planes 0, 1   resident at 2 bits and above
    page 1: planes 2, 3   added at 4 bits
    page 2: planes 4, 5   added at 8 bits
    page 3: planes 6, 7   added at 8 bits

The order of words and bits serves tensor cores. One 32-bit word holds one plane of 32 weights of
one row, exactly those that one lane of a quad feeds to eight consecutive 16-wide fragments: no
value ever has to move to another lane. With

    chunk  c = k // 128                     register  R = (k % 128) // 16
    lane   t = (k % 16) // 4                byte      i = k % 4
    v chunks side by side (4, 2 or 1: the largest that divides the number of chunks)

weight (n, k) is found in word ``(c // v) * 4v + t * v + c % v`` of row n, at bit

    8 i + R                           of the sign planes (0 and 4)
    16 (R % 2) + 4 i + R // 2         of the magnitude planes (all others).

So a shift by R puts the four sign bits of a register at the tops of its bytes, and a shift and a
mask leave the magnitude bits of four weights as nibbles, the selector that a byte permute wants.

K is padded to a multiple of the chunk; the bits of the padding are zero, and whoever multiplies
pads the input with zeros.

Axis letters, here and in all of ``pallas_kernels``:

    T tokens   A assignments (token, expert)   L layers   E experts   H hidden   F expert width
    N rows   K columns   W words of a row   G groups of a row   P pages of the pool
"""

import functools
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8, UInt32

LAYOUT_ID: Final = "quad-chunk128-v1"
"""Names this layout in every checkpoint; any change of the order above needs a new name."""

CHUNK: Final = 128
WORD_BITS: Final = 32
PLANES: Final = 8
PLANES_PER_PAGE: Final = 2
PAGES: Final = PLANES // PLANES_PER_PAGE
SIGN_PLANES: Final = (0, 4)

Array = TypeVar("Array", np.ndarray, jax.Array)


def padded_columns(columns: int) -> int:
    """K rounded up to a multiple of the chunk."""
    if columns < 1:
        raise ValueError(f"columns must be positive, got {columns}")
    return -(-columns // CHUNK) * CHUNK


def words_per_row(columns: int) -> int:
    """32-bit words that one plane of one row takes."""
    return padded_columns(columns) // WORD_BITS


def page_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Shape (2, N, W) of one matrix's part of a page, in 32-bit words."""
    return PLANES_PER_PAGE, rows, words_per_row(columns)


def _chunks_side_by_side(words: int) -> int:
    chunks = words // (CHUNK // WORD_BITS)
    return next(v for v in (4, 2, 1) if chunks % v == 0)


@functools.cache
def column_of_word_bit(words: int) -> np.ndarray:
    """Column k of element (R, i) of each word: int32 [W, 32], position ``4 R + i`` in axis 1."""
    v = _chunks_side_by_side(words)
    word = np.arange(words, dtype=np.int32)[:, None]
    chunk = word // (4 * v) * v + word % v
    lane = word % (4 * v) // v
    position = np.arange(WORD_BITS, dtype=np.int32)[None, :]
    columns = CHUNK * chunk + 16 * (position // 4) + 4 * lane + position % 4
    columns.flags.writeable = False
    return columns


@functools.cache
def bit_shifts(plane: int) -> np.ndarray:
    """Bit of a word that holds element ``4 R + i`` of a plane: uint32 [32]."""
    if not 0 <= plane < PLANES:
        raise ValueError(f"plane must be in 0..{PLANES - 1}, got {plane}")
    position = np.arange(WORD_BITS, dtype=np.uint32)
    register, byte = position // 4, position % 4
    is_sign = plane in SIGN_PLANES
    shifts = 8 * byte + register if is_sign else 16 * (register % 2) + 4 * byte + register // 2
    shifts.flags.writeable = False
    return shifts


def pack_pages(codes: UInt8[Any, "*B N K"]) -> UInt32[Any, "*B 4 2 N W"]:
    """Codes of a matrix to its four pages; numpy in, numpy out; jax in, jax out.

    Raises TypeError unless ``codes`` is uint8.
    """
    xp = _namespace(codes, np.uint8, "codes")
    *batch, rows, columns = codes.shape
    words = words_per_row(columns)
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, padded_columns(columns) - columns)]
    by_word = xp.pad(codes, padding)[..., column_of_word_bit(words)].astype(np.uint32)
    planes = [
        xp.sum(
            ((by_word >> np.uint32(PLANES - 1 - plane)) & np.uint32(1)) << bit_shifts(plane),
            axis=-1,
            dtype=np.uint32,
        )
        for plane in range(PLANES)
    ]
    stacked = xp.stack(planes, axis=-3)  # [*B, 8, N, W]
    return stacked.reshape(*batch, PAGES, PLANES_PER_PAGE, rows, words)


def unpack_words(pages: UInt32[Any, "*B p 2 N W"]) -> UInt8[Any, "*B N W 32"]:
    """First ``p`` pages to codes in the order of memory; the bits of absent pages are zero.

    Element ``[..., n, w, j]`` belongs to column ``column_of_word_bit(W)[w, j]``. A matmul that
    permutes its input once, instead of every weight, starts from here.
    """
    xp = _namespace(pages, np.uint32, "pages")
    count = pages.shape[-4]
    codes = None
    for plane in range(count * PLANES_PER_PAGE):
        word = pages[..., plane // PLANES_PER_PAGE, plane % PLANES_PER_PAGE, :, :, None]
        bit = (word >> bit_shifts(plane)) & np.uint32(1)
        placed = bit << np.uint32(PLANES - 1 - plane)
        codes = placed if codes is None else codes | placed
    if codes is None:
        raise ValueError("unpacking needs at least one page, got none")
    return codes.astype(xp.uint8)


def unpack_pages(pages: UInt32[Any, "*B p 2 N W"], columns: int) -> UInt8[Any, "*B N K"]:
    """Inverse of ``pack_pages`` for the first ``p`` pages of a matrix with ``columns`` columns."""
    codes = unpack_words(pages)
    words = codes.shape[-2]
    if words != words_per_row(columns):
        raise ValueError(
            f"pages of {words} words a row do not hold {columns} columns, "
            f"which take {words_per_row(columns)}"
        )
    word_bit_of_column = np.argsort(column_of_word_bit(words).reshape(-1))[:columns]
    flat = codes.reshape(*codes.shape[:-2], words * WORD_BITS)
    return flat[..., word_bit_of_column]


def _namespace(array: Any, dtype: type, name: str) -> Any:
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype).name}, got {array.dtype}")
    return np if isinstance(array, np.ndarray) else jnp
