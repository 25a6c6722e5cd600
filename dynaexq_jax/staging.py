"""Staging: pages from host memory to the device, by threads of their own.

A batch of pages is copied side by side into page-locked memory, from which the device's copy engine
reads at the speed of the bus, while the decode loop goes on: it only asks whether a batch has
arrived. From ordinary memory each transfer would first be copied by the calling thread.
"""

import collections
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import UInt32

from dynaexq_jax.bank import HostPages, batch_parts, batch_words
from dynaexq_jax.page_locked import PageLocked
from dynaexq_jax.trees import has_arrived
from pallas_kernels.pages import Matrices


class Stager:
    """Copies batches of up to ``pages`` pages, ``buffers`` of them at a time.

    Used by one thread. Every buffer is page-locked host memory for one batch.
    """

    def __init__(self, host: HostPages, device: jax.Device, *, pages: int, buffers: int) -> None:
        self._target = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
        self._shapes = Matrices(*(array.shape[2:] for array in host.rungs[0]))
        self._rungs = [
            Matrices(*(pages.reshape(-1, *pages.shape[2:]) for pages in rung))
            for rung in host.rungs
        ]
        words = batch_words(pages, self._shapes)
        self._free = collections.deque(PageLocked(words, device) for _ in range(buffers))
        self._threads = ThreadPoolExecutor(buffers, thread_name_prefix="staging")

    def stage(self, pages: np.ndarray, places: np.ndarray) -> "Staged":
        """Starts to copy pages to ``places`` of the pool, int [N] each.

        Pages have the numbers of their entries in the page table [R, L, E]. Raises IndexError if
        all buffers are in use, RuntimeError after ``close``.
        """
        buffer = self._free.popleft()
        try:
            future = self._threads.submit(self._copy, pages, places, buffer)
        except RuntimeError:
            self._free.append(buffer)
            raise
        return Staged(future, lambda: self._free.append(buffer))

    def close(self) -> None:
        """Ends the threads, once they are done with what they have begun."""
        self._threads.shutdown()

    def _copy(self, pages: np.ndarray, places: np.ndarray, buffer: PageLocked) -> jax.Array:
        # few calls of numpy, each of which lets other threads run for as long as it copies
        order = np.argsort(pages)
        rungs, numbers = np.divmod(pages[order], len(self._rungs[0].gate_up))
        ends = np.searchsorted(rungs, range(len(self._rungs) + 1))
        to, matrices = batch_parts(buffer.words, self._shapes)
        to[:] = -1
        to[: order.size] = places[order]
        for rung, (start, end) in zip(self._rungs, itertools.pairwise(ends), strict=True):
            for source, target in zip(rung, matrices, strict=True):
                if start < end:
                    np.take(source, numbers[start:end], 0, out=target[start:end], mode="clip")
        # not aliased: on a CPU the buffer, which is written again, would be the array itself
        return jax.device_put(buffer.array, self._target, may_alias=False)


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
