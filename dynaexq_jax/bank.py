"""Expert bank: the one owner of the experts' device arrays.

Base pages and scales never change. Pool and table are rewritten between two steps: ``write``, one
jitted call that donates the pool, and then ``publish``. Steps dispatched before see the old pages
and the old table, steps after the new ones, and nothing in between exists.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

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


class StagedPages(NamedTuple):
    """A batch of pages on the device; a pytree."""

    pages: Matrices
    """uint32 [M, B, 2C, 256] each"""
    places: Int32[jax.Array, " M"]
    """Pool page of each, or -1: it is not written. So all batches have the same shapes."""


class ExpertBank:
    """Allocates the experts once and writes staged pages into the pool."""

    def __init__(self, experts: PagedExperts) -> None:
        (device,) = experts.table.devices()
        self.experts = jax.device_put(experts, device)
        """The arrays that the next step reads.

        Committed to their device, as staged pages are: were the pool so only after its first
        write, every program would be compiled again then.
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
        bank = cls(
            dataclasses.replace(
                shapes,
                base=tuple(
                    jax.tree.map(jnp.asarray, page)
                    for bits in LEVEL_BITS[: level_of_bits(base_bits) + 1]
                    for page in source.level(bits)
                ),
                scales=jax.tree.map(jnp.asarray, source.scales()),
                pool=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes.pool),
                table=jnp.full(shapes.table.shape, -1, jnp.int32),
            )
        )
        assert tree_bytes(bank.experts) == tree_bytes(shapes)
        return bank

    def publish(self, table: Int32[np.ndarray, "R L E"]) -> None:
        """Makes ``table`` the one that the next step reads; pages stay as they are."""
        published = jax.device_put(table.copy(), self.device)
        self.experts = dataclasses.replace(self.experts, table=published)

    def write(self, staged: StagedPages) -> None:
        """Writes a batch to its places of the pool.

        No step may be dispatched before ``publish`` has made a table of it known.
        """
        self.experts = dataclasses.replace(self.experts, pool=_write(self.experts.pool, staged))


@partial(jax.jit, donate_argnums=0)
def _write(pool: Matrices, staged: StagedPages) -> Matrices:
    place = jnp.where(staged.places < 0, pool.gate_up.shape[0], staged.places)
    return jax.tree.map(lambda old, new: old.at[place].set(new, mode="drop"), pool, staged.pages)
