"""Memory budget: one planner turns bytes into a plan, before anything is allocated.

The plan is a table of bytes. Rows that are arrays of ours are exact, their shapes are known;
temporaries come from the compiler's own analysis; the margin covers what the allocator rounds up.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable
from typing import Final

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.trees import tree_bytes
from dynaexq_jax.units import format_bytes
from pallas_kernels.layout import page_shape
from pallas_kernels.levels import Bits
from pallas_kernels.pages import ExpertFormat, PagedExperts, abstract_experts, table_rungs

MARGIN_DIVISOR: Final = 100
"""The margin is this part of everything else."""

MAX_ARRAY_ELEMENTS: Final = 2**31 - 1
"""The pool stays below it, so that 32-bit offsets reach every word."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """What a model and an engine ask for, whatever the plan. Sizes in bytes."""

    format: ExpertFormat
    layers: int
    experts: int
    available_bits: tuple[Bits, ...]
    """Levels that the checkpoint holds, ascending."""
    dense_bytes: int
    state_bytes: int
    """Cache, batch slots and routing statistics."""
    staging_bytes: Callable[[PagedExperts], int]
    """Of batches on their way to experts of these shapes; never fewer for a larger pool."""

    def rungs(self, base_bits: Bits) -> int:
        """Rungs of the page table whose pages the checkpoint holds."""
        return table_rungs(base_bits) - table_rungs(self.available_bits[-1])

    def promotable_pages(self, base_bits: Bits) -> int:
        """Pages that bring every expert from the base to its highest level."""
        return self.rungs(base_bits) * self.layers * self.experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Base, pool, and the bytes of everything on the device."""

    base_bits: Bits
    pool_pages: int
    promotable_pages: int
    arrays: dict[str, int]
    """Bytes of the arrays that stay allocated, by what they hold."""
    staging_bytes: int
    temporary_bytes: int | None
    """Of the compiled programs; None if no budget asked for their analysis."""
    budget_bytes: int | None

    @property
    def margin_bytes(self) -> int:
        """For what the allocator rounds up."""
        return self._needed // MARGIN_DIVISOR

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self._needed + self.margin_bytes

    @property
    def rows(self) -> dict[str, int]:
        """All rows of the table, which add up to ``total_bytes``."""
        rows = {**self.arrays, "staging": self.staging_bytes}
        if self.temporary_bytes is not None:
            rows["temporaries"] = self.temporary_bytes
        return {**rows, "margin": self.margin_bytes}

    @property
    def _needed(self) -> int:
        return sum(self.arrays.values()) + self.staging_bytes + (self.temporary_bytes or 0)


TemporaryBytes = Callable[[Bits, int], int]
"""What the compiled programs need beside their arguments, for a base and a number of pages."""


def plan_fixed(
    demand: Demand,
    *,
    base_bits: Bits,
    pool_pages: int,
    temporary_bytes: TemporaryBytes | None = None,
) -> MemoryPlan:
    """The plan for a base and a pool that somebody chose, without a budget.

    Without ``temporary_bytes`` nothing is compiled and temporaries are not counted.

    Raises InputError if the checkpoint lacks the level or the pool is larger than can be used.
    """
    _check_base(demand, base_bits)
    most = _most_pages(demand, base_bits)
    if not 0 <= pool_pages <= most:
        raise InputError(
            f"--pages must be in 0..{most} for this model at a base of {base_bits} bits, "
            f"got {pool_pages}"
        )
    temporaries = None if temporary_bytes is None else temporary_bytes(base_bits, pool_pages)
    return _plan(demand, base_bits, pool_pages, temporaries, None)


def plan_budget(
    demand: Demand,
    budget_bytes: int,
    *,
    base_bits: Bits | None = None,
    temporary_bytes: TemporaryBytes,
) -> MemoryPlan:
    """The best plan within a budget: the highest base that fits, then as many pages as fit.

    Raises InputError that names the smallest budget that works.
    """
    if base_bits is not None:
        _check_base(demand, base_bits)
    candidates = demand.available_bits[::-1] if base_bits is None else (base_bits,)
    lowest = candidates[-1]
    analysed = functools.cache(temporary_bytes)
    for bits in candidates:
        if _plan(demand, bits, 0, 0, budget_bytes).total_bytes > budget_bytes:
            continue  # nothing has to be compiled to know that
        # the pool hardly changes what the programs need: analyse them at a first guess of it,
        # and without one, which needs a little less, only where that decides
        guess = _pages_within(demand, bits, 0, budget_bytes)
        for most in dict.fromkeys((guess, 0)):
            temporaries = analysed(bits, most)
            pages = min(most, _pages_within(demand, bits, temporaries, budget_bytes))
            plan = _plan(demand, bits, pages, temporaries, budget_bytes)
            if plan.total_bytes <= budget_bytes:
                return plan
    smallest = _plan(demand, lowest, 0, analysed(lowest, 0), budget_bytes).total_bytes
    raise InputError(
        f"a budget of {format_bytes(budget_bytes)} is too small: with every expert at {lowest} "
        f"bits this model needs {format_bytes(smallest)} ({smallest} bytes); raise "
        "--hbm-budget, or lower --context or --batch"
    )


def _check_base(demand: Demand, base_bits: Bits) -> None:
    if base_bits not in demand.available_bits:
        held = ", ".join(map(str, demand.available_bits))
        raise InputError(
            f"a base of {base_bits} bits needs a level that this checkpoint lacks, it holds {held} "
            "bits; choose one of these, or convert the model again"
        )


def _most_pages(demand: Demand, base_bits: Bits) -> int:
    words_of_page = max(int(np.prod(page_shape(*s))) for s in demand.format.matrix_shapes.values())
    return min(demand.promotable_pages(base_bits), MAX_ARRAY_ELEMENTS // words_of_page)


def _pages_within(demand: Demand, bits: Bits, temporaries: int, budget_bytes: int) -> int:
    """Most pages whose plan stays within the budget; 0 if not even one does."""

    def total(pages: int) -> int:
        return _plan(demand, bits, pages, temporaries, budget_bytes).total_bytes

    counts = range(1, _most_pages(demand, bits) + 1)
    return bisect.bisect_right(counts, budget_bytes, key=total)


def _plan(
    demand: Demand,
    base_bits: Bits,
    pool_pages: int,
    temporaries: int | None,
    budget_bytes: int | None,
) -> MemoryPlan:
    experts = abstract_experts(
        demand.format,
        layers=demand.layers,
        experts=demand.experts,
        base_bits=base_bits,
        pool_pages=pool_pages,
    )
    return MemoryPlan(
        base_bits=base_bits,
        pool_pages=pool_pages,
        promotable_pages=demand.promotable_pages(base_bits),
        arrays={
            "dense weights": demand.dense_bytes,
            "expert base": tree_bytes(experts.base),
            "expert scales": tree_bytes(experts.scales),
            "page pool": tree_bytes(experts.pool),
            "page table": tree_bytes(experts.table),
            "cache and batch": demand.state_bytes,
        },
        staging_bytes=demand.staging_bytes(experts) if pool_pages else 0,
        temporary_bytes=temporaries,
        budget_bytes=budget_bytes,
    )
