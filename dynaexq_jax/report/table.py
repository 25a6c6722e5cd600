"""Plain text tables for the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynaexq_jax.units import format_bytes

if TYPE_CHECKING:  # a table of something else needs no JAX
    from dynaexq_jax.budget import MemoryPlan


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def plan_table(plan: "MemoryPlan") -> str:
    """A plan as people read it: bytes by what they hold, and their sum."""
    rows = [(name, f"{size:,}", format_bytes(size)) for name, size in plan.rows.items()]
    rows.append(("total", f"{plan.total_bytes:,}", format_bytes(plan.total_bytes)))
    if plan.budget_bytes is not None:
        rows.append(("budget", f"{plan.budget_bytes:,}", format_bytes(plan.budget_bytes)))
    return "\n".join(
        [
            f"base {plan.base_bits} bits for every expert, {plan.pool_pages} pages of "
            f"{plan.promotable_pages} for promotion",
            text_table(("device memory", "bytes", ""), rows),
        ]
    )


def plan_json(plan: "MemoryPlan") -> dict[str, object]:
    """A plan as JSON data."""
    return {
        "base_bits": plan.base_bits,
        "pool_pages": plan.pool_pages,
        "promotable_pages": plan.promotable_pages,
        "bytes": plan.rows,
        "total_bytes": plan.total_bytes,
        "budget_bytes": plan.budget_bytes,
    }
