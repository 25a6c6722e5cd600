"""Single instructions for kernel bodies: thin functions over MLIR, one PTX instruction or two each.

Everything here runs inside ``plgpu.inline_mgpu``; values are 32-bit registers (``ir.Value``), one
a thread. Offsets are in bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

WARPGROUP = 128


def i32_type() -> Any:
    return ir.IntegerType.get_signless(32)


def f32_type() -> Any:
    return ir.F32Type.get()


def const(value: int) -> Any:
    """A 32-bit constant, given as unsigned or signed."""
    return arith.constant(i32_type(), int(np.uint32(value & 0xFFFFFFFF).astype(np.int32)))


def const_f32(value: float) -> Any:
    return arith.constant(f32_type(), ir.FloatAttr.get(f32_type(), float(value)))


def add(a: Any, b: Any) -> Any:
    return arith.addi(a, const(b) if isinstance(b, int) else b)


def mul(a: Any, b: Any) -> Any:
    return arith.muli(a, const(b) if isinstance(b, int) else b)


def shift_right(a: Any, bits: int) -> Any:
    """Logical; a negative number of bits shifts left."""
    if bits < 0:
        return arith.shli(a, const(-bits))
    return arith.shrui(a, const(bits)) if bits else a


def lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    """Any logical function of three words; ``table`` as in PTX."""
    return asm("lop3.b32 $0, $1, $2, $3, " + str(table) + ";", "=r,r,r,r", [a, b, c], i32_type())


def and_(a: Any, mask: int) -> Any:
    return arith.andi(a, const(mask))


def xor(a: Any, b: Any) -> Any:
    return arith.xori(a, const(b) if isinstance(b, int) else b)


def and_or(a: Any, mask: int, c: Any) -> Any:
    """``(a & mask) | c``."""
    return lop3(a, const(mask), c, 0xEA)


def permute_bytes(low: Any, high: Any, selector: Any) -> Any:
    """Four bytes of the eight in (low, high), chosen by the nibbles of ``selector``."""
    selector = const(selector) if isinstance(selector, int) else selector
    return asm("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], i32_type())


def asm(
    text: str,
    constraints: str,
    operands: Sequence[Any],
    result: Any = None,
    *,
    effects: bool = False,
) -> Any:
    """Inline PTX; with ``effects`` it stays in order with memory accesses and its like."""
    kind = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=effects)


def asm_many(text: str, constraints: str, operands: Sequence[Any], results: Sequence[Any]) -> list:
    """Inline PTX with several results and side effects."""
    struct = llvm.StructType.get_literal(list(results))
    value = llvm.inline_asm(struct, list(operands), text, constraints, has_side_effects=True)
    return [llvm.extractvalue(kind, value, [index]) for index, kind in enumerate(results)]


def bits_of(value: Any) -> Any:
    return arith.bitcast(i32_type(), value)


def as_f32(value: Any) -> Any:
    return arith.bitcast(f32_type(), value)


def fma(a: Any, b: Any, c: Any) -> Any:
    return asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], f32_type())


def magnitude(value: Any) -> Any:
    """|value| of a float32, which is part of the instruction that takes it."""
    return math.absf(value)


def max_magnitude(a: Any, b: Any) -> Any:
    """max(a, |b|)"""
    return max_f32(a, magnitude(b))


def larger_magnitude(a: Any, b: Any) -> Any:
    """Of two float32, |a| or |b| with some sign; NaN if one is."""
    return asm("max.NaN.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [a, b], f32_type())


def larger_magnitude_pair(a: Any, b: Any) -> Any:
    """The same of two pairs of bfloat16."""
    return asm("max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], i32_type())


def int_to_f32(value: Any) -> Any:
    """A signed int32 as float32, rounded."""
    return arith.sitofp(f32_type(), value)


def bf16_pair(word: Any) -> tuple[Any, Any]:
    """Two bfloat16 of a word as float32, the low one first."""
    return as_f32(shift_right(word, -16)), as_f32(and_(word, 0xFFFF0000))


def to_bf16_pair(low: Any, high: Any) -> Any:
    """Two float32 rounded to bfloat16, in one word."""
    return asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], i32_type())


def to_f16_pair(low: Any, high: Any) -> Any:
    """Two float32 rounded to float16, in one word."""
    return asm("cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], i32_type())


def sub_f16_pair(a: Any, b: Any) -> Any:
    """Differences of two pairs of float16, each rounded."""
    return asm("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], i32_type())


def mul_f16_pair(a: Any, factor: float) -> Any:
    """A pair of float16 times a constant that is one, each rounded."""
    bits = int(np.float16(factor).view(np.uint16))
    operands = [a, const(bits << 16 | bits)]
    return asm("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", operands, i32_type())


def to_e4m3_pair(pair: Any) -> Any:
    """Two float16 of a word rounded to e4m3, in 16 bits."""
    text = "cvt.rn.satfinite.e4m3x2.f16x2 $0, $1;"
    return asm(text, "=h,r", [pair], ir.IntegerType.get_signless(16))


def from_e4m3_pair(pair: Any) -> Any:
    """Two e4m3 in 16 bits as float16, in one word."""
    return asm("cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h", [pair], i32_type())


def join_halves(low: Any, high: Any) -> Any:
    """Two 16-bit values in one word."""
    return asm("mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], i32_type())


def exp2(value: Any) -> Any:
    return asm("ex2.approx.f32 $0, $1;", "=f,f", [value], f32_type())


def rsqrt(value: Any) -> Any:
    return asm("rsqrt.approx.f32 $0, $1;", "=f,f", [value], f32_type())


def max_f32(a: Any, b: Any) -> Any:
    return asm("max.f32 $0, $1, $2;", "=f,f,f", [a, b], f32_type())


def mul_bf16_pair(a: Any, b: Any) -> Any:
    """Products of two pairs of bfloat16, each rounded."""
    return asm("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], i32_type())


def sub_bf16_pair(a: Any, b: Any) -> Any:
    """Differences of two pairs of bfloat16, each rounded."""
    return asm("sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], i32_type())


def less(a: Any, b: Any) -> Any:
    """``a < b`` of signed 32-bit values, either of them an int if need be."""
    a, b = (const(value) if isinstance(value, int) else value for value in (a, b))
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


_CACHING = {
    # read once, never written by the kernel; not .nc, which sinks below barriers
    "stream": "ld.global.L1::no_allocate.L2::256B",
    "shared": "ld.global.cg",  # other multiprocessors write it in the same kernel
}


def load_if(wanted: Any, where: Any, words: int, caching: str) -> list[Any]:
    """1, 2 or 4 words of global memory, or zeros; ``wanted``: None is always.

    The load stays where it is written, before or behind a barrier.
    """
    outputs = [f"${index}" for index in range(words)]
    width, target = (f".v{words}", f"{{{', '.join(outputs)}}}") if words > 1 else ("", "$0")
    load = f"{_CACHING[caching]}{width}.b32 {target}, [${words}];"
    if wanted is None:
        text, constraints, operands = load, "l", [where]
    else:
        zeros = " ".join(f"mov.b32 {output}, 0;" for output in outputs)
        text = f"{{ .reg .pred p; setp.ne.u32 p, ${words + 1}, 0; {zeros} @p {load} }}"
        constraints, operands = "l,r", [where, arith.extui(i32_type(), wanted)]
    results = ",".join(["=&r"] * words)
    return asm_many(text, f"{results},{constraints}", operands, [i32_type()] * words)


def load_half_if(wanted: Any, where: Any) -> Any:
    """A 16-bit value of global memory that others write in the same kernel, or zero."""
    text = "{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.b16 $0, 0; @p ld.global.cg.u16 $0, [$1]; }"
    i16 = ir.IntegerType.get_signless(16)
    half = asm(text, "=&h,l,r", [where, arith.extui(i32_type(), wanted)], i16, effects=True)
    return arith.extui(i32_type(), half)


def prefetch(where: Any, size: Any) -> None:
    """Starts to bring ``size`` bytes (a register; a multiple of 16) into the L2 cache."""
    asm("cp.async.bulk.prefetch.L2.global [$0], $1;", "l,r", [where, size], effects=True)


def copy_async(target: Any, source: Any) -> None:
    """Starts to copy 16 bytes from global to shared memory, for this thread."""
    address = llvm.ptrtoint(i32_type(), target)
    text = "cp.async.cg.shared.global [$0], [$1], 16;"
    asm(text, "r,l", [address, source], effects=True)


def copy_word_async(target: Any, source: Any) -> None:
    """The same of 4 bytes."""
    address = llvm.ptrtoint(i32_type(), target)
    asm("cp.async.ca.shared.global [$0], [$1], 4;", "r,l", [address, source], effects=True)


def wait_for_copies() -> None:
    """Until what this thread started to copy is there."""
    asm("cp.async.wait_all;", "~{memory}", [], effects=True)


def thread() -> Any:
    """Index of the thread in its warpgroup."""
    return and_(utils.thread_idx(), WARPGROUP - 1)


def block_thread() -> Any:
    """Index of the thread in its block."""
    return utils.thread_idx()


def bit_width(kind: Any) -> int:
    """Bits of an element type."""
    return utils.bitwidth(kind)


def warp() -> Any:
    """Index of the warp in its warpgroup, known to be uniform."""
    return and_(utils.warp_idx(), WARPGROUP // 32 - 1)


def lane() -> Any:
    return and_(utils.thread_idx(), 31)


def barrier() -> None:
    """Waits for all threads of the warpgroup."""
    utils.warpgroup_barrier()


def sync_warp() -> None:
    """All lanes of the warp are here; what they wrote to memory is seen by each other."""
    asm("bar.warp.sync 0xffffffff;", "", [], effects=True)


def commit_shared() -> None:
    """Makes shared memory written so far visible to tensor cores and copies; then a barrier."""
    utils.commit_shared()


def pointer(ref: Any, offset: Any = 0) -> Any:
    """Pointer into a memref of shared or global memory."""
    base = utils.memref_ptr(ref)
    if not utils.is_smem_ref(ref):
        base = llvm.addrspacecast(llvm.PointerType.get(1), base)
    return move(base, offset)


def move(base: Any, offset: Any) -> Any:
    """``base`` moved by ``offset`` bytes, int or 32-bit value."""
    if isinstance(offset, int) and not offset:
        return base
    return utils.getelementptr(base, [offset], ir.IntegerType.get_signless(8))


def move64(base: Any, index: Any, stride: int) -> Any:
    """``base`` moved by ``index * stride`` bytes, reckoned in 64 bits."""
    i64 = ir.IntegerType.get_signless(64)
    offset = arith.muli(arith.extui(i64, index), arith.constant(i64, stride))
    return move(base, offset)


def shared_address(ref: Any) -> Any:
    """32-bit address in the shared window."""
    return llvm.ptrtoint(i32_type(), utils.memref_ptr(ref))


def load_words(where: Any, words: int) -> list[Any]:
    """1, 2 or 4 consecutive 32-bit words in one access."""
    if words == 1:
        return [llvm.load(i32_type(), where, alignment=4)]
    kind = ir.VectorType.get((words,), i32_type())
    value = llvm.load(kind, where, alignment=4 * words)
    return [vector.extract(value, [], [index]) for index in range(words)]


def store_words(where: Any, values: Sequence[Any]) -> None:
    """1, 2 or 4 consecutive 32-bit words in one access."""
    if len(values) == 1:
        llvm.store(values[0], where, alignment=4)
        return
    kind = ir.VectorType.get((len(values),), i32_type())
    llvm.store(vector.from_elements(kind, list(values)), where, alignment=4 * len(values))


def load_half(where: Any) -> Any:
    """A 16-bit value, zero-extended."""
    return arith.extui(i32_type(), llvm.load(ir.IntegerType.get_signless(16), where, alignment=2))


def load_byte(where: Any) -> Any:
    """An 8-bit value, zero-extended."""
    return arith.extui(i32_type(), llvm.load(ir.IntegerType.get_signless(8), where, alignment=1))


def scalar(value: Any) -> Any:
    """The register of an array [] that every thread holds (``plgpu.Layout.WG_SPLAT``)."""
    return value.registers.item()


def table_word(table: Sequence[int]) -> int:
    """Four bytes as one word, the first lowest."""
    return sum(byte << 8 * index for index, byte in enumerate(table))


def store_half(where: Any, value: Any) -> None:
    """A 16-bit value."""
    llvm.store(value, where, alignment=2)


def store_bf16(where: Any, value: Any) -> None:
    """A float32 rounded to bfloat16."""
    i16 = ir.IntegerType.get_signless(16)
    llvm.store(asm("cvt.rn.bf16.f32 $0, $1;", "=h,f", [value], i16), where, alignment=2)
