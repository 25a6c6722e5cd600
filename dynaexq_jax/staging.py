"""Staging: pages from host memory to the device, by threads of their own.

A batch of pages is copied side by side into page-locked memory, from which the device's copy engine
reads at the speed of the bus, while the decode loop goes on: it only asks whether a batch has
arrived. From ordinary memory each transfer would first be copied by the calling thread.

On the device each batch in turn takes the place of an earlier one. Batches that came and went among
the temporaries of programs would leave holes, and a hole that is less than twice what is asked of
it is handed out whole, so with time they would take twice what the plan counts.
"""

import collections
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import UInt32

from dynaexq_jax.bank import ExpertBank, HostPages, batch_parts, batch_words, page_shapes
from dynaexq_jax.page_locked import PageLocked
from dynaexq_jax.trees import has_arrived
from pallas_kernels.pages import Matrices


class Stager:
    """Copies batches of up to ``pages`` pages to a bank's device, ``buffers`` of them at a time.

    Used by one thread. What it takes of the device it takes at once, and keeps.
    """

    def __init__(self, host: HostPages, bank: ExpertBank, *, pages: int, buffers: int) -> None:
        self._shapes = page_shapes(bank.experts.pool)
        self._table_shape = bank.experts.table.shape
        self._rungs = [
            Matrices(*(pages.reshape(-1, *pages.shape[2:]) for pages in rung))
            for rung in host.rungs
        ]
        words = batch_words(pages, self._shapes, self._table_shape)
        self._free = collections.deque(_Buffer(words, bank.device) for _ in range(buffers))
        self._threads = ThreadPoolExecutor(buffers, thread_name_prefix="staging")

    def stage(self, pages: np.ndarray, places: np.ndarray, table: np.ndarray) -> "Staged":
        """Starts to copy pages to ``places`` of the pool, int [N] each, with the table int32
        [R, L, E] that is to be read once they are there.

        Pages have the numbers of their entries in the table. Raises IndexError if all buffers are
        in use, RuntimeError after ``close``.
        """
        buffer = self._free.popleft()
        try:
            future = self._threads.submit(self._copy, pages, places, table, buffer)
        except RuntimeError:
            self._free.append(buffer)
            raise
        return Staged(future, lambda: self._free.append(buffer))

    def close(self) -> None:
        """Ends the threads, once they are done with what they have begun."""
        self._threads.shutdown()

    def _copy(
        self, pages: np.ndarray, places: np.ndarray, table: np.ndarray, buffer: "_Buffer"
    ) -> jax.Array:
        # few calls of numpy, each of which lets other threads run for as long as it copies
        order = np.argsort(pages)
        rungs, numbers = np.divmod(pages[order], len(self._rungs[0].gate_up))
        ends = np.searchsorted(rungs, range(len(self._rungs) + 1))
        parts = batch_parts(buffer.words, self._shapes, self._table_shape)
        parts.table[:] = table
        parts.places[:] = -1
        parts.places[: order.size] = places[order]
        for rung, (start, end) in zip(self._rungs, itertools.pairwise(ends), strict=True):
            for source, target in zip(rung, parts.pages, strict=True):
                if start < end:
                    np.take(source, numbers[start:end], 0, out=target[start:end], mode="clip")
        return buffer.send()


class _Buffer:
    """Page-locked memory for one batch, and the memory of the device that it is copied to."""

    def __init__(self, words: int, device: jax.Device) -> None:
        self._target = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
        self._host = PageLocked(words, device)
        self.words = self._host.words
        self._sent: jax.Array | None = None
        self.send().block_until_ready()

    def send(self) -> UInt32[jax.Array, " W"]:
        """Starts to copy ``words`` to where the last ones were, which nobody else holds."""
        self._sent = None
        # not aliased: on a CPU the buffer, which is written again, would be the array itself
        self._sent = jax.device_put(self._host.array, self._target, may_alias=False)
        return self._sent


class Staged:
    """A batch on its way to the device. ``take`` must be called once, for it frees the buffer."""

    def __init__(self, future: Future[jax.Array], free: Callable[[], None]) -> None:
        self._future = future
        self._free = free

    def is_ready(self) -> bool:
        """Whether ``take`` would not wait, be it that the copy has failed."""
        if not self._future.done():
            return False
        return self._future.exception() is not None or has_arrived(self._future.result())

    def take(self) -> UInt32[jax.Array, " W"]:
        """Waits for the words of the batch on the device, ``batch_parts`` says which.

        Raises whatever the copy failed of.
        """
        try:
            return self._future.result().block_until_ready()
        finally:
            self._free()
