"""Staging: pages from host memory to the device, by threads of their own.

A batch of pages is copied side by side into page-locked memory, from which the device's copy engine
reads at the speed of the bus, while the decode loop goes on: it only asks whether a batch has
arrived. From ordinary memory each transfer would first be copied by the calling thread.
"""

import collections
import ctypes
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import UInt32

from dynaexq_jax.bank import HostPages
from dynaexq_jax.trees import has_arrived
from pallas_kernels.pages import Matrices


class Stager:
    """Copies batches of up to ``pages`` pages, ``buffers`` of them at a time.

    Used by one thread. Every buffer is page-locked host memory for one batch.
    """

    def __init__(self, host: HostPages, device: jax.Device, *, pages: int, buffers: int) -> None:
        self._host = host
        self._target = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
        shapes = [(pages, *array.shape[2:]) for array in host.rungs[0]]
        self._free = collections.deque(
            Matrices(*(_PageLocked(shape, device) for shape in shapes)) for _ in range(buffers)
        )
        self._threads = ThreadPoolExecutor(buffers, thread_name_prefix="staging")

    def stage(self, wanted: Sequence[tuple[int, int, int]]) -> "Staged":
        """Starts to copy pages (rung, layer, expert), which ascend by rung.

        What is past the last is undefined. Raises IndexError if all buffers are in use,
        RuntimeError after ``close``.
        """
        assert all(a[0] <= b[0] for a, b in itertools.pairwise(wanted))
        buffer = self._free.popleft()
        try:
            future = self._threads.submit(self._copy, list(wanted), buffer)
        except RuntimeError:
            self._free.append(buffer)
            raise
        return Staged(future, lambda: self._free.append(buffer))

    def close(self) -> None:
        """Ends the threads, once they are done with what they have begun."""
        self._threads.shutdown()

    def _copy(self, wanted: list[tuple[int, int, int]], buffer: Matrices) -> Matrices:
        # few calls of numpy, each of which lets other threads run for as long as it copies
        rungs, layers, experts = np.array(wanted, np.intp).T
        for rung in np.unique(rungs):
            rows = slice(*np.searchsorted(rungs, (rung, rung + 1)))
            numbers = layers[rows] * self._host.experts + experts[rows]
            for source, target in zip(self._host.rungs[rung], buffer, strict=True):
                pages = source.reshape(-1, *source.shape[2:])
                np.take(pages, numbers, axis=0, out=target.words[rows], mode="clip")
        # not aliased: on a CPU the buffer, which is written again, would be the array itself
        return Matrices(
            *(jax.device_put(part.array, self._target, may_alias=False) for part in buffer)
        )


class Staged:
    """A batch on its way to the device. ``take`` must be called once, for it frees the buffer."""

    def __init__(self, future: Future[Matrices], free: Callable[[], None]) -> None:
        self._future = future
        self._free = free

    def is_ready(self) -> bool:
        """Whether ``take`` would not wait, be it that the copy has failed."""
        if not self._future.done():
            return False
        return self._future.exception() is not None or has_arrived(self._future.result())

    def take(self) -> Matrices:
        """Waits for the pages, uint32 [pages, B, 2C, 256] on the device.

        Raises whatever the copy failed of.
        """
        try:
            return jax.block_until_ready(self._future.result())
        finally:
            self._free()


class _PageLocked:
    """An array of words in page-locked memory, and a view of it that can be written."""

    def __init__(self, shape: tuple[int, ...], device: jax.Device) -> None:
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        zeros = np.zeros(shape, np.uint32)
        self.array: UInt32[jax.Array, "M B C2 256"] = jax.device_put(zeros, sharding)
        jax.block_until_ready(self.array)
        start = self.array.unsafe_buffer_pointer()
        words = (ctypes.c_uint32 * zeros.size).from_address(start)
        flat: np.ndarray = np.ctypeslib.as_array(words)
        self.words: UInt32[np.ndarray, "M B C2 256"] = flat.reshape(shape)
