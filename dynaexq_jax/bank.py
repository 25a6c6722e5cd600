"""Expert bank: the one owner of the experts' device arrays.

Base pages and scales never change. Pool and table are rewritten by ``commit``, one jitted call that
donates the pool: steps dispatched before it see the old pages and the old table, steps after it
the new ones, and nothing in between exists.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, UInt32

from dynaexq_jax.trees import tree_bytes
from pallas_kernels.levels import LEVEL_BITS, Bits, level_of_bits
from pallas_kernels.pages import ExpertFormat, Matrices, PagedExperts, abstract_experts


class PageSource(Protocol):
    """Where packed experts come from: a converted checkpoint, or made for a benchmark."""

    @property
    def format(self) -> ExpertFormat:
        """Format of the packed experts."""

    @property
    def experts(self) -> int:
        """Experts of a layer."""

    @property
    def layers(self) -> Sequence[int]:
        """Numbers of the layers that hold experts."""

    def scales(self) -> Matrices:
        """``Scales`` of [L, E, B, G, 64], numpy."""

    def level(self, bits: Bits) -> tuple[Matrices, ...]:
        """Pages that a level adds, each uint32 [L, E, B, 2C, 256], numpy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostPages:
    """Pages above the base in host memory, from which promotions copy."""

    rungs: tuple[Matrices, ...]
    """One entry a rung of the page table, each uint32 [L, E, B, 2C, 256], numpy."""

    @property
    def experts(self) -> int:
        """E"""
        return int(self.rungs[0].gate_up.shape[1])

    @staticmethod
    def read(source: PageSource, levels: Sequence[Bits]) -> "HostPages":
        """Loads the pages that ``levels`` add, ascending from the one above the base."""
        return HostPages(rungs=tuple(page for bits in levels for page in source.level(bits)))


class ExpertBank:
    """Allocates the experts once and commits staged pages into the pool."""

    def __init__(self, experts: PagedExperts) -> None:
        (device,) = experts.table.devices()
        self.experts = jax.device_put(experts, device)
        """The arrays that the next step reads.

        Committed to their device, as staged pages are: were the pool so only after its first
        commit, every program would be compiled again then.
        """

    @property
    def device(self) -> jax.Device:
        """Where the arrays are."""
        (device,) = self.experts.table.devices()
        return device

    @classmethod
    def allocate(cls, source: PageSource, *, base_bits: Bits, pool_pages: int) -> "ExpertBank":
        """Fills base and scales from ``source``; the pool is empty and everyone at the base."""
        shapes = abstract_experts(
            source.format,
            layers=len(source.layers),
            experts=source.experts,
            base_bits=base_bits,
            pool_pages=pool_pages,
        )
        (device,) = jnp.zeros(()).devices()
        put = partial(jax.device_put, device=device)
        bank = cls(
            dataclasses.replace(
                shapes,
                base=tuple(
                    put(page)
                    for bits in LEVEL_BITS[: level_of_bits(base_bits) + 1]
                    for page in source.level(bits)
                ),
                scales=put(source.scales()),
                pool=jax.tree.map(
                    lambda s: jnp.zeros(s.shape, s.dtype, device=device), shapes.pool
                ),
                table=jnp.full(shapes.table.shape, -1, jnp.int32, device=device),
            )
        )
        assert tree_bytes(bank.experts) == tree_bytes(shapes)
        return bank

    def publish(self, table: Int32[np.ndarray, "R L E"]) -> None:
        """Makes ``table`` the one that the next step reads; pages stay as they are."""
        published = jax.device_put(table.copy(), self.device)
        self.experts = dataclasses.replace(self.experts, table=published)

    def commit(
        self,
        table: Int32[np.ndarray, "R L E"],
        pool_pages: Int32[np.ndarray, " M"],
        staged: Matrices,
    ) -> None:
        """Writes staged pages [M, B, 2C, 256] to their places and publishes ``table``, at once.

        A place of -1 is dropped: every commit has the same shapes and compiles once.
        """
        pool, published = _commit(self.experts.pool, table.copy(), pool_pages, staged)
        self.experts = dataclasses.replace(self.experts, pool=pool, table=published)


@partial(jax.jit, donate_argnums=0)
def _commit(
    pool: Matrices,
    table: Int32[jax.Array, "R L E"],
    pool_pages: Int32[jax.Array, " M"],
    staged: Matrices,
) -> tuple[Matrices, jax.Array]:
    def write(
        pages: UInt32[jax.Array, "P B C2 256"], new: UInt32[jax.Array, "M B C2 256"]
    ) -> jax.Array:
        place = jnp.where(pool_pages < 0, pages.shape[0], pool_pages)
        return pages.at[place].set(new, mode="drop")

    return Matrices(*map(write, pool, staged)), table
