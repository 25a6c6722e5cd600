"""Attention of the decode kernel, lane by lane on a CPU, against float64.

Memory that only the phase before writes is NaN until the barrier before is passed.
"""

import ml_dtypes
import numpy as np
import pytest

jax = pytest.importorskip("jax", minversion="0.11", reason="Mosaic GPU kernels need jax 0.11")
from kernels.warps import POINTER, WORD, Kernel, Memory, sync_grid, threads_of  # noqa: E402
from pairwise import pairwise  # noqa: E402

from pallas_kernels.decode_layers.mosaic.attend import emit_attend  # noqa: E402
from pallas_kernels.decode_layers.mosaic.attend_plan import (  # noqa: E402
    GROUP,
    HEAD,
    SMALL_BYTES,
    WORK_BYTES,
    AttendMemory,
    AttendPlan,
)
from pallas_kernels.mosaic import emit  # noqa: E402
from pallas_kernels.mosaic.workers import LEAD_WARP  # noqa: E402

BF16 = ml_dtypes.bfloat16
EPS = 1e-6


class Attention:
    """A random cache, heads of a step and what must come out.

    The cache is NaN from the new position on. Tolerance of y: the kernel rounds each weight to
    bfloat16, independent relative errors of at most r = 2^-9, so of variance r^2 / 3, of which six
    standard deviations are allowed; then y is rounded. Queries and the new key are rounded here
    and there; where float32 and float64 disagree about which way, a score moves by 2^-8 of one of
    128 products, which is far less.
    """

    def __init__(self, *, positions, context, group, kv_heads, blocks):
        self.positions = np.array(positions, np.int32)
        slots, q_heads = len(positions), group * kv_heads
        self.plan = AttendPlan(
            slots=slots, context=context, q_heads=q_heads, kv_heads=kv_heads, blocks=blocks, eps=EPS
        )
        rng = np.random.default_rng(context + group)
        self.qkv = rng.normal(size=(slots, q_heads + 2 * kv_heads, HEAD)).astype(BF16)
        self.norms = rng.uniform(0.5, 1.5, (2, HEAD)).astype(BF16)
        angles = rng.uniform(0, 7, (slots, HEAD // 2))
        self.cos, self.sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        old = (np.arange(context) < self.positions[:, None])[..., None, None]
        cache = rng.normal(size=(2, slots, context, kv_heads, HEAD))
        self.keys, self.values = np.where(old, cache, np.nan).astype(BF16)

    def turned(self, heads, norm):
        """Normed and rotated heads [B, N, D], rounded after each."""
        wide = heads.astype(np.float64)
        wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * norm.astype(np.float64)
        first, second = np.split(wide.astype(BF16).astype(np.float64), 2, axis=-1)
        cos, sin = self.cos[:, None].astype(np.float64), self.sin[:, None].astype(np.float64)
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(BF16)

    def define(self):
        """(y [B, Nq, D], its tolerance, keys, values)"""
        plan = self.plan
        q, k, v = np.split(self.qkv, [plan.q_heads, plan.q_heads + plan.kv_heads], axis=1)
        q, k = self.turned(q, self.norms[0]), self.turned(k, self.norms[1])
        keys, values = self.keys.copy(), self.values.copy()
        y, error = np.zeros(q.shape), np.zeros(q.shape)
        for slot, position in enumerate(self.positions):
            if position < 0:
                error[slot] = np.finfo(np.float32).max  # finite, no more
                continue
            keys[slot, position], values[slot, position] = k[slot], v[slot]
            for head in range(plan.q_heads):
                seen = slice(position + 1), head // plan.group
                old, of = (a[slot][seen].astype(np.float64) for a in (keys, values))
                scores = old @ q[slot, head].astype(np.float64) * HEAD**-0.5
                p = np.exp(scores - scores.max())
                p /= p.sum()
                y[slot, head] = p @ of
                error[slot, head] = 6 * 2**-9 / np.sqrt(3) * np.sqrt(p**2 @ of**2)
        return y, error + 2**-8 * np.abs(y), keys, values

    def run(self):
        """(y, keys, values, arrivals) as the kernel leaves them, and whether it did the rest."""
        plan, memory = self.plan, Memory()
        qkv, qkv_view = memory.place(np.full_like(self.qkv, np.nan))
        keys, keys_view = memory.place(self.keys)
        values, values_view = memory.place(self.values)
        arrivals, arrivals_view = memory.place(np.zeros(plan.pairs, np.int32))
        y, y_view = memory.place(np.full((plan.slots, plan.q_heads, HEAD), np.nan, BF16))
        done, done_view = memory.place(np.zeros(plan.blocks, np.int32))
        constants = self.positions, self.cos, self.sin, *self.norms
        positions, cos, sin, q_norm, k_norm = (memory.place(a)[0] for a in constants)
        parts = memory.reserve(4 * plan.pairs * plan.splits * GROUP * HEAD)[0]
        part_sums = memory.reserve(8 * plan.pairs * plan.splits * GROUP)[0]

        def body(block, done, *pointers):
            def meanwhile():
                where = emit.move(done, emit.mul(block, 4))
                emit.store_words(where, [threads_of(block).warp])

            emit_attend(plan, threads_of(block), AttendMemory(*pointers), sync_grid, meanwhile)

        def appear():
            qkv_view[...] = self.qkv

        shared = (
            (memory.reserve(WORK_BYTES)[0], memory.reserve(SMALL_BYTES)[0])
            for _ in range(plan.blocks)
        )
        given = AttendMemory(
            positions, cos, sin, qkv, q_norm, k_norm, keys, values, parts, part_sums, arrivals, y,
            None, None,
        )[:-2]  # fmt: skip
        Kernel(body, WORD, POINTER, *[POINTER] * len(AttendMemory._fields)).run(
            memory,
            *((block, done, *given, *own) for block, own in enumerate(shared)),
            at_grid_barrier=appear,
        )
        assert (done_view == LEAD_WARP).all()
        return y_view, keys_view, values_view, arrivals_view


CUTS = {
    "one-split": (112, 9, 1),
    "one-split-of-many-tiles": (400, 8, 1),
    "splits": (400, 33, 4),
}
"""Context, blocks, splits of a slot's context."""


@pytest.mark.parametrize(
    ("cut", "group", "positions"), pairwise([*CUTS], [8, 4], [(0, -1, 77, -2), (63, 64, 65, 0)])
)
def test_attention(cut, group, positions):
    """Of -2: the last position."""
    context, blocks, splits = CUTS[cut]
    positions = [context - 1 if position == -2 else position for position in positions]
    case = Attention(positions=positions, context=context, group=group, kv_heads=2, blocks=blocks)
    assert case.plan.splits == splits
    y, keys, values, arrivals = case.run()
    expected, error, expected_keys, expected_values = case.define()
    assert (np.abs(y.astype(np.float64) - expected) <= error).all()
    bits = values.view(np.uint16), expected_values.view(np.uint16)
    np.testing.assert_array_equal(*bits)
    np.testing.assert_allclose(
        keys.astype(np.float64), expected_keys.astype(np.float64), rtol=2**-7, atol=1e-6
    )
    old = np.arange(context) != case.positions[:, None]
    np.testing.assert_array_equal(keys.view(np.uint16)[old], case.keys.view(np.uint16)[old])
    assert not arrivals.any()
