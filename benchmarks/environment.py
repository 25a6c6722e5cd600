"""What every benchmark states: the machine, the versions, the ceiling of its memory."""

import datetime
import os
import platform
import statistics
import time
from importlib import metadata

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


def copy_bytes_per_s(size: int = 2**28, repeats: int = 9) -> float:
    """Bytes read and written a second by a copy on the device: the ceiling of memory-bound work.

    Median of ``repeats`` copies of ``size`` bytes, compilation excluded.
    """
    source = jnp.zeros(size // 4, jnp.uint32)
    copy = jax.jit(lambda array: array + jnp.uint32(1))
    copy(source).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        copy(source).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.machine()
