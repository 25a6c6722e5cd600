"""Loops inside ``plgpu.inline_mgpu`` that stay loops: what runs once a phase should be short."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels.mosaic import emit


def loop(
    start: Any,
    end: Any,
    step: int,
    body: Callable[..., Sequence[Any] | None],
    carry: Sequence[Any] = (),
) -> list[Any]:
    """``body(index, *carry)`` for each index, an int32 register; it returns the next carry.

    ``start`` and ``end``: ints or registers. LLVM cannot tell how often it runs, and
    the assembler is told to leave it.
    """
    start, end = (emit.const(value) if isinstance(value, int) else value for value in (start, end))
    end = emit.asm("mov.b32 $0, $1;", "=r,r", [end], emit.i32_type(), effects=True)
    made = scf.ForOp(start, end, emit.const(step), list(carry))
    with ir.InsertionPoint(made.body):
        emit.asm('.pragma "nounroll";', "", [], effects=True)
        results = body(made.induction_variable, *made.inner_iter_args)
        scf.yield_(list(results or ()))
    return list(made.results)


def when(condition: Any, body: Callable[[], None]) -> None:
    """``body()`` where the condition, an i1 register, holds; None is always."""
    if condition is None:
        body()
        return
    branch = scf.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])
