"""What a GPU does, by its own clock: kernels and their times, and the bandwidth of a copy."""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def kernels_of(function: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Launches and median microseconds by kernel name of one call, traced by CUPTI.

    Empty without a GPU. The function is called twice: the first call warms up.
    """
    if jax.default_backend() != "gpu":
        return {}
    from jax.experimental.mosaic.gpu import profiler

    class _Call(jax.stages.Wrapped):
        """The profiler takes jitted functions as they are and jits all others."""

        def __call__(self) -> Any:
            return function()

        def trace(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        def lower(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    _, timings = profiler.measure(_Call(), aggregate=False)()
    by_name: dict[str, list[float]] = {}
    for name, milliseconds in timings or []:
        by_name.setdefault(name, []).append(milliseconds * 1e3)
    return {name: (len(us), statistics.median(us)) for name, us in by_name.items()}


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy kernel of 2 GiB on the device."""
    source = jnp.zeros(2**29, jnp.uint32)
    copy = jax.jit(lambda array: array + jnp.uint32(1))
    times = [us for _ in range(5) for _, us in kernels_of(lambda: copy(source)).values()]
    if not times:
        from environment import copy_bytes_per_s

        return copy_bytes_per_s()
    return 2 * source.nbytes / (statistics.median(times) * 1e-6)
