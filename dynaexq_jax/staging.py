"""Staging: pages from host memory to the device, by threads of their own.

A batch of pages is copied side by side into page-locked memory, from which the device's copy engine
reads at the speed of the bus, while the decode loop goes on: it only asks whether a batch has
arrived. From ordinary memory each transfer would first be copied by the calling thread.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt32

from dynaexq_jax.bank import HostPages, batch_parts, batch_words
from dynaexq_jax.page_locked import PageLocked
from dynaexq_jax.trees import has_arrived
from pallas_kernels.pages import Matrices


class Move(NamedTuple):
    """A page of the host and where it goes; ordered by rung first."""

    rung: int
    layer: int
    expert: int
    place: int
    """Page of the pool."""


class Stager:
    """Copies batches of up to ``pages`` pages, ``buffers`` of them at a time.

    Used by one thread. Every buffer is page-locked host memory for one batch.
    """

    def __init__(self, host: HostPages, device: jax.Device, *, pages: int, buffers: int) -> None:
        self._host = host
        self._target = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
        self._shapes = Matrices(*(array.shape[2:] for array in host.rungs[0]))
        words = batch_words(pages, self._shapes)
        self._free = collections.deque(PageLocked(words, device) for _ in range(buffers))
        self._threads = ThreadPoolExecutor(buffers, thread_name_prefix="staging")

    def stage(self, moves: Sequence[Move]) -> "Staged":
        """Starts to copy pages, which ascend by rung.

        Raises IndexError if all buffers are in use, RuntimeError after ``close``.
        """
        buffer = self._free.popleft()
        try:
            future = self._threads.submit(self._copy, np.array(moves, np.intp), buffer)
        except RuntimeError:
            self._free.append(buffer)
            raise
        return Staged(future, lambda: self._free.append(buffer))

    def close(self) -> None:
        """Ends the threads, once they are done with what they have begun."""
        self._threads.shutdown()

    def _copy(self, moves: np.ndarray, buffer: PageLocked) -> jax.Array:
        # few calls of numpy, each of which lets other threads run for as long as it copies
        places, matrices = batch_parts(buffer.words, self._shapes)
        rungs, layers, experts, places_of_moves = moves.T
        places[:] = -1
        places[: len(moves)] = places_of_moves
        numbers = layers * self._host.experts + experts
        for rung in range(len(self._host.rungs)):
            rows = slice(*np.searchsorted(rungs, (rung, rung + 1)))
            if rows.start == rows.stop:
                continue
            for source, target in zip(self._host.rungs[rung], matrices, strict=True):
                pages = source.reshape(-1, *source.shape[2:])
                np.take(pages, numbers[rows], axis=0, out=target[rows], mode="clip")
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
