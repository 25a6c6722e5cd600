"""Limbs of the input of expert matmuls and their sums, lane by lane on a CPU.

What comes out is defined exactly: float32 sums in a fixed order, one rounding to bfloat16, limbs.
"""

import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernels import ptx, warps
from kernels.targets import needs_mosaic
from kernels.warps import inline_at_once
from pairwise import pairwise

from pallas_kernels.layout import padded_columns

pytestmark = needs_mosaic
BF16 = ml_dtypes.bfloat16


def splat(value):
    """An array [] that every thread holds."""
    return types.SimpleNamespace(registers=np.array(value, object))


class Tile:
    """Memory of a tile with some rows: its assignments, limbs and scales."""

    def __init__(self, *, columns, rows, present):
        from pallas_kernels.expert_ffn.mosaic.limbs import SCALE_WORDS

        self.memory, self.present = warps.Memory(), present
        shape = columns // 16, 2 * rows, 16
        self.rows = np.where(np.arange(rows) < present, 3 + 5 * np.arange(rows)[::-1], -1)
        limbs, self._limbs = self.memory.reserve(columns * 2 * rows)
        scale, self._scale = self.memory.reserve(4 * rows * SCALE_WORDS)
        self._limbs = self._limbs.view(ml_dtypes.float8_e4m3fn).reshape(shape)
        self._scale = self._scale.view(np.float32).reshape(rows, SCALE_WORDS)
        self.addresses = self.memory.place(self.rows.astype(np.int32))[0], limbs, scale
        self.kinds = [
            warps.shared_ref((rows,), "i32"),
            warps.shared_ref(shape, "f8E4M3FN"),
            warps.shared_ref((rows, SCALE_WORDS), "f32"),
        ]

    def assert_holds(self, values):
        """Of the rows that are present, bfloat16 [present, columns]; other limbs are untouched."""
        values = values.astype(np.float32)
        largest = np.frexp(np.abs(values).max(axis=1))[1]  # in [0.5, 1) * 2**exponent
        scale = np.exp2(np.maximum(largest - 1 - 6, -100)).astype(np.float32)
        np.testing.assert_array_equal(self._scale[: self.present, 0], scale)
        scaled = values / scale[:, None]
        high = scaled.astype(ml_dtypes.float8_e4m3fn)
        low = (16 * (scaled - high.astype(np.float32))).astype(ml_dtypes.float8_e4m3fn)
        expected = np.stack([high, low], axis=1).reshape(2 * self.present, -1, 16).swapaxes(0, 1)
        ours, others = np.split(self._limbs, [2 * self.present], axis=1)
        np.testing.assert_array_equal(ours.astype(np.float32), expected.astype(np.float32))
        assert (others.view(np.uint8) == 255).all()


def silu(x):
    """As in the kernel, where the emulator has exact exponentials and reciprocals."""
    with np.errstate(over="ignore"):
        power = np.exp2(x * np.float32(-1.4426950408889634))
    return x * np.reciprocal(power + np.float32(1))


@pytest.mark.parametrize(
    ("width", "rows", "parts"),
    pairwise(
        [768, 384, 64, 200, 712], [(4, 1, 1), (4, 4, 1), (4, 4, 2), (4, 3, 3), (8, 8, 8)], [1, 2]
    ),
)
def test_gated_rows(monkeypatch, width, rows, parts):
    """rows: those of a tile, most and present ones."""
    from pallas_kernels.expert_ffn.mosaic import input_rows

    rows, most, present = rows
    rng = np.random.default_rng(width + present)
    tile, columns = 1, -(-2 * width // 64) * 64
    sums = rng.normal(size=(3, rows, parts, columns)).astype(np.float32)
    sums *= np.exp2(rng.integers(-20, 20, (3, rows, 1, 1))).astype(np.float32)
    sums[:, present:] = np.nan
    sums[..., 2 * width :] = np.nan
    case = Tile(columns=padded_columns(width), rows=rows, present=present)

    def body(sums, *refs):
        *refs, tile = refs
        input_rows.load_gated(
            sums, *refs, most=most, parts=parts, tile=splat(tile), width=width, wait=most == 1
        )  # fmt: skip

    inline_at_once(monkeypatch)
    monkeypatch.setattr(jnp, "asarray", lambda value, dtype: value)  # of registers
    address = case.memory.place(sums)[0]
    kind = f"memref<3x{rows}x{parts * columns}xf32>"
    kernel = warps.Kernel(body, kind, *case.kinds, warps.WORD)
    kernel.run(case.memory, (address, *case.addresses, tile), warps=4)

    total = sums[tile, :present].sum(axis=1)[:, : 2 * width]  # at most two: in any order
    gate, up = total[:, 0::2], total[:, 1::2]
    gated = np.pad((silu(gate) * up).astype(BF16), ((0, 0), (0, padded_columns(width) - width)))
    case.assert_holds(gated)


@pytest.mark.parametrize("columns", [1024, 128, 1408])
@pytest.mark.parametrize(("rows", "most", "present"), [(4, 1, 1), (4, 4, 3), (8, 7, 7)])
def test_rows_of_the_input(monkeypatch, columns, rows, most, present):
    from pallas_kernels.expert_ffn.mosaic import input_rows

    rng = np.random.default_rng(columns + present)
    divisor, first = 2, 128
    case = Tile(columns=columns, rows=rows, present=present)
    x = rng.normal(size=(20, first + columns + 128)).astype(BF16)
    x *= np.exp2(rng.integers(-120, 120, (20, 1))).astype(BF16)
    x[3] = 0

    def body(x, rows, limbs, scale, first):
        input_rows.fetch_rows(x, rows, limbs, scale, most=most, divisor=divisor, first=splat(first))
        input_rows.make_limbs(rows, limbs, scale, most=most)

    inline_at_once(monkeypatch)
    monkeypatch.setattr(jnp, "asarray", lambda value, dtype: value)  # of registers
    address = case.memory.place(x)[0]
    kind = f"memref<{x.shape[0]}x{x.shape[1]}xbf16>"
    kernel = warps.Kernel(body, kind, *case.kinds, warps.WORD)
    kernel.run(case.memory, (address, *case.addresses, first), warps=4)
    case.assert_holds(x[case.rows[:present] // divisor, first : first + columns])


@pytest.mark.parametrize(
    ("rows", "most", "present"), [(4, 1, 1), (4, 4, 1), (4, 4, 4), (8, 3, 3), (8, 8, 5)]
)
def test_sums_are_pairs_of_rows_eight_apart(monkeypatch, rows, most, present):
    """Rows that are not there keep their memory; gate and up of a unit are neighbours."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    from pallas_kernels.expert_ffn.mosaic import sums as module
    from pallas_kernels.mosaic import emit

    rng = np.random.default_rng(rows + present)
    y, factor, first = rng.normal(size=(64, 2 * rows)).astype(np.float32), np.float32(0.5), 64
    case = Tile(columns=128, rows=rows, present=present)
    case._scale[:, 0] = np.exp2(rng.integers(-3, 3, rows))

    def body(rows, limbs, scale, factor, out, first, *values):
        del limbs
        kind = ir.VectorType.get((2,), emit.f32_type())
        pairs = (vector.from_elements(kind, values[i : i + 2]) for i in range(0, len(values), 2))
        y = types.SimpleNamespace(registers=np.array([*pairs], object))
        module.store_sums(
            y, scale, rows, splat(factor), out, most=most, first=splat(first), tell=most == 1
        )

    inline_at_once(monkeypatch)
    kinds = warps.FLOAT, f"memref<{rows}x192xf32>", warps.WORD
    out, view = case.memory.place(np.full((rows, 192), 7, np.float32))
    values = [y[place] for place in ptx.places_of_sums(2 * rows)]
    warps.Kernel(body, *case.kinds, *kinds, *[warps.FLOAT] * len(values)).run(
        case.memory, (*case.addresses, factor, out, first, *values), warps=4
    )
    total = (y[:, 0::2] + y[:, 1::2] / 16) * (case._scale[:, 0] * factor)
    expected = np.full((rows, 192), 7, np.float32)
    places = total.reshape(4, 2, 8, rows).transpose(3, 0, 2, 1).reshape(rows, 64)
    expected[:present, 64:128] = places[:present]
    np.testing.assert_array_equal(view, expected)


def test_order_of_sums():
    from pallas_kernels.expert_ffn.mosaic import sums as module
    from pallas_kernels.mosaic import emit

    def body():
        return [module.row_of_place(emit.thread())]

    ((rows,),) = warps.Kernel(body).run(None, (), warps=4)
    np.testing.assert_array_equal(rows[:4], [0, 8, 1, 9])
    places = np.asarray(module.in_order_of_rows(np.arange(128)))
    np.testing.assert_array_equal(rows[places], np.arange(128))
