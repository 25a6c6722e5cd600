"""Kernel bodies on a CPU, lane by lane: runs the MLIR that they emit on numpy.

Interpret mode of Pallas knows no inline PTX and no lanes. Here a body is traced as for a GPU, and
its operations are played on arrays of 32 lanes. Each warp runs by itself from one barrier to the
next; which go ahead and which lag behind is drawn, so that a barrier that is missing shows. Memory
is NaN until it is written; accesses must be aligned and inside of what was given.

Of an asynchronous copy the bytes are there when its barrier is waited for, and not before.
"""

import dataclasses
import re
from functools import partial

import numpy as np
from kernels import ptx

LANES = np.arange(32)
_GAP = 1024
POINTER, WORD, FLOAT = "!llvm.ptr", "i32", "f32"
"""Kinds of arguments; others are types of memrefs, given by their addresses."""
_GRID_BARRIER = "barrier.grid;"


def shared_ref(shape, element):
    """Kind of an argument: a contiguous memref of shared memory."""
    extents = "x".join(map(str, shape))
    return f"memref<{extents}x{element}, #gpu.address_space<workgroup>>"


def sync_grid():
    """Emitted in a body: a barrier over all blocks."""
    from pallas_kernels.mosaic import emit

    emit.asm(_GRID_BARRIER, "", [], effects=True)


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
            compiler = _Compiler()
            dtypes = [_dtype(argument.type) for argument in entry.arguments]
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


def _schedule(steps, warps, at_grid_barrier, rng):
    """The first in line that can go on does, so that those at its end are far behind."""
    tasks = {warp: _run(steps, warp, np.ones(32, bool)) for warp in warps}
    line = [warps[index] for index in rng.permutation(len(warps))]
    held, spinning = set(), set()
    waiting = {}  # by (block, number), or None for the whole grid: the warps that have come
    while len(held) < len(line):
        able = (warp for warp in line if warp not in held and warp not in spinning)
        warp = next(able, None)
        assert warp is not None, "a transaction barrier is waited for that nobody arrives at"
        stop = next(tasks[warp], "end")
        if stop == "spin":
            spinning.add(warp)
            continue
        spinning.clear()
        held.add(warp)
        if stop == "end":
            continue
        barrier, count = stop
        come = waiting.setdefault(barrier, [])
        come.append(warp)
        if len(come) == (len(warps) if barrier is None else count):
            if barrier is None and at_grid_barrier is not None:
                at_grid_barrier()
            held.difference_update(waiting.pop(barrier))
    assert not waiting, f"warps never leave barriers {list(waiting)}"


def _run(steps, warp, mask):
    """A generator that stops at barriers."""
    for waits, step in steps:
        if waits:
            yield from step(warp, mask)
        else:
            step(warp, mask)


_DTYPES = {
    "i1": bool, "i8": np.uint8, "i16": np.uint16, "i32": np.uint32, "i64": np.uint64,
    "index": np.uint64, "f32": np.float32,
}  # fmt: skip
_SIGNED = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64}
_COMPARISONS = [
    np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal,
    np.less, np.less_equal, np.greater, np.greater_equal,
]  # fmt: skip
_FLOAT_COMPARISONS = {1: np.equal, 2: np.greater, 3: np.greater_equal, 4: np.less, 5: np.less_equal}


def _dtype(kind):
    return np.dtype(_DTYPES.get(str(kind), np.uint64))  # others are pointers


def _signed(value):
    return value.view(_SIGNED[value.dtype])


def _of_signed(function):
    return lambda a, b: function(_signed(a), _signed(b)).view(a.dtype)


_ELEMENTWISE = {
    "arith.addi": np.add, "llvm.add": np.add, "arith.subi": np.subtract,
    "arith.muli": np.multiply, "llvm.mul": np.multiply,
    "arith.divui": lambda a, b: a // np.maximum(b, 1), "arith.remui": lambda a, b: a % b,
    "arith.andi": np.bitwise_and, "arith.ori": np.bitwise_or, "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift, "arith.shrui": np.right_shift,
    "arith.maxsi": _of_signed(np.maximum), "arith.minsi": _of_signed(np.minimum),
    "arith.addf": np.add, "arith.subf": np.subtract, "arith.mulf": np.multiply,
    "arith.divf": np.divide, "arith.negf": np.negative,
    "arith.select": np.where,
}  # fmt: skip
_CONVERSIONS = {
    "arith.extui", "arith.trunci", "arith.index_cast", "arith.uitofp", "llvm.ptrtoint",
    "llvm.inttoptr", "llvm.addrspacecast",
}  # fmt: skip


class _Compiler:
    """Turns operations into functions (warp, mask); those that wait are generators."""

    def __init__(self):
        self.slot_of = {}

    def slots(self, values):
        return [self.slot_of.setdefault(value, len(self.slot_of)) for value in values]

    def block(self, block):
        return [step for op in block.operations if (step := self._step(op.operation))]

    def _step(self, op):
        name = op.name
        if name == "scf.if":
            return True, self._if(op)
        if name == "scf.for":
            return True, self._for(op)
        operands, results = self.slots(op.operands), self.slots(op.results)
        if name in ("scf.yield", "func.return"):
            return None
        if name == "llvm.inline_asm":
            text = op.attributes["asm_string"].value
            if waiting := _waiting(text):
                return True, lambda warp, mask: waiting(
                    warp, mask, *(warp.values[slot] for slot in operands)
                )
            struct = any(str(value.type).startswith("!llvm.struct") for value in op.results)
            run = partial(_asm, ptx.instruction(text), text, struct)
        else:
            run = _function(op)

        def step(warp, mask):
            values = run(warp, mask, *(warp.values[slot] for slot in operands))
            for slot in results:
                warp.values[slot] = values

        return False, step

    def _region(self, region):
        """(steps, slots of what it yields)"""
        (block,) = region.blocks
        steps = self.block(block)
        last = block.operations[len(block.operations) - 1].operation
        return steps, self.slots(last.operands)

    def _if(self, op):
        (condition,), results = self.slots(op.operands), self.slots(op.results)
        branches = [self._region(region) for region in op.regions if len(region.blocks)]

        def step(warp, mask):
            values = warp.values
            chosen = values[condition]
            for (steps, yielded), lanes in zip(branches, (chosen, ~chosen), strict=False):
                active = mask & lanes
                if not active.any():
                    continue
                yield from _run(steps, warp, active)
                for result, slot in zip(results, yielded, strict=True):
                    before = values[result]
                    whole = active.all() or before is None
                    values[result] = values[slot] if whole else np.where(
                        active, values[slot], before
                    )

        return step

    def _for(self, op):
        start, stop, stride, *first = self.slots(op.operands)
        (block,) = op.regions[0].blocks
        counter, *carried = self.slots(block.arguments)
        steps, yielded = self._region(op.regions[0])
        results = self.slots(op.results)

        def step(warp, mask):
            values = warp.values
            bounds = [np.unique(_signed(values[slot])[mask]) for slot in (start, stop, stride)]
            state = [values[slot] for slot in first]
            for number in range(*(bound.item() for bound in bounds)):
                values[counter] = np.full(32, number, np.int32).view(np.uint32)
                for slot, value in zip(carried, state, strict=True):
                    values[slot] = value
                yield from _run(steps, warp, mask)
                state = [values[slot] for slot in yielded]
            for slot, value in zip(results, state, strict=True):
                values[slot] = value

        return step


def _waiting(text):
    """What barriers do, for instructions that wait for other warps."""
    if text == _GRID_BARRIER:
        return partial(_wait_for_all, None, None)
    if named := re.fullmatch(r"bar\.sync (\d+)(?:, (\d+))?;", text):
        return partial(_wait_for_all, int(named[1]), named[2] and int(named[2]) // 32)
    if "mbarrier.try_wait.parity" in text:
        return _spin
    return None


def _wait_for_all(number, count, warp, mask):
    assert mask.all(), "some lanes do not come to a barrier"
    yield None if number is None else (warp.block, number), count or warp.warps


def _spin(warp, mask, address, parity):
    while not ptx.arrived(warp, mask, address, parity):
        yield "spin"


def _asm(instruction, text, struct, warp, mask, *operands):
    value = instruction(warp, mask, text, *operands)
    if isinstance(value, tuple) and not struct and value:
        (value,) = value
    return value


def _function(op):
    """(warp, mask, *operands) -> value; structs and vectors are tuples."""
    name, attributes = op.name, op.attributes
    kind = op.results[0].type if len(op.results) else None
    if name in _ELEMENTWISE:
        return lambda warp, mask, *operands: _ELEMENTWISE[name](*operands)
    if name in _CONVERSIONS:
        return lambda warp, mask, value: value.astype(_dtype(kind))
    if name == "arith.bitcast":
        return lambda warp, mask, value: value.view(_dtype(kind))
    if name == "arith.constant":
        value = attributes["value"].value
        if not isinstance(value, float):
            value = value % 2 ** (8 * _dtype(kind).itemsize)
        return lambda warp, mask: np.full(32, value, _dtype(kind))
    if name == "arith.cmpi":
        predicate = attributes["predicate"].value
        compare = _COMPARISONS[predicate]
        if 2 <= predicate < 6:
            return lambda warp, mask, a, b: compare(_signed(a), _signed(b))
        return lambda warp, mask, a, b: compare(a, b)
    if name == "arith.cmpf":
        compare = _FLOAT_COMPARISONS[attributes["predicate"].value]
        return lambda warp, mask, a, b: compare(a, b)
    if name == "gpu.thread_id":
        first = "<x>" in str(attributes["dimension"])
        return lambda warp, mask: np.uint64(first) * (32 * warp.index + LANES).astype(np.uint64)
    if name == "gpu.block_dim":
        return lambda warp, mask: np.full(32, 32 * warp.warps, np.uint64)
    if name == "nvvm.shfl.sync":  # only of Mosaic's own, which broadcasts a lane
        return lambda warp, mask, lanes, value, lane, clamp: value[lane]
    return _memory_function(name, op, kind)


def _memory_function(name, op, kind):
    attributes = op.attributes
    if name == "builtin.unrealized_conversion_cast":  # memref to its descriptor
        return lambda warp, mask, ref: (ref, ref, np.zeros_like(ref))
    if name == "llvm.extractvalue":
        (position,) = attributes["position"]
        return lambda warp, mask, value: value[position]
    if name == "vector.extract":
        (position,) = attributes["static_position"]
        return lambda warp, mask, value: value[position]
    if name == "vector.from_elements":
        return lambda warp, mask, *elements: elements
    if name == "llvm.getelementptr":
        assert str(attributes["elem_type"]) == "i8"
        (fixed,) = attributes["rawConstantIndices"]
        if len(op.operands) == 1:
            return lambda warp, mask, base: (base.astype(np.int64) + fixed).astype(np.uint64)
        return lambda warp, mask, base, offset: base + _signed(offset).astype(np.uint64)
    if name in ("llvm.load", "llvm.store"):
        loaded = kind if name == "llvm.load" else op.operands[0].type
        found = re.fullmatch(r"vector<(\d+)x(\w+)>", str(loaded))
        count, dtype = (int(found[1]), _dtype(found[2])) if found else (1, _dtype(loaded))
        if name == "llvm.store":

            def store(warp, mask, value, where):
                value = np.stack(value, axis=-1) if found else value[:, None]
                warp.memory.store(where, np.ascontiguousarray(value).view(np.uint8), mask)

            return store

        def load(warp, mask, where):
            value = warp.memory.load(where, count * dtype.itemsize, mask).view(dtype)
            return tuple(value.T.copy()) if found else value[:, 0]

        return load
    raise NotImplementedError(str(op))
