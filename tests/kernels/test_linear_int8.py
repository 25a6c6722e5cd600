"""The instructions that turn codes into fragments and multiply them, lane by lane on a CPU.

Codes and x are small enough for float32 sums to be exact.
"""

import ml_dtypes
import numpy as np
import pytest

jax = pytest.importorskip("jax", minversion="0.11", reason="Mosaic GPU kernels need jax 0.11")
from kernels.ptx import places_of_sums, swizzled_tiles  # noqa: E402
from kernels.warps import FLOAT, WORD, Kernel, Memory, shared_ref  # noqa: E402
from pairwise import pairwise  # noqa: E402

from pallas_kernels.linear import mosaic_int8  # noqa: E402

BF16 = ml_dtypes.bfloat16


def test_all_codes_are_exact():
    kernel = Kernel(mosaic_int8.code_pairs, WORD)
    codes = np.arange(-128, 128).astype(np.int8)
    for order in (codes, codes[::-1].copy(), np.roll(codes, 1)):
        ((low, high),) = kernel.run(None, [order.view(np.uint32)], warps=2)
        found = np.stack([low, high], axis=-1).view(BF16).reshape(-1)
        np.testing.assert_array_equal(found.astype(np.float32), order)


@pytest.mark.parametrize(("step", "rows", "n"), pairwise([64, 128, 256], [64, 128], [8, 16]))
def test_a_stage_is_multiplied(rows, step, n):
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (rows, step)).astype(np.int8)
    x = rng.integers(-99, 100, (n, step)).astype(BF16)
    before = rng.integers(-9, 10, (rows, n)).astype(np.float32)
    line = min(step, 128)

    def body(codes, x, *sums):
        where, descriptor = mosaic_int8._Codes(codes, rows, step), mosaic_int8._descriptor(x, step)
        return mosaic_int8._multiply(list(sums), where, descriptor, step)

    memory = Memory()
    given = [memory.place(swizzled_tiles(codes, line))[0], memory.place(swizzled_tiles(x))[0]]
    kinds = [
        shared_ref((rows // 8, step // line, 8, line), "i8"),
        shared_ref((n // 8, step // 64, 8, 64), "bf16"),
    ]
    places = [
        (64 * tile + row, column) for tile in range(rows // 64) for row, column in places_of_sums(n)
    ]
    sums = [before[place] for place in places]
    (sums,) = Kernel(body, *kinds, *[FLOAT] * len(sums)).run(memory, (*given, *sums), warps=4)

    expected = before + codes.astype(np.float32) @ x.astype(np.float32).T
    for place, found in zip(places, sums, strict=True):
        np.testing.assert_array_equal(found, expected[place])
