"""The layout: bit-exact both ways, the same for numpy and JAX, and fixed by golden bytes."""

import hashlib

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layout


def codes_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)


@hypothesis.given(
    rows=st.integers(1, 5), columns=st.integers(1, 1100), seed=st.integers(0, 2**31 - 1)
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_packing_is_invertible(rows, columns, seed):
    codes = codes_of(rows, columns, seed)
    pages = layout.pack_pages(codes)
    assert pages.dtype == np.uint32
    assert pages.shape == (layout.PAGES, *layout.page_shape(rows, columns))
    np.testing.assert_array_equal(layout.unpack_pages(pages, columns), codes)


@hypothesis.given(
    columns=st.integers(1, 700), pages=st.integers(1, 4), seed=st.integers(0, 2**31 - 1)
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_first_pages_hold_the_first_bits(columns, pages, seed):
    codes = codes_of(3, columns, seed)
    kept = layout.unpack_pages(layout.pack_pages(codes)[:pages], columns)
    np.testing.assert_array_equal(kept, codes & (0xFF << (8 - 2 * pages) & 0xFF))


@pytest.mark.parametrize("columns", [64, 128, 256, 300, 768, 2048])
def test_jax_packs_the_same_bytes(columns):
    codes = codes_of(4, columns)
    pages = layout.pack_pages(codes)
    on_device = layout.pack_pages(jnp.asarray(codes))
    np.testing.assert_array_equal(np.asarray(on_device), pages)
    np.testing.assert_array_equal(np.asarray(layout.unpack_pages(on_device, columns)), codes)


def test_batches_pack_like_their_parts():
    codes = np.stack([codes_of(3, 200, seed) for seed in range(4)]).reshape(2, 2, 3, 200)
    pages = layout.pack_pages(codes)
    for index in np.ndindex(2, 2):
        np.testing.assert_array_equal(pages[index], layout.pack_pages(codes[index]))


def test_padding_is_zero():
    pages = layout.pack_pages(np.full((2, 65), 255, np.uint8))
    unpacked = layout.unpack_pages(pages, layout.CHUNK)
    assert (unpacked[:, :65] == 255).all()
    assert (unpacked[:, 65:] == 0).all()


@pytest.mark.parametrize("words", [4, 8, 12, 16, 24, 64])
def test_every_column_has_one_place(words):
    columns = layout.column_of_word_bit(words)
    assert sorted(columns.ravel().tolist()) == list(range(words * layout.WORD_BITS))
    for plane in range(layout.PLANES):
        assert sorted(layout.bit_shifts(plane).tolist()) == list(range(layout.WORD_BITS))


@pytest.mark.parametrize(
    ("column", "plane", "word", "bit"),
    [
        # 4 chunks side by side in 512 columns: chunk 2, lane 1, register 3, byte 2
        (2 * 128 + 16 * 3 + 4 * 1 + 2, 0, 1 * 4 + 2, 8 * 2 + 3),
        (2 * 128 + 16 * 3 + 4 * 1 + 2, 1, 1 * 4 + 2, 16 * 1 + 4 * 2 + 1),
        (2 * 128 + 16 * 3 + 4 * 1 + 2, 4, 1 * 4 + 2, 8 * 2 + 3),
        (2 * 128 + 16 * 3 + 4 * 1 + 2, 7, 1 * 4 + 2, 16 * 1 + 4 * 2 + 1),
        (511, 0, 15, 31),
        (0, 3, 0, 0),
    ],
)
def test_places_worked_out_by_hand(column, plane, word, bit):
    codes = np.zeros((1, 512), np.uint8)
    codes[0, column] = 1 << (7 - plane)
    planes = layout.pack_pages(codes).reshape(layout.PLANES, 16)
    expected = np.zeros_like(planes)
    expected[plane, word] = np.uint32(1) << np.uint32(bit)
    np.testing.assert_array_equal(planes, expected)


def test_a_lane_reads_what_its_fragments_need():
    """The words of lane t hold k = 16 R + 4 t + i of its chunks, whole registers at a time."""
    columns = layout.column_of_word_bit(16).reshape(4, 4, 8, 4)  # lane, chunk, register, byte
    lane, chunk, register, byte = np.indices(columns.shape)
    np.testing.assert_array_equal(columns, 128 * chunk + 16 * register + 4 * lane + byte)


@pytest.mark.parametrize(
    ("columns", "digest"),
    [
        (64, "6a21b5a7a63c5730"),
        (256, "5fc2e7c0a9eb3663"),
        (384, "53ad9d6f350c2e45"),
        (512, "7f9f84fd4dd7549a"),
    ],
)
def test_golden_bytes(columns, digest):
    """Checkpoints in the world hold these bytes: a change needs another layout id."""
    codes = (np.arange(3 * columns) * 37 % 251).astype(np.uint8).reshape(3, columns)
    packed = layout.pack_pages(codes).astype("<u4").tobytes()
    assert hashlib.sha256(packed).hexdigest()[:16] == digest
    assert layout.LAYOUT_ID == "quad-chunk128-v1"


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="codes must be uint8, got int64"):
        layout.pack_pages(np.zeros((1, 4), np.int64))
    with pytest.raises(TypeError, match="pages must be uint32"):
        layout.unpack_pages(np.zeros((1, 2, 1, 4), np.int32), 4)
    with pytest.raises(ValueError, match="do not hold 129 columns"):
        layout.unpack_pages(np.zeros((1, 2, 1, 4), np.uint32), 129)
    with pytest.raises(ValueError, match="at least one page"):
        layout.unpack_pages(np.zeros((0, 2, 1, 4), np.uint32), 4)
    with pytest.raises(ValueError, match="columns must be positive"):
        layout.words_per_row(0)
    with pytest.raises(ValueError, match="plane must be in"):
        layout.bit_shifts(8)
