"""Staging: pages from host memory to the device, by threads of their own.

A batch of pages is gathered into page-locked memory, from which the device's copy engine reads at
the speed of the bus, while the decode loop goes on: it only asks whether a batch has arrived. From
ordinary memory each transfer would first be copied by the calling thread.

One thread gathers a fraction of what the bus carries, so several gather parts of one batch: that
takes fewer batches on their way, and less memory, than a batch for each thread. Parts are large,
for each call of numpy needs the interpreter, which the decode loop needs as well.
"""

import bisect
import collections
import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import jax
import numpy as np
from jaxtyping import UInt32

from dynaexq_jax.bank import HostPages, StagedPages
from dynaexq_jax.trees import has_arrived
from pallas_kernels.pages import Matrices

PART_BYTES: Final = 8 * 2**20
"""What one thread gathers at a time, at least, where a batch holds as much."""


class Stager:
    """Copies batches of up to ``pages`` pages, ``buffers`` of them at a time.

    Used by one thread. Every buffer is page-locked host memory for one batch. ``gatherers`` threads
    copy from host memory to host memory.
    """

    def __init__(
        self, host: HostPages, device: jax.Device, *, pages: int, buffers: int, gatherers: int
    ) -> None:
        self._host = host
        self._target = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
        self._pages, self._gatherers = pages, gatherers
        shapes = [(pages, *array.shape[2:]) for array in host.rungs[0]]
        self._free = collections.deque(
            Matrices(*(_PageLocked(shape, device) for shape in shapes)) for _ in range(buffers)
        )
        self._page_bytes = sum(matrix.array.nbytes for matrix in self._free[0]) // pages
        self._batches = ThreadPoolExecutor(buffers, thread_name_prefix="staging")
        self._parts = ThreadPoolExecutor(gatherers, thread_name_prefix="gathering")

    def stage(self, wanted: Sequence[tuple[int, int, int]], places: Sequence[int]) -> "Staged":
        """Starts to copy pages (rung, layer, expert), which ascend by rung, for places of the pool.

        Raises IndexError if all buffers are in use, RuntimeError after ``close``.
        """
        assert all(a[0] <= b[0] for a, b in itertools.pairwise(wanted))
        buffer = self._free.popleft()
        try:
            future = self._batches.submit(self._copy, wanted, places, buffer)
        except RuntimeError:
            self._free.append(buffer)
            raise
        return Staged(future, lambda: self._free.append(buffer))

    def close(self) -> None:
        """Ends the threads, once they are done with what they have begun."""
        self._batches.shutdown()
        self._parts.shutdown()

    def _copy(
        self, wanted: Sequence[tuple[int, int, int]], places: Sequence[int], buffer: Matrices
    ) -> StagedPages:
        numbers = np.array([layer * self._host.experts + expert for _, layer, expert in wanted])
        parts = [
            self._parts.submit(self._gather, rung, numbers[rows], rows, buffer)
            for rung, rows in self._pieces([rung for rung, _, _ in wanted])
        ]
        wait(parts)  # for all: the buffer is used again, whatever became of one
        for part in parts:
            part.result()
        padded = np.full(self._pages, -1, np.int32)
        padded[: len(places)] = places
        # not aliased: on a CPU the buffer, which is written again, would be the array itself
        batch = Matrices(*(matrix.array for matrix in buffer)), padded
        return StagedPages(*jax.device_put(batch, self._target, may_alias=False))

    def _pieces(self, rungs: list[int]) -> Iterator[tuple[int, slice]]:
        """Rows of one rung each, that one thread gathers."""
        parts = max(1, min(self._gatherers, len(rungs) * self._page_bytes // PART_BYTES))
        cuts = {len(rungs) * part // parts for part in range(parts + 1)}
        cuts |= {bisect.bisect_left(rungs, rung) for rung in set(rungs)}
        for start, stop in itertools.pairwise(sorted(cuts)):
            yield rungs[start], slice(start, stop)

    def _gather(self, rung: int, numbers: np.ndarray, rows: slice, buffer: Matrices) -> None:
        # few calls of numpy, each of which lets other threads run for as long as it copies
        for source, target in zip(self._host.rungs[rung], buffer, strict=True):
            pages = source.reshape(-1, *source.shape[2:])
            np.take(pages, numbers, axis=0, out=target.words[rows], mode="clip")


class Staged:
    """A batch on its way to the device. ``take`` must be called once, for it frees the buffer."""

    def __init__(self, future: Future[StagedPages], free: Callable[[], None]) -> None:
        self._future = future
        self._free = free

    def is_ready(self) -> bool:
        """Whether ``take`` would not wait, be it that the copy has failed."""
        if not self._future.done():
            return False
        return self._future.exception() is not None or has_arrived(self._future.result())

    def take(self) -> StagedPages:
        """Waits for the pages on the device.

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
