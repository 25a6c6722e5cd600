"""The instructions that turn codes into fragments and multiply them, on a warpgroup made of numpy.

Interpret mode knows no inline PTX; here each of the few functions of ``emit`` that the code uses
is played on arrays of 32-bit words, one a thread. Swizzle, fragments and descriptors are as the
PTX manual has them. Codes and x are small enough for float32 sums to be exact.
"""

import ml_dtypes
import numpy as np
import pytest

jax = pytest.importorskip("jax", minversion="0.11", reason="Mosaic GPU kernels need jax 0.11")
from pallas_kernels.linear import mosaic_int8  # noqa: E402
from pallas_kernels.mosaic import emit  # noqa: E402

THREADS = 128
BF16 = ml_dtypes.bfloat16


def swizzled(offset, line):
    """Where a byte of lines of 128 or 64 bytes lies: 16-byte blocks exchanged, by 128 bytes."""
    return offset ^ ((offset >> 7) % (line // 16) << 4)


def in_memory(matrix, line):
    """Bytes of a matrix in tiles of 8 rows by ``line`` bytes, swizzled; rows of tiles first."""
    rows, row_bytes = matrix.shape[0], matrix[0].nbytes
    plain = matrix.view(np.uint8).reshape(rows // 8, 8, row_bytes // line, line)
    plain = plain.transpose(0, 2, 1, 3).reshape(-1)
    memory = np.empty_like(plain)
    memory[swizzled(np.arange(plain.size), line)] = plain
    return memory


class Warpgroup:
    """What the functions of ``emit`` do."""

    def __init__(self, x, step):
        self.x, self.next_rows = in_memory(x, 128), step // 64 * 1024
        self.started = self.committed = 0

    def lane(self):
        return np.arange(THREADS, dtype=np.uint32) % 32

    def warp(self):
        return np.arange(THREADS, dtype=np.uint32) // 32

    def const(self, value):
        return np.uint32(value)

    def add(self, a, b):
        return a + np.uint32(b)

    def mul(self, a, b):
        return a * np.uint32(b)

    def and_(self, a, mask):
        return a & np.uint32(mask)

    def xor(self, a, b):
        return a ^ np.uint32(b)

    def shift_right(self, a, bits):
        return a >> np.uint32(bits)

    def permute_bytes(self, low, high, selector):
        both = np.stack([low, np.broadcast_to(high, low.shape)], axis=-1).view(np.uint8)
        picked = [both[..., selector >> 4 * byte & 7] for byte in range(4)]
        return np.stack(picked, axis=-1).view(np.uint32)[..., 0]

    def sub_bf16_pair(self, a, b):
        a, b = (np.ascontiguousarray(v).view(BF16).astype(np.float32) for v in (a, b))
        return (a - b).astype(BF16).view(np.uint32)

    def pointer(self, memory):
        return memory, np.uint32(0)

    def move(self, where, offset):
        memory, start = where
        return memory, start + np.uint32(offset)

    def load_half(self, where):
        memory, start = where
        assert (start % 2 == 0).all()
        return memory[start].astype(np.uint32) | memory[start + 1].astype(np.uint32) << 8

    def wgmma_fence(self, sums, words):
        return sums, words

    def wgmma_commit(self):
        self.committed = self.started

    def wgmma_wait(self, pending, sums):
        assert self.committed == self.started
        return sums

    def move_descriptor(self, descriptor, nbytes):
        assert nbytes % 16 == 0
        return descriptor + nbytes

    def wgmma_bf16(self, sums, a, descriptor):
        self.started += 1
        lane, warp = self.lane(), self.warp()
        row = 16 * warp + lane // 4
        matrix = np.zeros((64, 16), np.float32)
        for register, word in enumerate(a):
            pair = word.view(BF16).astype(np.float32).reshape(THREADS, 2)
            for side in range(2):
                column = 2 * (lane % 4) + 8 * (register // 2) + side
                matrix[row + 8 * (register % 2), column] = pair[:, side]
        n, k = np.indices((2 * len(sums), 16))
        place = swizzled(descriptor + n // 8 * self.next_rows + n % 8 * 128 + 2 * k, 128)
        b = np.stack([self.x[place], self.x[place + 1]], axis=-1).view(BF16)[..., 0]
        products = matrix @ b.astype(np.float32).T
        return [
            register
            + products[row + 8 * (index // 2 % 2), index // 4 * 8 + 2 * (lane % 4) + index % 2]
            for index, register in enumerate(sums)
        ]


def test_the_numpy_warpgroup_has_the_names_of_emit():
    names = {name for name in vars(Warpgroup) if not name.startswith("__")}
    assert all(callable(getattr(emit, name)) for name in names)


def test_all_codes_are_exact(monkeypatch):
    monkeypatch.setattr(mosaic_int8, "emit", Warpgroup(np.zeros((8, 64), BF16), 64))
    codes = np.arange(-128, 128).astype(np.int8)
    for order in (codes, codes[::-1].copy(), np.roll(codes, 1)):
        low, high = mosaic_int8.code_pairs(order.view(np.uint32))
        found = np.stack([low, high], axis=-1).view(BF16).reshape(-1)
        np.testing.assert_array_equal(found.astype(np.float32), order)


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("step", [64, 128, 256])
@pytest.mark.parametrize("n", [8, 16])
def test_a_stage_is_multiplied(monkeypatch, rows, step, n):
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (rows, step)).astype(np.int8)
    x = rng.integers(-99, 100, (n, step)).astype(BF16)
    before = rng.integers(-9, 10, (rows, n)).astype(np.float32)
    monkeypatch.setattr(mosaic_int8, "emit", Warpgroup(x, step))

    thread = np.arange(THREADS)
    row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
    places = [  # of each register of the sums
        (64 * tile + row + 8 * half, 8 * eight + column + side)
        for tile in range(rows // 64)
        for eight in range(n // 8)
        for half in range(2)
        for side in range(2)
    ]
    where = mosaic_int8._Codes(in_memory(codes, min(step, 128)), rows, step)
    sums = mosaic_int8._multiply([before[place] for place in places], where, 0, step)

    expected = before + codes.astype(np.float32) @ x.astype(np.float32).T
    for place, found in zip(places, sums, strict=True):
        np.testing.assert_array_equal(found, expected[place])
