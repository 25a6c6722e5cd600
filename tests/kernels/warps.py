"""Kernel bodies on a CPU, lane by lane: runs the MLIR that they emit on numpy.

Interpret mode of Pallas knows no inline PTX and no lanes. Here a body is traced as for a GPU, and
its operations are played on arrays of 32 lanes. Each warp runs by itself from one barrier to the
next; which go ahead and which lag behind is drawn, so that a barrier that is missing shows. Memory
is NaN until it is written; accesses must be aligned and inside of what was given.

Of an asynchronous copy the bytes are there when its barrier is waited for, and not before.
"""

import dataclasses
import heapq
from functools import partial

import numpy as np
from kernels.steps import GRID_BARRIER, Compiler, dtype_of, run

_GAP = 1024
POINTER, WORD, FLOAT = "!llvm.ptr", "i32", "f32"
"""Kinds of arguments; others are types of memrefs, given by their addresses."""


def shared_ref(shape, element):
    """Kind of an argument: a contiguous memref of shared memory."""
    extents = "x".join(map(str, shape))
    return f"memref<{extents}x{element}, #gpu.address_space<workgroup>>"


def shared_refs(scratch):
    """The same of scratch types whose elements are words."""
    return [
        shared_ref(kind.shape, "f32" if kind.dtype == np.float32 else "i32") for kind in scratch
    ]


def sync_grid():
    """Emitted in a body: a barrier over all blocks."""
    from pallas_kernels.mosaic import emit

    emit.asm(GRID_BARRIER, "", [], effects=True)


def threads_of(block):
    """Emitted in a body: the threads of a block, as the phases of a decode kernel take them."""
    from pallas_kernels.decode_layers.mosaic.project_plan import Threads
    from pallas_kernels.mosaic import emit

    return Threads(block, emit.shift_right(emit.block_thread(), 5))


def inline_at_once(monkeypatch):
    """Bodies of ``inline_mgpu`` are traced where they are called."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(plgpu, "inline_mgpu", lambda **rest: lambda run: partial(run, None))


class Memory:
    """Global and shared memory of all blocks in one space of addresses."""

    def __init__(self, nbytes=1 << 26):
        self.bytes = np.zeros(nbytes, np.uint8)
        self._known = np.zeros(nbytes, bool)
        self._end = _GAP
        self._barriers = {}

    def place(self, array):
        """(address, the array as it lies there); a multiple of 1024."""
        array = np.ascontiguousarray(array)
        start, stop = self._end, self._end + array.nbytes
        self._end = -(-stop // _GAP) * _GAP + _GAP
        self._known[start:stop] = True
        self.bytes[start:stop] = array.reshape(-1).view(np.uint8)
        return start, self.bytes[start:stop].view(array.dtype).reshape(array.shape)

    def reserve(self, nbytes):
        """Memory whose contents are NaN, as float32 and as bfloat16; as bytes."""
        return self.place(np.full(nbytes, 255, np.uint8))

    def load(self, address, size, mask):
        """Bytes [32, size]; zeros for lanes that are not in the mask."""
        result = np.zeros((32, size), np.uint8)
        result[mask] = self.bytes[self._access(address, size, mask)]
        return result

    def store(self, address, values, mask):
        where = self._access(address, values.shape[1], mask)
        self.bytes[where] = values[mask]
        assert (self.bytes[where] == values[mask]).all(), "lanes write different bytes to one place"

    def _access(self, address, size, mask):
        start = address[mask].astype(np.int64)
        where = start[:, None] + np.arange(size)
        assert (start % size == 0).all(), f"not aligned to {size} bytes"
        assert self._known[where].all(), "outside of what was given"
        return where

    def barrier(self, address):
        """That of transactions at an address; ready."""
        return self._barriers.setdefault(int(address), Barrier())


@dataclasses.dataclass
class Barrier:
    """Counts one arrival and the bytes that it says; phases alternate."""

    phase: int = 0
    expected: int | None = None
    copies: list = dataclasses.field(default_factory=list)

    def expect(self, nbytes):
        assert self.expected is None, "the phase before has not been waited for"
        self.expected = nbytes

    def has_passed(self, parity, memory):
        if self.expected == sum(size for _, _, size in self.copies) and self.phase == parity:
            for target, source, size in self.copies:
                memory.bytes[target : target + size] = memory.bytes[source : source + size]
            self.phase, self.expected, self.copies = 1 - self.phase, None, []
        return self.phase != parity


class Kernel:
    """``body(*arguments)``, traced; what it returns, if anything, are values of its threads."""

    def __init__(self, body, *kinds):
        from jax._src.interpreters import mlir
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import func

        with mlir.make_ir_context(), ir.Location.unknown():
            module = ir.Module.create()
            for part, number in (("major", 9), ("minor", 0)):
                attribute = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), number)
                module.operation.attributes[f"mosaic_gpu.arch_{part}"] = attribute
            types = [ir.Type.parse(kind) for kind in kinds]
            with ir.InsertionPoint(module.body):
                entry = func.FuncOp("body", (types, [])).add_entry_block()
            with ir.InsertionPoint(entry):
                results = body(*entry.arguments) or []
                func.ReturnOp([])
            compiler = Compiler()
            dtypes = [dtype_of(argument.type) for argument in entry.arguments]
            self._arguments = list(zip(compiler.slots(entry.arguments), dtypes, strict=True))
            self._steps = compiler.block(entry)
            self._results = compiler.slots(results)
            self._count = len(compiler.slot_of)

    def run(self, memory, *blocks, warps=12, at_grid_barrier=None, seed=0):
        """Runs a block for each tuple of arguments: ints, the same in all threads, or arrays.

        ``at_grid_barrier`` is called when all have come to one. Returns, for each block, its
        results, arrays of all threads.
        """
        every = []
        for arguments in blocks:
            every.append([])
            for index in range(warps):
                warp = Warp(memory, len(every) - 1, index, warps, [None] * self._count)
                for (slot, dtype), value in zip(self._arguments, arguments, strict=True):
                    value = np.broadcast_to(np.asarray(value).astype(dtype), 32 * warps)
                    warp.values[slot] = value[32 * index :][:32]
                every[-1].append(warp)
        flat = [warp for block in every for warp in block]
        with np.errstate(all="ignore"):
            _schedule(self._steps, flat, at_grid_barrier, np.random.default_rng(seed))
        return [
            [np.concatenate([warp.values[slot] for warp in block]) for slot in self._results]
            for block in every
        ]


@dataclasses.dataclass(eq=False)
class Warp:
    memory: Memory
    block: int
    index: int
    warps: int
    """Of its block."""
    values: list
    """By slot."""
    copies: list = dataclasses.field(default_factory=list)
    """Of its lanes, that are under way: (target, source, bytes, mask)."""
    is_committed: bool = True
    """Whether each product of wgmma that it started is in a group."""


def _schedule(steps, warps, at_grid_barrier, rng):
    """The first in line that can go on does; who leaves a barrier gets a new place in it."""
    tasks = [run(steps, warp, np.ones(32, bool)) for warp in warps]
    line, spinning = [], []
    waiting = {}  # by (block, number), or None for the whole grid: the warps that have come

    def line_up(indices):
        for index in indices:
            heapq.heappush(line, (rng.random(), index))

    line_up(range(len(warps)))
    while line:
        _, index = heapq.heappop(line)
        stop = next(tasks[index], "end")
        if stop == "spin":
            spinning.append(index)
            continue
        line_up(spinning)
        spinning.clear()
        if stop == "end":
            continue
        barrier, count = stop
        come = waiting.setdefault(barrier, [])
        come.append(index)
        if len(come) == (len(warps) if barrier is None else count):
            if barrier is None and at_grid_barrier is not None:
                at_grid_barrier()
            line_up(waiting.pop(barrier))
    assert not spinning, "a transaction barrier is waited for that nobody arrives at"
    assert not waiting, f"warps never leave barriers {list(waiting)}"
