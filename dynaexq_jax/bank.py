"""Expert bank: the one owner of the experts' device arrays.

Base pages and scales never change. Pool and table are rewritten by ``commit``, one jitted call that
donates both: steps dispatched before it see the old pages and the old table, steps after it
the new ones, and nothing in between exists.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, UInt32

from dynaexq_jax.compiled import IN_GRAPHS, bytes_beside_arguments
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
        """Makes ``table`` the one that the next step reads; pages stay as they are.

        The copy is queued behind those of pages that are on their way, and the step waits for it.
        """
        published = jax.device_put(table.copy(), self.device)
        self.experts = dataclasses.replace(self.experts, table=published)

    def commit(self, staged: UInt32[jax.Array, " W"]) -> None:
        """Writes a batch of staged pages to their places and publishes its table, at once.

        ``staged`` is laid out as ``batch_parts`` says. A place of -1 is dropped: batches have the
        same shapes, and the program is compiled once.
        """
        pool, table = _commit(self.experts.pool, self.experts.table, staged)
        self.experts = dataclasses.replace(self.experts, pool=pool, table=table)


def commit_temporary_bytes(experts: PagedExperts, device: jax.Device, *, staged_pages: int) -> int:
    """Bytes that a commit of so many pages needs beside its arguments; allocates nothing.

    ``experts`` may be abstract; they are where the bank has them, on ``device``.
    """
    words = batch_words(staged_pages, page_shapes(experts.pool), experts.table.shape)
    sharding = jax.sharding.SingleDeviceSharding(device)
    staged = jax.ShapeDtypeStruct((words,), jnp.uint32, sharding=sharding)
    return bytes_beside_arguments(_commit.lower(experts.pool, experts.table, staged))


def page_shapes(pool: Matrices) -> Matrices:
    """Shapes [B, 2C, 256] of the matrices of a page."""
    return Matrices(*(pages.shape[1:] for pages in pool))


def batch_words(pages: int, shapes: Matrices, table_shape: tuple[int, ...]) -> int:
    """Words of a batch of so many pages, whose matrices have ``shapes`` [B, 2C, 256]."""
    return math.prod(table_shape) + pages * (1 + sum(map(math.prod, shapes)))


class BatchParts(NamedTuple):
    """What a batch consists of, in this order: arrays of numpy or of jax."""

    table: Int32[np.ndarray | jax.Array, "R L E"]
    """The table that is to be read once the pages are written.

    It comes with them, because a copy of its own would be queued behind those of other pages.
    """
    places: Int32[np.ndarray | jax.Array, " M"]
    """Of the pages in the pool; -1: dropped."""
    pages: Matrices
    """uint32 [M, B, 2C, 256]"""


def batch_parts(
    words: UInt32[np.ndarray | jax.Array, " W"], shapes: Matrices, table_shape: tuple[int, ...]
) -> BatchParts:
    """Parts of a batch: views of what numpy holds. Arguments are those of ``batch_words``."""
    start = math.prod(table_shape)
    of_page = [1, *map(math.prod, shapes)]
    pages = (words.size - start) // sum(of_page)
    first, second, third = (start + pages * end for end in np.cumsum(of_page).tolist())
    return BatchParts(
        table=words[:start].view(np.int32).reshape(table_shape),
        places=words[start:first].view(np.int32),
        pages=Matrices(
            gate_up=words[first:second].reshape(pages, *shapes.gate_up),
            down=words[second:third].reshape(pages, *shapes.down),
        ),
    )


# the old table is read by nobody, but gives its place to the new one
@partial(jax.jit, donate_argnums=(0, 1), keep_unused=True, compiler_options=IN_GRAPHS)
def _commit(
    pool: Matrices, table: Int32[jax.Array, "R L E"], staged: UInt32[jax.Array, " W"]
) -> tuple[Matrices, Int32[jax.Array, "R L E"]]:
    parts = batch_parts(staged, page_shapes(pool), table.shape)

    def write(
        pages: UInt32[jax.Array, "P B C2 256"], new: UInt32[jax.Array, "M B C2 256"]
    ) -> jax.Array:
        place = jnp.where(parts.places < 0, pages.shape[0], parts.places)
        return pages.at[place].set(new, mode="drop")

    return Matrices(*map(write, pool, parts.pages)), jnp.asarray(parts.table)
