"""Page-locked host memory: what the device reads at the speed of the bus, with no copy before."""

import ctypes

import jax
import numpy as np
from jaxtyping import UInt32


class PageLocked:
    """Words in page-locked memory, as an array that transfers read and as a view that can be
    written.

    Who writes must know that whatever reads ``array`` is over.
    """

    def __init__(self, words: int, device: jax.Device) -> None:
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        zeros = np.zeros(words, np.uint32)
        self.array: UInt32[jax.Array, " W"] = jax.device_put(zeros, sharding)
        jax.block_until_ready(self.array)
        memory = (ctypes.c_uint32 * words).from_address(self.array.unsafe_buffer_pointer())
        self.words: UInt32[np.ndarray, " W"] = np.ctypeslib.as_array(memory)
