"""Products on tensor cores, of a warp (mma) or a warpgroup (wgmma); rules are as in ``emit``."""

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic import emit


def mma_bf16(sums: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """``mma.m16n8k16``: four float32 plus the product of four and two words of bfloat16."""
    struct = llvm.StructType.get_literal([emit.f32_type()] * 4)
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    value = llvm.inline_asm(struct, [*a, *b, *sums], text, constraints)
    return [llvm.extractvalue(emit.f32_type(), value, [index]) for index in range(4)]


def mma_int8(sums: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """``mma.m16n8k32``: four int32 plus the product of four and two words of int8."""
    struct = llvm.StructType.get_literal([emit.i32_type()] * 4)
    text = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    constraints = ",".join(["=r"] * 4 + ["r"] * 10)
    value = llvm.inline_asm(struct, [*a, *b, *sums], text, constraints)
    return [llvm.extractvalue(emit.i32_type(), value, [index]) for index in range(4)]


def load_matrices(address: Any) -> list[Any]:
    """``ldmatrix``: four matrices of 8 rows of 16 bytes of shared memory, a fragment's words.

    Lane 8 i + r gives the shared address of row r of matrix i; lane (g, t) gets the t-th word of
    row g of each.
    """
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    return emit.asm_many(text, "=r,=r,=r,=r,r", [address], [emit.i32_type()] * 4)


def wgmma_bf16(sums: Sequence[Any], a: Sequence[Any], descriptor: Any) -> list[Any]:
    """Starts ``wgmma.m64nNk16``: N / 2 float32 plus the product of four words and shared memory."""
    count = len(sums)
    text = (
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.bf16.bf16 "
        "{" + ",".join(f"${index}" for index in range(count)) + "}, "
        "{" + ",".join(f"${2 * count + index}" for index in range(4)) + "}, "
        f"${2 * count + 4}, p, 1, 1, 0; }}"
    )
    tied = [str(index) for index in range(count)]
    constraints = ",".join(["=f"] * count + tied + ["r"] * 4 + ["l"])
    return emit.asm_many(text, constraints, [*sums, *a, descriptor], [emit.f32_type()] * count)


def swizzled_descriptor(ref: Any, next_rows: int) -> Any:
    """For wgmma, of a matrix in shared memory as tiles of 8 rows of 128 bytes, swizzled over 128.

    ``next_rows`` is the number of bytes from eight rows to the next.
    """
    i64 = ir.IntegerType.get_signless(64)
    start = emit.shift_right(emit.and_(emit.shared_address(ref), 0x3FFFF), 4)
    fixed = (next_rows >> 4) << 32 | 1 << 62
    return arith.ori(arith.extui(i64, start), arith.constant(i64, fixed))


def move_descriptor(descriptor: Any, nbytes: int) -> Any:
    """The same matrix from ``nbytes`` further on."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.addi(descriptor, arith.constant(i64, nbytes >> 4))


def wgmma_fence(sums: list[Any], words: list[Any]) -> tuple[list[Any], list[Any]]:
    """Before products that read these registers: all pass through, so that they are written."""
    return _pass_through("wgmma.fence.sync.aligned;", sums, words)


def wgmma_commit() -> None:
    """Closes the group of products that were started."""
    emit.asm("wgmma.commit_group.sync.aligned;", "", [], effects=True)


def wgmma_wait(pending: int, sums: list[Any]) -> list[Any]:
    """Waits until at most ``pending`` groups are under way."""
    return _pass_through(f"wgmma.wait_group.sync.aligned {pending};", sums, [])[0]


def _pass_through(text: str, sums: list[Any], words: list[Any]) -> tuple[list[Any], list[Any]]:
    outs = ["=f"] * len(sums) + ["=r"] * len(words)
    constraints = ",".join(outs + [str(index) for index in range(len(outs))])
    kinds = [emit.f32_type()] * len(sums) + [emit.i32_type()] * len(words)
    values = emit.asm_many(text, constraints, [*sums, *words], kinds)
    return values[: len(sums)], values[len(sums) :]
