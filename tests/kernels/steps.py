"""Operations of MLIR as functions of a warp, on arrays of 32 lanes. For ``warps``.

A step is (whether it waits for others, a function of the warp and the mask of its active lanes);
one that waits is a generator, which stops with "spin" or (barrier, warps that it waits for). Values
are in slots of the warp; structs and vectors are tuples.
"""

import re
from functools import partial

import numpy as np
from kernels import ptx

LANES = np.arange(32)
GRID_BARRIER = "barrier.grid;"
"""Stands for a barrier over all blocks."""


def run(steps, warp, mask):
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


def dtype_of(kind):
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
    "arith.shrsi": _of_signed(np.right_shift),
    "arith.maxsi": _of_signed(np.maximum), "arith.minsi": _of_signed(np.minimum),
    "arith.maxui": np.maximum, "arith.minui": np.minimum,
    "arith.addf": np.add, "arith.subf": np.subtract, "arith.mulf": np.multiply,
    "arith.divf": np.divide, "arith.negf": np.negative, "math.absf": np.abs,
    "arith.select": np.where,
}  # fmt: skip
_CONVERSIONS = {
    "arith.extui", "arith.trunci", "arith.index_cast", "arith.uitofp", "llvm.ptrtoint",
    "llvm.inttoptr", "llvm.addrspacecast",
}  # fmt: skip


class Compiler:
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
        if name == "scf.while":
            return True, self._while(op)
        operands, results = self.slots(op.operands), self.slots(op.results)
        if name in ("scf.yield", "scf.condition", "func.return"):
            return None
        if name == "llvm.inline_asm":
            text = op.attributes["asm_string"].value
            if waiting := _waiting(text):
                return True, _waits(waiting, operands, results)
            struct = any(str(value.type).startswith("!llvm.struct") for value in op.results)
            compute = partial(_asm, ptx.instruction(text), text, struct)
        else:
            compute = _function(op)

        def step(warp, mask):
            values = warp.values
            value = compute(warp, mask, *[values[slot] for slot in operands])
            for slot in results:
                values[slot] = value

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
                yield from run(steps, warp, active)
                for result, slot in zip(results, yielded, strict=True):
                    before = values[result]
                    whole = active.all() or before is None
                    values[result] = (
                        values[slot] if whole else np.where(active, values[slot], before)
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
                yield from run(steps, warp, mask)
                state = [values[slot] for slot in yielded]
            for slot, value in zip(results, state, strict=True):
                values[slot] = value

        return step

    def _while(self, op):
        first = self.slots(op.operands)
        (before,), (after,) = (region.blocks for region in op.regions)
        starts, goes_on = self.slots(before.arguments), self.slots(after.arguments)
        test, (condition, *handed) = self._region(op.regions[0])
        body, yielded = self._region(op.regions[1])
        results = self.slots(op.results)

        def step(warp, mask):
            values, now, active = warp.values, first, mask
            while True:
                for slot, value in zip(starts, [values[slot] for slot in now], strict=True):
                    values[slot] = value
                yield from run(test, warp, active)
                for slot, value in zip(goes_on, [values[slot] for slot in handed], strict=True):
                    left = (active != mask).any()  # some lanes, with what they had
                    values[slot] = np.where(active, value, values[slot]) if left else value
                active = active & values[condition]
                if not active.any():
                    break
                yield from run(body, warp, active)
                now = yielded
            for slot, value in zip(results, [values[slot] for slot in goes_on], strict=True):
                values[slot] = value

        return step


def _waits(waiting, operands, results):
    def step(warp, mask):
        values = yield from waiting(warp, mask, *(warp.values[slot] for slot in operands))
        for slot in results:
            warp.values[slot] = values

    return step


def _waiting(text):
    """What barriers do, for instructions that wait for other warps."""
    if text == GRID_BARRIER:
        return partial(_wait_for_all, None, None)
    if named := re.fullmatch(r"bar\.sync (\d+)(?:, (\d+))?;", text):
        return partial(_wait_for_all, int(named[1]), named[2] and int(named[2]) // 32)
    if numbered := re.fullmatch(r"bar\.sync \$0, (\d+);", text):
        return partial(_wait_for_numbered, int(numbered[1]) // 32)
    if "mbarrier.try_wait.parity" in text:
        return _spin
    if "ld.acquire.gpu.global.u32" in text:
        return _spin_on_count
    if read := re.search(r"ld\.relaxed\.gpu\.global(?:\.v(\d))?\.b32", text):
        missing = int(re.search(r"setp\.eq\.s32 missing, \$0, (-?\d+);", text)[1])
        return partial(_spin_on_words, missing, int(read[1] or 1))
    return None


def _wait_for_all(number, count, warp, mask):
    assert mask.all(), "some lanes do not come to a barrier"
    yield None if number is None else (warp.block, number), count or warp.warps


def _wait_for_numbered(count, warp, mask, number):
    yield from _wait_for_all(int(number[0]), count, warp, mask)


def _spin(warp, mask, address, parity):
    while not ptx.arrived(warp, mask, address, parity):
        yield "spin"


def _spin_on_count(warp, mask, address, whole):
    while (warp.memory.load(address, 4, mask).view(np.uint32)[:, 0] < whole)[mask].any():
        yield "spin"


def _spin_on_words(missing, count, warp, mask, *addresses):
    missing = np.int32(missing).view(np.uint32)
    while True:
        read = [warp.memory.load(a, 4 * count, mask).view(np.uint32) for a in addresses]
        loaded = [word for words in read for word in words.T.copy()]
        if not any((words == missing)[mask].any() for words in loaded):
            return tuple(loaded)
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
    dtype = None if kind is None else dtype_of(kind)
    if name in _ELEMENTWISE:
        function = _ELEMENTWISE[name]
        return lambda warp, mask, *operands: function(*operands)
    if name in _CONVERSIONS:
        return lambda warp, mask, value: value.astype(dtype)
    if name == "arith.sitofp":
        return lambda warp, mask, value: _signed(value).astype(dtype)
    if name == "arith.bitcast":
        return lambda warp, mask, value: value.view(dtype)
    if name == "arith.constant":
        value = attributes["value"].value
        if not isinstance(value, float):
            value = value % 2 ** (8 * dtype.itemsize)
        constant = np.full(32, value, dtype)
        constant.flags.writeable = False
        return lambda warp, mask: constant
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
    if name == "nvvm.fence.proxy":
        return lambda warp, mask: None
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
        count, dtype = (int(found[1]), dtype_of(found[2])) if found else (1, dtype_of(loaded))
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
