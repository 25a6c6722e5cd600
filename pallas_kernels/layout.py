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

weight (n, k) is found in the word of row n, chunk c and lane t, at bit

    8 i + R                           of the sign planes (0 and 4)
    16 (R % 2) + 4 i + R // 2         of the magnitude planes (all others).

So a shift by R puts the four sign bits of a register at the tops of its bytes, and a shift and a
mask leave the magnitude bits of four weights as nibbles, the selector that a byte permute wants.

Words are ordered by what one thread block reads at once: a page is uint32 [N/64, 2 K/128, 256],
one entry of the first axis for each tile of 64 rows. A tile is contiguous and holds its columns in
steps of v chunks (4, 2 or 1: the largest that divides the number of chunks); a step holds both
planes of the page, and a plane of a step 256 v words, those of a thread side by side:

    step s = c // v     place j = c % v     row n % 64 = 16 warp + 8 half + g     thread 4 g + t

    word  (((2 s + plane % 2) 2 + half) 4 + warp) 32 v + (4 g + t) v + j   of the tile.

N is padded to whole tiles and K to whole chunks; the bits of the padding are zero. Whoever
multiplies pads the input with zeros and drops the outputs of the padding.

Axis letters, here and in all of ``pallas_kernels``:

    T tokens   A assignments (token, expert)   L layers   E experts   H hidden   F expert width
    N rows   K columns   W words of a row   G groups of a row   P pages of the pool
    B tiles of 64 rows   C chunks of a row, so that a page is [B, 2C, 256]
"""

import functools
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8, UInt32

LAYOUT_ID: Final = "tile64-chunk128-v2"
"""Names this layout in every checkpoint; any change of the order above needs a new name."""

CHUNK: Final = 128
ROW_TILE: Final = 64
WORD_BITS: Final = 32
PLANES: Final = 8
PLANES_PER_PAGE: Final = 2
PAGES: Final = PLANES // PLANES_PER_PAGE
SIGN_PLANES: Final = (0, 4)
LINE_WORDS: Final = 256
"""Words of the last axis of a page: what one plane of a tile takes for one chunk."""

Array = TypeVar("Array", np.ndarray, jax.Array)


def padded_columns(columns: int) -> int:
    """K rounded up to a multiple of the chunk."""
    if columns < 1:
        raise ValueError(f"columns must be positive, got {columns}")
    return -(-columns // CHUNK) * CHUNK


def row_tiles(rows: int) -> int:
    """Tiles of 64 rows that hold ``rows`` rows."""
    if rows < 1:
        raise ValueError(f"rows must be positive, got {rows}")
    return -(-rows // ROW_TILE)


def words_per_row(columns: int) -> int:
    """32-bit words that one plane of one row takes."""
    return padded_columns(columns) // WORD_BITS


def page_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Shape [B, 2C, 256] of one matrix's part of a page, in 32-bit words."""
    return row_tiles(rows), PLANES_PER_PAGE * padded_columns(columns) // CHUNK, LINE_WORDS


def chunks_side_by_side(chunks: int) -> int:
    """v: chunks of a step, whose words of one thread lie side by side."""
    return next(v for v in (4, 2, 1) if chunks % v == 0)


@functools.cache
def column_of_word_bit(words: int) -> np.ndarray:
    """Column k of element (R, i) of each word of a row: int32 [W, 32], ``4 R + i`` in axis 1.

    The words of a row are counted as ``4 v s + t v + j``.
    """
    v = chunks_side_by_side(words * WORD_BITS // CHUNK)
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


def pack_pages(codes: UInt8[Any, "*S N K"]) -> UInt32[Any, "*S 4 B C2 256"]:
    """Codes of a matrix to its four pages; numpy in, numpy out; jax in, jax out.

    Raises TypeError unless ``codes`` is uint8.
    """
    xp = _namespace(codes, np.uint8, "codes")
    *stack, rows, columns = codes.shape
    words = words_per_row(columns)
    tiled_rows = row_tiles(rows) * ROW_TILE
    padding = [(0, 0)] * len(stack) + [
        (0, tiled_rows - rows),
        (0, padded_columns(columns) - columns),
    ]
    by_word = xp.pad(codes, padding)[..., column_of_word_bit(words)].astype(np.uint32)
    planes = [
        xp.sum(
            ((by_word >> np.uint32(PLANES - 1 - plane)) & np.uint32(1)) << bit_shifts(plane),
            axis=-1,
            dtype=np.uint32,
        )
        for plane in range(PLANES)
    ]
    stacked = xp.stack(planes, axis=-3)  # [*S, 8, N, W]
    by_page = stacked.reshape(*stack, PAGES, PLANES_PER_PAGE, tiled_rows, words)
    return _tile(by_page).reshape(*stack, PAGES, *page_shape(rows, columns))


def unpack_words(pages: UInt32[Any, "*S p B C2 256"]) -> UInt8[Any, "*S N W 32"]:
    """First ``p`` pages to codes in the order of memory; the bits of absent pages are zero.

    Element ``[..., n, w, j]`` belongs to column ``column_of_word_bit(W)[w, j]``; N and W count the
    padding. A matmul that permutes its input once, instead of every weight, starts from here.
    """
    xp = _namespace(pages, np.uint32, "pages")
    by_row = _untile(pages)  # [*S, p, 2, N, W]
    codes = None
    for plane in range(by_row.shape[-4] * PLANES_PER_PAGE):
        word = by_row[..., plane // PLANES_PER_PAGE, plane % PLANES_PER_PAGE, :, :, None]
        bit = (word >> bit_shifts(plane)) & np.uint32(1)
        placed = bit << np.uint32(PLANES - 1 - plane)
        codes = placed if codes is None else codes | placed
    if codes is None:
        raise ValueError("unpacking needs at least one page, got none")
    return codes.astype(xp.uint8)


def unpack_pages(
    pages: UInt32[Any, "*S p B C2 256"], rows: int, columns: int
) -> UInt8[Any, "*S N K"]:
    """Inverse of ``pack_pages`` for the first ``p`` pages of a matrix [rows, columns]."""
    if pages.shape[-3:] != page_shape(rows, columns):
        raise ValueError(
            f"pages of shape {pages.shape[-3:]} do not hold a matrix [{rows}, {columns}], "
            f"whose pages have shape {page_shape(rows, columns)}"
        )
    codes = unpack_words(pages)
    words = codes.shape[-2]
    word_bit_of_column = np.argsort(column_of_word_bit(words).reshape(-1))[:columns]
    flat = codes.reshape(*codes.shape[:-2], words * WORD_BITS)
    return flat[..., :rows, word_bit_of_column]


def tile_scales(scales: Any) -> Any:
    """Anything by group and row [*S, G, N] to [*S, B, G, 64], with zeros for the padding."""
    xp = np if isinstance(scales, np.ndarray) else jnp
    *stack, groups, rows = scales.shape
    tiles = row_tiles(rows)
    padding = [(0, 0)] * (len(stack) + 1) + [(0, tiles * ROW_TILE - rows)]
    padded = xp.pad(scales, padding).reshape(*stack, groups, tiles, ROW_TILE)
    return xp.moveaxis(padded, -2, -3)


def untile_scales(scales: Any) -> Any:
    """[*S, B, G, 64] to [*S, G, 64 B]: the inverse of ``tile_scales``, but for the padding."""
    xp = np if isinstance(scales, np.ndarray) else jnp
    *stack, tiles, groups, rows = scales.shape
    return xp.moveaxis(scales, -3, -2).reshape(*stack, groups, tiles * rows)


def _tile(words: UInt32[Any, "*S 2 N W"]) -> Any:
    """Words by row to words by tile and step: [*S, B, s, plane, half, warp, g, t, j]."""
    *stack, planes, rows, width = words.shape
    v = chunks_side_by_side(width * WORD_BITS // CHUNK)
    axes = words.reshape(*stack, planes, rows // ROW_TILE, 4, 2, 8, -1, 4, v)
    n = len(stack)
    plane, tile, warp, half, g, step, t, j = range(n, n + 8)
    return axes.transpose(*range(n), tile, step, plane, half, warp, g, t, j)


def _untile(pages: UInt32[Any, "*S B C2 256"]) -> UInt32[Any, "*S 2 N W"]:
    *stack, tiles, lines, _ = pages.shape
    chunks = lines // PLANES_PER_PAGE
    v = chunks_side_by_side(chunks)
    axes = pages.reshape(*stack, tiles, chunks // v, PLANES_PER_PAGE, 2, 4, 8, 4, v)
    n = len(stack)
    tile, step, plane, half, warp, g, t, j = range(n, n + 8)
    by_row = axes.transpose(*range(n), plane, tile, warp, half, g, step, t, j)
    return by_row.reshape(*stack, PLANES_PER_PAGE, tiles * ROW_TILE, chunks * CHUNK // WORD_BITS)


def _namespace(array: Any, dtype: type, name: str) -> Any:
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype).name}, got {array.dtype}")
    return np if isinstance(array, np.ndarray) else jnp
