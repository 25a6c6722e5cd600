"""Loops that stay loops: what runs once a phase should be short.

LLVM would unroll a loop if it knew how its index moves, and the assembler if it were not told not
to.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting


def fori_loop(start: int, end: Any, body: Callable[[Any], None]) -> None:
    """``lax.fori_loop`` without a carry, outside of ``plgpu.inline_mgpu``; end: int32 []."""

    def do(index: Any) -> Any:
        if interpreting():
            body(index)
            return index + 1
        keep()
        body(index)
        return following(index)

    @plgpu.inline_mgpu()
    def keep(ctx: Any) -> None:
        del ctx
        _keep()

    splat = plgpu.Layout.WG_SPLAT
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat)

    @plgpu.inline_mgpu(arg_types=(splat,), return_type=scalar)
    def following(ctx: Any, index: Any) -> Any:
        del ctx
        registers = np.full_like(index.registers, _following(emit.scalar(index), 1))
        return fa.FragmentedArray(_registers=registers, _layout=index.layout, _is_signed=True)

    lax.while_loop(lambda index: index < end, do, jnp.int32(start))


def opaque(value: Any) -> Any:
    """The same int32 [], outside of ``plgpu.inline_mgpu``; compilers take it for a new number.

    Otherwise they hold, across a loop, each address that moves with the loop's numbers in a
    register of its own. Those that all threads share are few, and the assembler that runs out of
    them uses none: a move is then ahead of each copy and product.
    """
    if interpreting():
        return value
    splat = plgpu.Layout.WG_SPLAT
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat)

    @plgpu.inline_mgpu(arg_types=(splat,), return_type=scalar)
    def run(ctx: Any, value: Any) -> Any:
        del ctx
        operands, kind = [emit.scalar(value)], emit.i32_type()
        same = emit.asm("mov.b32 $0, $1;", "=r,r", operands, kind, effects=True)
        return fa.FragmentedArray.splat(same, (), is_signed=True)

    return run(value)


def loop(
    start: Any,
    end: Any,
    step: int,
    body: Callable[..., Sequence[Any] | None],
    carry: Sequence[Any] = (),
) -> list[Any]:
    """``body(index, *carry)`` for each index, an int32 register; it returns the next carry.

    Inside ``plgpu.inline_mgpu``, like ``when``; ``start`` and ``end``: ints or registers.
    """
    start = emit.const(start) if isinstance(start, int) else start
    values = [start, *carry]
    kinds = [value.type for value in values]
    made = scf.WhileOp(kinds, values)
    before, after = (
        region.blocks.append(*kinds, arg_locs=[ir.Location.unknown()] * len(kinds))
        for region in (made.before, made.after)
    )
    with ir.InsertionPoint(before):
        scf.condition(emit.less(before.arguments[0], end), before.arguments)
    with ir.InsertionPoint(after):
        index, *held = after.arguments
        _keep()
        results = body(index, *held)
        scf.yield_([_following(index, step), *(results or ())])
    return list(made.results)[1:]


def loop_from_first(
    first: Any,
    end: Any,
    step: int,
    body: Callable[..., Sequence[Any]],
    load: Callable[[Any], Sequence[Any]],
    carry: Sequence[Any],
    loaded: Sequence[Any],
) -> list[Any]:
    """``body(index, carry, loaded)`` for each index, at least once; it returns the next carry.

    What ``load(index)`` gives is handed to the body; for the first index, which must be below
    ``end``, it is there already. All are lists of registers but the indices.
    """
    kinds = [value.type for value in (first, *carry)]
    taken = [*kinds, *(value.type for value in loaded)]
    made = scf.WhileOp(kinds, [first, *carry, *loaded])
    before, after = (
        region.blocks.append(*given, arg_locs=[ir.Location.unknown()] * len(given))
        for region, given in ((made.before, taken), (made.after, kinds))
    )
    with ir.InsertionPoint(before):
        index, *held = before.arguments
        _keep()
        results = body(index, held[: len(carry)], held[len(carry) :])
        following = _following(index, step)
        scf.condition(emit.less(following, end), [following, *results])
    with ir.InsertionPoint(after):
        index, *held = after.arguments
        scf.yield_([index, *held, *load(index)])
    return list(made.results)[1:]


def loop_once(end: Any, step: int, body: Callable[[Any], None]) -> None:
    """``body(index)`` for each index from 0, at least once: nothing waits for ``end`` before."""

    def do(index: Any, carry: Any, loaded: Any) -> list[Any]:
        del carry, loaded
        body(index)
        return []

    loop_from_first(emit.const(0), end, step, do, lambda index: [], [], [])


def _keep() -> None:
    """At the start of a loop's body, where the assembler looks for it."""
    emit.asm('.pragma "nounroll";', "", [], effects=True)


def _following(index: Any, step: int) -> Any:
    text = f"add.s32 $0, $1, {step};"
    return emit.asm(text, "=r,r", [index], emit.i32_type(), effects=True)


def when(condition: Any, body: Callable[[], None]) -> None:
    """``body()`` where the condition, an i1 register, holds; None is always."""
    if condition is None:
        body()
        return
    branch = scf.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])
