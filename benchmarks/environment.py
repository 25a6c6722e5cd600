"""What every benchmark states: the machine, the versions, the ceiling of its memory."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp


def describe() -> dict[str, str]:
    """Device, versions and date, as they are written beside results."""
    device = jax.devices()[0]
    return {
        "device": f"{os.cpu_count()} CPU cores ({_cpu_name()})"
        if device.platform == "cpu"
        else device.device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": metadata.version("flax"),
        "date": datetime.date.today().isoformat(),
    }


def seconds_of(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of several calls, the arrays that they return waited for."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def copy_bytes_per_s() -> float:
    """Bytes read and written a second by a copy on the device: the ceiling of memory-bound work.

    Median of nine copies of 256 MiB, compilation excluded.
    """
    source = jnp.zeros(2**26, jnp.uint32)
    copy = jax.jit(lambda array: array + jnp.uint32(1))
    copy(source).block_until_ready()
    return 2 * source.nbytes / statistics.median(seconds_of(lambda: copy(source), 9))


def product_flops_per_s(size: int) -> float:
    """Operations a second of a square float32 product on the device.

    Median of five, compilation excluded.
    """
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(matrix).block_until_ready()
    return 2 * size**3 / statistics.median(seconds_of(lambda: product(matrix), 5))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.machine()
