"""Projections of the decode kernel, lane by lane on a CPU, against float64.

Memory that only the phase before writes is NaN until the barrier before is passed.
"""

import functools

import ml_dtypes
import numpy as np
import pytest

jax = pytest.importorskip("jax", minversion="0.11", reason="Mosaic GPU kernels need jax 0.11")
from jaxlib.mlir.dialects import arith, llvm  # noqa: E402
from kernels.warps import (  # noqa: E402
    POINTER,
    WORD,
    Kernel,
    Memory,
    shared_ref,
    sync_grid,
    threads_of,
)
from pairwise import pairwise  # noqa: E402

from pallas_kernels.decode_layers.mosaic.project import emit_project  # noqa: E402
from pallas_kernels.decode_layers.mosaic.project_fetch import (  # noqa: E402
    emit_fetch,
    emit_fetched,
)
from pallas_kernels.decode_layers.mosaic.project_plan import (  # noqa: E402
    UNIT,
    WARPS,
    ProjectPlan,
    Weight,
)
from pallas_kernels.decode_layers.shapes import RING_BYTES  # noqa: E402
from pallas_kernels.mosaic import emit  # noqa: E402
from pallas_kernels.mosaic.bulk import BARRIERS  # noqa: E402
from pallas_kernels.mosaic.loops import when  # noqa: E402
from pallas_kernels.mosaic.workers import LEAD_WARP, SPARE_WARP  # noqa: E402

BF16 = ml_dtypes.bfloat16
EPS = 1e-6


def is_warp(threads, number):
    return arith.cmpi(arith.CmpIPredicate.eq, threads.warp, emit.const(number))


def of_warps(plan, x):
    """Views of the columns of x [T, K] that a warp multiplies."""
    units = x.reshape(*x.shape[:-1], -1, UNIT)
    return [units[..., warp::WARPS, :] for warp in range(min(WARPS, plan.units))]


def of_limbs(plan, x):
    """What two int8 hold of x [T, K], float64, as ``project_limbs`` has it."""
    result = x.copy()
    for part in of_warps(plan, result):
        largest = np.abs(part).max((-1, -2), keepdims=True)
        step = 2.0 ** (np.floor(np.log2(np.maximum(largest * (1 + 2**-7), 2.0**-100))) - 14)
        part[...] = np.rint(part / step) * step
    return result


class Projection:
    """A random layer's weights, input and residual, in memory, and what must come out.

    Each product of bfloat16 is exact in float32, and of limbs in int32, so only sums err: 2e-6 of
    the sum of magnitudes.
    """

    def __init__(self, *, tokens, bits, outputs, inputs, blocks, eps, x=None, codes=None):
        """x, codes: if not random."""
        self.plan = ProjectPlan(
            tokens=tokens, outputs=outputs, inputs=inputs, blocks=blocks, bits=bits, eps=eps
        )
        rng = np.random.default_rng(tokens)
        if codes is not None:
            rows, scale = codes, np.ones(outputs, np.float32)
        elif bits == 8:
            rows = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
            scale = rng.uniform(1e-3, 2e-3, outputs).astype(np.float32)
        else:
            rows = rng.normal(size=(outputs, inputs)).astype(BF16)
            scale = np.ones(outputs, np.float32)
        norm = rng.uniform(0.5, 1.5, inputs).astype(BF16)
        self.x = rng.normal(size=(tokens, inputs)).astype(BF16) if x is None else x
        self.memory = memory = Memory()
        self.rows, self.scale, self.norm = (memory.place(a)[0] for a in (rows, scale, norm))
        self.x_address, self._x = memory.place(np.full_like(self.x, np.nan))
        self.residual_address, residual_view = memory.place(
            rng.normal(size=(tokens, outputs)).astype(BF16)
        )
        self.residual_view, self.residual = residual_view, residual_view.astype(np.float64)
        self.out, self.y = memory.place(np.full((tokens, outputs), np.nan, np.float32))

        x, inverse = self.x.astype(np.float64), 1.0
        if eps is not None:
            inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
            x = (x * norm.astype(np.float64)).astype(BF16).astype(np.float64)
        if bits == 8:
            x = of_limbs(self.plan, x)
        weight = rows.astype(np.float64) * scale[:, None].astype(np.float64)
        self.expected = inverse * (x @ weight.T)
        self.error = 2e-6 * inverse * (np.abs(x) @ np.abs(weight).T)

    def appear(self):
        """The input is there now."""
        self._x[...] = self.x

    def store(self, out):
        def store(token, row, y):
            where = emit.move64(out, token, 4 * self.plan.outputs)
            emit.store_words(emit.move(where, emit.mul(row, 4)), [emit.bits_of(y)])

        return store

    def assert_matches(self, residual=0.0):
        assert (np.abs(self.y - residual - self.expected) <= self.error).all()


SHAPES = {
    "uneven": (80, 1024, 3, True, (1, 2)),
    "residual": (80, 1024, 6, False, (2, 2)),
    "idle-blocks-and-warps": (32, 256, 6, True, (1, 1)),
    "many-tiles": (216, 1600, 2, True, (3, 5)),
    "wide": (32, 8192, 2, False, (2, 2)),
}
"""Outputs, inputs, blocks, whether there is a norm, copies that start early."""


@pytest.mark.parametrize(
    ("shape", "tokens", "bits", "layer"), pairwise([*SHAPES], [1, 5, 8, 16], [16, 8], [0, 3])
)
def test_projection(shape, tokens, bits, layer):
    """With the copies that bring its weights; barriers are as ``layer`` layers before left them.

    Some copies start ahead of the barrier behind which the input is, some behind it, some wait for
    others.
    """
    outputs, inputs, blocks, norm, early = SHAPES[shape]
    case = Projection(
        tokens=tokens, bits=bits, outputs=outputs, inputs=inputs, blocks=blocks,
        eps=EPS if norm else None,
    )  # fmt: skip
    run_projection(case, early, layer)
    case.assert_matches(0.0 if norm else case.residual)


def run_projection(case, early, layer=0):
    """With a norm, or else with the residual. early: as for ``test_projection``."""
    plan, memory = case.plan, case.memory
    norm = plan.eps is not None

    def body(block, layer, rows, scale, of_norm, x, residual, out, shared, stage, barriers):
        threads, weight = threads_of(block), Weight(rows, scale)
        target = llvm.ptrtoint(emit.i32_type(), shared)
        fetch = functools.partial(emit_fetch, plan, threads, weight, target, barriers, layer)

        def spare(start, end):
            when(is_warp(threads, SPARE_WARP), lambda: fetch(start, end))

        spare(0, early[0])
        if norm:
            spare(early[0], plan.pieces)
        else:
            rest = functools.partial(fetch, early[0], plan.pieces, early[0])
            when(is_warp(threads, LEAD_WARP), rest)
        emit_project(
            plan, threads, weight, shared, stage,
            functools.partial(emit_fetched, plan, barriers, layer), sync_grid,
            x, of_norm if norm else None, None if norm else residual, case.store(out),
        )  # fmt: skip

    def block(number):
        barriers = memory.reserve(64)[0]
        for address in range(barriers, barriers + 64, 8):
            memory.barrier(address).phase = layer % 2
        shared, stage = (memory.reserve(n)[0] for n in (plan.shared_bytes, plan.stage_bytes))
        given = case.rows, case.scale, case.norm, case.x_address, case.residual_address, case.out
        return number, layer, *given, shared, stage, barriers

    Kernel(body, WORD, WORD, *[POINTER] * 8, shared_ref((1, 8, 2), "i32")).run(
        memory, *map(block, range(plan.blocks)), at_grid_barrier=case.appear
    )


def identity(tokens, x):
    """What comes out if the weights are an identity, float64 [T, K]: x as limbs have it."""
    inputs = x.shape[-1]
    case = Projection(
        tokens=tokens, bits=8, outputs=inputs, inputs=inputs, blocks=4, eps=None, x=x,
        codes=np.eye(inputs, dtype=np.int8),
    )  # fmt: skip
    case.residual_view[...] = 0
    run_projection(case, (2, 2))
    return case.plan, case.y.astype(np.float64)


def outlying(rng, inputs, factor):
    """A normal row, of which 20 numbers are ``factor`` times the others' size, and their places."""
    x, places = rng.normal(size=inputs), rng.choice(inputs, 20, replace=False)
    x[places] *= factor
    return x, places


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_limbs_err_by_less_than_they_may(tokens):
    """Rows with outliers, of numbers that round up to a power of two, of ends of the range."""
    inputs, rng = 832, np.random.default_rng(tokens)
    x = np.stack([outlying(rng, inputs, factor)[0] for factor in (300, 1, 20, 100, 1000)] * 2)
    x = x.astype(BF16)
    x[5] = rng.choice(np.array([1.9921875, -1.9921875, 2**-8, 1.5 * 2**-14]), inputs)
    x[6] *= BF16(2.0**-120)
    x[7] = rng.choice(np.array([0, -3e38]), inputs)
    x[8, ::2] = 0
    x = np.roll(x, -tokens, axis=0)[:tokens]
    plan, y = identity(tokens, x)
    for exact, found in zip(of_warps(plan, x.astype(np.float64)), of_warps(plan, y), strict=True):
        largest = np.abs(exact).max((-1, -2), keepdims=True)
        error = np.abs(found - exact)
        assert (error <= np.maximum(2**-15 * (1 + 2**-7) * largest, 2.0**-115)).all()
        assert (error[np.abs(exact) > np.maximum(largest, 2.0**-100) / 127] == 0).all()


@pytest.mark.parametrize("factor", [1, 20, 100, 300, 1000])
def test_limbs_err_less_than_the_formats(factor):
    """A product errs less by them than by bfloat16 numbers, and than by outliers' 8-bit weights."""
    inputs, rng = 832, np.random.default_rng(factor)
    before, outliers = outlying(rng, inputs, factor)
    x = before.astype(BF16)
    _, y = identity(1, x[None])
    weights = rng.normal(size=(500, inputs))
    weights *= 127 / np.abs(weights).max(-1, keepdims=True)
    codes = np.rint(weights)
    of_limbs, of_numbers, of_weights = (
        np.sqrt(np.mean(error**2))
        for error in (
            codes @ (y[0] - x.astype(np.float64)),
            codes @ (x.astype(np.float64) - before),
            (codes - weights)[:, outliers] @ before[outliers],
        )
    )
    assert 4 * of_limbs < of_numbers
    assert 20 * of_limbs < of_weights


@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_a_number_that_is_not_finite_shows(number):
    """In its token's results, and in no other's."""
    case = Projection(tokens=2, bits=8, outputs=32, inputs=256, blocks=1, eps=None)
    case.x[1, 100] = number
    run_projection(case, (2, 2))
    assert np.isfinite(case.y[0]).all()
    assert not np.isfinite(case.y[1]).any()


def test_shares_of_the_projections_of_30b():
    """Every row has one block, none has more than it has shared memory for."""
    for bits, n, k in ((16, 5120, 2048), (16, 2048, 4096), (8, 5120, 2048), (8, 2048, 4096)):
        plan = ProjectPlan(tokens=16, outputs=n, inputs=k, blocks=132, bits=bits, eps=None)
        assert plan.shared_bytes + plan.stage_bytes <= RING_BYTES
        assert 2 <= plan.pieces <= BARRIERS
