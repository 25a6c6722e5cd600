"""The layout: bit-exact both ways, the same for numpy and JAX, and fixed by golden bytes."""

import hashlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layout


def codes_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)


@hypothesis.given(
    rows=st.integers(1, 150), columns=st.integers(1, 1100), seed=st.integers(0, 2**31 - 1)
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_packing_is_invertible(rows, columns, seed):
    codes = codes_of(rows, columns, seed)
    pages = layout.pack_pages(codes)
    assert pages.dtype == np.uint32
    assert pages.shape == (layout.PAGES, *layout.page_shape(rows, columns))
    np.testing.assert_array_equal(layout.unpack_pages(pages, rows, columns), codes)


@hypothesis.given(
    columns=st.integers(1, 700), pages=st.integers(1, 4), seed=st.integers(0, 2**31 - 1)
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_first_pages_hold_the_first_bits(columns, pages, seed):
    codes = codes_of(3, columns, seed)
    kept = layout.unpack_pages(layout.pack_pages(codes)[:pages], 3, columns)
    np.testing.assert_array_equal(kept, codes & (0xFF << (8 - 2 * pages) & 0xFF))


@pytest.mark.parametrize("columns", [64, 128, 256, 300, 768, 2048])
def test_jax_packs_the_same_bytes(columns):
    codes = codes_of(4, columns)
    pages = layout.pack_pages(codes)
    on_device = jax.jit(layout.pack_pages)(codes)
    np.testing.assert_array_equal(np.asarray(on_device), pages)
    unpacked = jax.jit(layout.unpack_pages, static_argnums=(1, 2))(on_device, 4, columns)
    np.testing.assert_array_equal(np.asarray(unpacked), codes)


def test_batches_pack_like_their_parts():
    codes = np.stack([codes_of(3, 200, seed) for seed in range(4)]).reshape(2, 2, 3, 200)
    pages = layout.pack_pages(codes)
    for index in np.ndindex(2, 2):
        np.testing.assert_array_equal(pages[index], layout.pack_pages(codes[index]))


def test_padding_is_zero():
    pages = layout.pack_pages(np.full((2, 65), 255, np.uint8))
    unpacked = layout.unpack_pages(pages, layout.ROW_TILE, layout.CHUNK)
    assert (unpacked[:2, :65] == 255).all()
    assert (unpacked[:2, 65:] == 0).all()
    assert (unpacked[2:] == 0).all()


@pytest.mark.parametrize("words", [4, 8, 12, 16, 24, 64])
def test_every_column_has_one_place(words):
    columns = layout.column_of_word_bit(words)
    assert sorted(columns.ravel().tolist()) == list(range(words * layout.WORD_BITS))
    for plane in range(layout.PLANES):
        assert sorted(layout.bit_shifts(plane).tolist()) == list(range(layout.WORD_BITS))


@pytest.mark.parametrize(
    ("row", "column", "plane", "word", "bit"),
    [
        # 4 chunks side by side in 512 columns: chunk 2, lane 1, register 3, byte 2
        (0, 2 * 128 + 16 * 3 + 4 * 1 + 2, 0, 4 * 1 + 2, 8 * 2 + 3),
        (0, 2 * 128 + 16 * 3 + 4 * 1 + 2, 1, 1024 + 4 * 1 + 2, 16 * 1 + 4 * 2 + 1),
        (0, 2 * 128 + 16 * 3 + 4 * 1 + 2, 4, 4 * 1 + 2, 8 * 2 + 3),
        (0, 2 * 128 + 16 * 3 + 4 * 1 + 2, 7, 1024 + 4 * 1 + 2, 16 * 1 + 4 * 2 + 1),
        # row 45 = 16 * 2 + 8 * 1 + 5: warp 2, half 1, g 5
        (45, 511, 0, 512 * 1 + 128 * 2 + 16 * 5 + 4 * 3 + 3, 31),
        (0, 0, 3, 1024, 0),
    ],
)
def test_places_worked_out_by_hand(row, column, plane, word, bit):
    codes = np.zeros((64, 512), np.uint8)
    codes[row, column] = 1 << (7 - plane)
    pages = layout.pack_pages(codes).reshape(layout.PAGES, -1)
    expected = np.zeros_like(pages)
    expected[plane // 2, word] = np.uint32(1) << np.uint32(bit)
    np.testing.assert_array_equal(pages, expected)


def test_a_tile_of_rows_is_contiguous():
    codes = codes_of(192, 768)
    pages = layout.pack_pages(codes)
    for tile in range(3):
        alone = layout.pack_pages(codes[64 * tile : 64 * (tile + 1)])
        np.testing.assert_array_equal(pages[:, tile], alone[:, 0])


def test_scales_are_cut_like_rows():
    scales = np.random.default_rng(0).normal(size=(2, 12, 130))
    tiled = layout.tile_scales(scales)
    assert tiled.shape == (2, 3, 12, 64)
    np.testing.assert_array_equal(tiled[1, 2, 5, :2], scales[1, 5, 128:])
    np.testing.assert_array_equal(layout.untile_scales(tiled)[..., :130], scales)
    assert (tiled[:, 2, :, 2:] == 0).all()
    np.testing.assert_array_equal(
        layout.untile_scales(jnp.asarray(tiled, jnp.float32)).shape, (2, 12, 192)
    )


def test_a_lane_reads_what_its_fragments_need():
    """The words of lane t hold k = 16 R + 4 t + i of its chunks, whole registers at a time."""
    columns = layout.column_of_word_bit(16).reshape(4, 4, 8, 4)  # lane, chunk, register, byte
    lane, chunk, register, byte = np.indices(columns.shape)
    np.testing.assert_array_equal(columns, 128 * chunk + 16 * register + 4 * lane + byte)


@pytest.mark.parametrize(
    ("columns", "digest"),
    [
        (64, "bd331ce6bd1e3328"),
        (256, "ae62d9bca70e5a0f"),
        (384, "3800479334bf8399"),
        (512, "22dc7e5e10628f1e"),
    ],
)
def test_golden_bytes(columns, digest):
    """Checkpoints in the world hold these bytes: a change needs another layout id."""
    codes = (np.arange(3 * columns) * 37 % 251).astype(np.uint8).reshape(3, columns)
    packed = layout.pack_pages(codes).astype("<u4").tobytes()
    assert hashlib.sha256(packed).hexdigest()[:16] == digest
    assert layout.LAYOUT_ID == "tile64-chunk128-v2"


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="codes must be uint8, got int64"):
        layout.pack_pages(np.zeros((1, 4), np.int64))
    with pytest.raises(TypeError, match="pages must be uint32"):
        layout.unpack_pages(np.zeros((1, 1, 2, 256), np.int32), 1, 4)
    with pytest.raises(ValueError, match=r"do not hold a matrix \[1, 129\]"):
        layout.unpack_pages(np.zeros((1, 1, 2, 256), np.uint32), 1, 129)
    with pytest.raises(ValueError, match="at least one page"):
        layout.unpack_pages(np.zeros((0, 1, 2, 256), np.uint32), 1, 4)
    with pytest.raises(ValueError, match="rows must be positive"):
        layout.row_tiles(0)
    with pytest.raises(ValueError, match="columns must be positive"):
        layout.words_per_row(0)
    with pytest.raises(ValueError, match="plane must be in"):
        layout.bit_shifts(8)
