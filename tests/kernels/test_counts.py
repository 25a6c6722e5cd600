"""Counts of finished tiles, lane by lane on a CPU: who waits sees all that was counted.

Workers store items of a first matmul, count them, wait for tiles and read these, as layers do one
after another; which warps go ahead is drawn. What is stored differs from layer to layer.
"""

import numpy as np
import pytest

jax = pytest.importorskip("jax", minversion="0.11", reason="Mosaic GPU kernels need jax 0.11")
from jaxlib.mlir.dialects import arith  # noqa: E402
from kernels.warps import POINTER, WORD, Kernel, Memory, sync_grid  # noqa: E402

from pallas_kernels.mosaic import emit  # noqa: E402
from pallas_kernels.mosaic.counts import (  # noqa: E402
    counts_shape,
    emit_add,
    emit_add_one,
    emit_fill,
    emit_wait,
    emit_wait_one,
)
from pallas_kernels.mosaic.loops import loop  # noqa: E402
from pallas_kernels.mosaic.workers import WARPGROUPS, WARPS  # noqa: E402

THREADS = emit.WARPGROUP


def shares(items, blocks):
    """(start, end) of each worker, as ``Workers.share`` has them."""
    count = blocks * WARPGROUPS
    return [(w * items // count, (w + 1) * items // count) for w in range(count)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("blocks", "used", "stored", "read"),
    [
        pytest.param(3, (5, 3, 7), 4, 6, id="stretches"),
        pytest.param(3, (2, 0, 1), 2, 3, id="idle-workers"),
        pytest.param(1, (400, 37, 100), 1, 1, id="more-tiles-than-lanes"),
        pytest.param(2, (1, 1, 1), 48, 2, id="one-tile"),
    ],
)
def test_readers_see_what_was_counted(blocks, used, stored, read, seed):
    """``used``: tiles of each layer; ``stored`` and ``read``: items a tile of both matmuls."""
    memory, tiles, layers = Memory(), max(used), len(used)
    counts_rows, counts_words = counts_shape(tiles).shape
    counts, counts_view = memory.place(np.full((counts_rows, counts_words), 12345, np.int32))
    sums = memory.reserve(4 * THREADS * tiles * stored)[0]
    out, out_view = memory.place(np.full((layers, tiles * read, THREADS), -1, np.int32))

    def line(base, item):
        """Where the thread's word of an item lies."""
        return emit.move(base, emit.mul(emit.add(emit.mul(item, THREADS), emit.thread()), 4))

    def body(block, counts, sums, out, *bounds):
        for layer in range(layers):
            start, end, read_start, read_end = bounds[4 * layer : 4 * layer + 4]

            def store(item, layer=layer):
                value = emit.add(emit.mul(emit.thread(), 7), 1000 * layer)
                value = emit.add(emit.mul(value, 100), item)
                emit.store_words(line(sums, item), [value])

            def add_up(item, layer=layer):
                """Of all items of the tile, what the thread across has stored."""
                first = emit.mul(arith.divui(item, emit.const(read)), stored)
                across = arith.subi(emit.const(THREADS - 1), emit.thread())
                place = emit.move(sums, emit.mul(across, 4))

                def add(index, total):
                    where = emit.move(place, emit.mul(emit.add(first, index), 4 * THREADS))
                    return [emit.add(total, emit.load_words(where, 1)[0])]

                total = loop(0, stored, 1, add, [emit.const(0)])
                where = line(emit.move(out, 4 * THREADS * tiles * read * layer), item)
                emit.store_words(where, total)

            emit_fill(counts, counts_rows * counts_words, 0, block, blocks)
            sync_grid()
            loop(start, end, 1, store)
            emit_add(counts, start, end, stored)
            emit_wait(counts, read_start, read_end, read, stored)
            loop(read_start, read_end, 1, add_up)
            sync_grid()

    def bounds_of(block):
        """Of each layer and matmul: start and end of each thread's worker."""
        for layer in range(layers):
            for items in (used[layer] * stored, used[layer] * read):
                mine = shares(items, blocks)[WARPGROUPS * block :][:WARPGROUPS]
                yield from np.repeat(np.array(mine).T, THREADS, axis=1)

    given = ((block, counts, sums, out, *bounds_of(block)) for block in range(blocks))
    Kernel(body, WORD, *[POINTER] * 3, *[WORD] * (4 * layers)).run(memory, *given, seed=seed)
    in_use = np.arange(tiles) < used[-1]
    np.testing.assert_array_equal(counts_view[:, 0], np.where(in_use, stored, 0))
    across = np.arange(THREADS)[::-1]
    for layer in range(layers):
        items = np.arange(used[layer] * stored).reshape(-1, stored)
        expected = (100 * (7 * across + 1000 * layer))[None, :, None] + items[:, None, :]
        expected = np.repeat(expected.sum(-1), read, axis=0)
        np.testing.assert_array_equal(out_view[layer, : used[layer] * read], expected)
        assert (out_view[layer, used[layer] * read :] == -1).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_block_sees_what_all_workers_have_stored(seed):
    memory, blocks = Memory(), 3
    words = blocks * 32 * WARPS
    count, _ = memory.place(np.full(1, 12345, np.int32))
    stored = memory.reserve(4 * words)[0]
    out, out_view = memory.place(np.full(words, -1, np.int32))

    def body(block, count, stored, out):
        emit_fill(count, 1, 0, block, blocks)
        sync_grid()
        mine = emit.add(emit.mul(block, 32 * WARPS), emit.block_thread())
        emit.store_words(emit.move(stored, emit.mul(mine, 4)), [mine])
        emit_add_one(count)
        emit_wait_one(count, blocks * WARPGROUPS)
        emit.asm("bar.sync 0;", "", [], effects=True)
        across = emit.mul(arith.subi(emit.const(words - 1), mine), 4)
        read = emit.load_words(emit.move(stored, across), 1)
        emit.store_words(emit.move(out, emit.mul(mine, 4)), read)

    Kernel(body, WORD, *[POINTER] * 3).run(
        memory, *((block, count, stored, out) for block in range(blocks)), seed=seed
    )
    np.testing.assert_array_equal(out_view, np.arange(words)[::-1])
