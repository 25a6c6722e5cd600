"""Expert bank: the one owner of the experts' device arrays.

Base pages and scales never change. Pool and table are rewritten by ``commit``, one jitted call that
donates the pool: steps dispatched before it see the old pages and the old table, steps after it
the new ones, and nothing in between exists.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, UInt32

from dynaexq_jax.compiled import bytes_beside_arguments
from dynaexq_jax.page_locked import PageLocked, page_locked_by
from dynaexq_jax.trees import has_arrived, tree_bytes
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
        self._sent: collections.deque[tuple[PageLocked, jax.Array]] = collections.deque()
        """Tables in page-locked memory, and what the programs that read them return."""

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
        sent = self._page_locked(table)
        published = _publish(sent.array, table.shape)
        self._sent.append((sent, published))
        self.experts = dataclasses.replace(self.experts, table=published)

    def commit(self, table: Int32[np.ndarray, "R L E"], staged: UInt32[jax.Array, " W"]) -> None:
        """Writes a batch of staged pages to their places and publishes ``table``, at once.

        ``staged`` is laid out as ``batch_parts`` says. A place of -1 is dropped: batches have the
        same shapes, and the program is compiled once.
        """
        sent = self._page_locked(table)
        pool, published = _commit(self.experts.pool, sent.array, staged, table.shape)
        self._sent.append((sent, published))
        self.experts = dataclasses.replace(self.experts, pool=pool, table=published)

    def _page_locked(self, table: Int32[np.ndarray, "R L E"]) -> PageLocked:
        """A copy in memory that no program reads any more.

        Programs read it from there. To hand it over as an argument, or with ``jax.device_put``,
        takes the host .1 ms (H200), twice as long as all else of a call.
        """
        if self._sent and has_arrived(self._sent[0][1]):
            free, _ = self._sent.popleft()
        else:
            free = PageLocked(table.size, self.device)
        free.words.view(np.int32)[:] = table.ravel()
        return free


def commit_temporary_bytes(experts: PagedExperts, device: jax.Device, *, staged_pages: int) -> int:
    """Bytes that a commit of so many pages needs beside its arguments; allocates nothing.

    ``experts`` may be abstract; they are where the bank has them, on ``device``.
    """
    shapes = Matrices(*(pages.shape[1:] for pages in experts.pool))
    on_device = jax.sharding.SingleDeviceSharding(device)

    def words(count: int, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count,), jnp.uint32, sharding=sharding)

    table = words(experts.table.size, page_locked_by(device))
    staged = words(batch_words(staged_pages, shapes), on_device)
    return bytes_beside_arguments(_commit.lower(experts.pool, table, staged, experts.table.shape))


def batch_words(pages: int, shapes: Matrices) -> int:
    """Words of a batch of so many pages, whose matrices have ``shapes`` [B, 2C, 256]."""
    return pages * (1 + sum(map(math.prod, shapes)))


Words = TypeVar("Words", np.ndarray, jax.Array)


def batch_parts(words: Words, shapes: Matrices) -> tuple[Words, Matrices]:
    """Parts of a batch, uint32 [W]: views of what numpy holds.

    The place of each page in the pool, int32 [M], -1 for one to drop; then the pages of gate_up
    [M, B, 2C, 256], then those of down.
    """
    pages = words.size // batch_words(1, shapes)
    places, rest = words[:pages].view(np.int32), words[pages:]
    split = pages * math.prod(shapes.gate_up)
    matrices = Matrices(
        gate_up=rest[:split].reshape(pages, *shapes.gate_up),
        down=rest[split:].reshape(pages, *shapes.down),
    )
    return places, matrices


def _on_device(words: UInt32[jax.Array, " W"], shape: tuple[int, ...]) -> Int32[jax.Array, "R L E"]:
    return jax.device_put(words, jax.memory.Space.Device).view(np.int32).reshape(shape)


@partial(jax.jit, static_argnums=1)
def _publish(table: UInt32[jax.Array, " W"], shape: tuple[int, ...]) -> jax.Array:
    return _on_device(table, shape)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _commit(
    pool: Matrices,
    table: UInt32[jax.Array, " W"],
    staged: UInt32[jax.Array, " W2"],
    shape: tuple[int, ...],
) -> tuple[Matrices, jax.Array]:
    places, matrices = batch_parts(staged, Matrices(*(pages.shape[1:] for pages in pool)))

    def write(
        pages: UInt32[jax.Array, "P B C2 256"], new: UInt32[jax.Array, "M B C2 256"]
    ) -> jax.Array:
        place = jnp.where(places < 0, pages.shape[0], places)
        return pages.at[place].set(new, mode="drop")

    return Matrices(*map(write, pool, matrices)), _on_device(table, shape)
