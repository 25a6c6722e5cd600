"""Sums that say themselves whether they are there, lane by lane on a CPU.

Layers come one after another in one memory, and which warps go ahead is drawn: who waits sees what
was stored in this layer, and nothing of the layer before.
"""

import numpy as np
import pytest

jax = pytest.importorskip("jax", minversion="0.11", reason="Mosaic GPU kernels need jax 0.11")
from jaxlib.mlir.dialects import arith  # noqa: E402
from kernels.warps import POINTER, WORD, Kernel, Memory, sync_grid  # noqa: E402

from pallas_kernels.mosaic import emit  # noqa: E402
from pallas_kernels.mosaic.counts import emit_fill  # noqa: E402
from pallas_kernels.mosaic.loops import loop  # noqa: E402
from pallas_kernels.mosaic.presence import (  # noqa: E402
    MISSING,
    emit_await,
    emit_await_fours,
    emit_store,
)
from pallas_kernels.mosaic.workers import WARPS  # noqa: E402

BLOCKS, LAYERS, PIECES = 2, 3, 3
THREADS = 32 * WARPS


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fours", [False, True], ids=["words", "fours"])
def test_readers_wait_for_what_is_stored(fours, seed):
    """Every thread stores a pair now and then, and reads some pieces of what others store."""
    width, read = (4, emit_await_fours) if fours else (1, emit_await)
    words = width * PIECES * THREADS  # of a block's threads together
    memory = Memory()
    sums = memory.place(np.zeros(BLOCKS * words, np.int32))[0]
    out, view = memory.place(np.zeros((BLOCKS, LAYERS, THREADS), np.uint32))

    def body(block, sums, out):
        thread = emit.block_thread()
        for layer in range(LAYERS):
            emit_fill(sums, BLOCKS * words, MISSING, block, BLOCKS)
            sync_grid()

            def store(pair, layer=layer):
                first = emit.add(emit.mul(pair, 2), emit.mul(block, words))
                values = [emit.add(emit.add(first, c), 7 * layer) for c in range(2)]
                emit_store(emit.move(sums, emit.mul(first, 4)), values)

            loop(thread, words // 2, THREADS, store)
            other = emit.mul(arith.subi(emit.const(BLOCKS - 1), block), words)
            across = arith.subi(emit.const(THREADS - 1), thread)
            starts = [
                emit.add(other, emit.mul(emit.add(across, piece * THREADS), width))
                for piece in range(PIECES)
            ]
            total = emit.const(0)
            for word in read([emit.move(sums, emit.mul(start, 4)) for start in starts]):
                total = emit.add(total, word)
            place = emit.add(emit.mul(block, LAYERS), layer)
            place = emit.add(emit.mul(place, THREADS), thread)
            emit.store_words(emit.move(out, emit.mul(place, 4)), [total])
            sync_grid()

    kernel = Kernel(body, WORD, POINTER, POINTER)
    kernel.run(memory, *[(block, sums, out) for block in range(BLOCKS)], warps=WARPS, seed=seed)

    block, layer, thread, piece, word = np.ogrid[:BLOCKS, :LAYERS, :THREADS, :PIECES, :width]
    across = THREADS - 1 - thread + piece * THREADS
    stored = (BLOCKS - 1 - block) * words + width * across + word + 7 * layer
    np.testing.assert_array_equal(view, stored.sum(axis=(3, 4)))
