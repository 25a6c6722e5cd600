"""Sums in global memory that say themselves whether they are there.

Each is ``MISSING`` until it is stored: who needs it reads it until it is something else, without a
fence and a count in between. All are cleared by ``counts.fill`` where barriers over the grid lie
both between it and the last reads, and between it and the first store. Inside of
``plgpu.inline_mgpu``; pointers.
"""

from collections.abc import Sequence
from typing import Any, Final

from pallas_kernels.mosaic import emit

MISSING: Final = -1
"""Bits of what is not there: a NaN, but not the one that sums can be, 0x7fffffff."""


def emit_store(where: Any, values: Sequence[Any]) -> None:
    """Stores 1 or 2 words, which thereby are there."""
    if len(values) == 1:
        text, constraints = "st.relaxed.gpu.global.b32 [$0], $1;", "l,r"
    else:
        text, constraints = "st.relaxed.gpu.global.v2.b32 [$0], {$1, $2};", "l,r,r"
    emit.asm(text, constraints, [where, *values], effects=True)


def emit_await(places: Sequence[Any]) -> list[Any]:
    """The word at each place, as soon as all are there."""
    count = len(places)
    loads = [f"ld.relaxed.gpu.global.b32 ${i}, [${count + i}];" for i in range(count)]
    text = ["{ .reg .pred missing;", "AGAIN:", *loads, *_test(range(count))]
    return _run([*text, "@missing bra AGAIN; }"], places, 1)


def emit_await_fours(places: Sequence[Any]) -> list[Any]:
    """Four words at each place, one after the other, as soon as all are there.

    While something is missing, those of the first place alone are read again and again: all would
    be in the way of others' bytes.
    """
    count = 4 * len(places)
    loads = [
        f"ld.relaxed.gpu.global.v4.b32 {{${4 * i}, ${4 * i + 1}, ${4 * i + 2}, ${4 * i + 3}}}, "
        f"[${count + i}];"
        for i in range(len(places))
    ]
    text = [
        "{ .reg .pred missing;",
        "ALL:",
        *loads,
        *_test(range(count)),
        "@!missing bra DONE;",
        "FIRST:",
        loads[0],
        *_test(range(4)),
        "@missing bra FIRST;",
        "bra ALL;",
        "DONE: }",
    ]
    return _run(text, places, 4)


def _test(registers: range) -> list[str]:
    first, *others = registers
    return [
        f"setp.eq.s32 missing, ${first}, {MISSING};",
        *(f"setp.eq.or.s32 missing, ${i}, {MISSING}, missing;" for i in others),
    ]


def _run(text: list[str], places: Sequence[Any], words: int) -> list[Any]:
    count = words * len(places)
    constraints = ",".join(["=&r"] * count + ["l"] * len(places))
    return emit.asm_many("\n".join(text), constraints, list(places), [emit.i32_type()] * count)
