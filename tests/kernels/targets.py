"""Where the kernels of tests run, and what they are lowered for."""

import contextlib
import re

import jax
import pytest

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
RUNNABLE = ["xla", pytest.param("mosaic", marks=needs_mosaic)]
"""Implementations."""


@contextlib.contextmanager
def runner(implementation="mosaic"):
    """Where the implementation runs: on the CPU "mosaic" is interpreted."""
    if implementation != "mosaic" or jax.default_backend() == "gpu":
        yield
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode():
        yield


def like_the_counter(text):
    """Other operands of the type of the counter of grid barriers, of the kernel lowered to text.

    XLA may make one array of the counter and of such an operand (``workers.counter_ref``).
    """
    (call,) = re.findall(r"custom_call @mosaic_gpu.*", text)
    kinds = re.search(r"} : \((.*?)\) -> ", call)[1].split(", ")
    in_place = [int(index) for index in re.findall(r"operand_index = (\d+)", call)]
    (counter,) = [index for index in in_place if kinds[index].endswith("xi32>")]
    return [i for i, kind in enumerate(kinds) if kind == kinds[counter] and i != counter]


def assuming_hopper():
    """Kernels are made for Hopper, whatever is here."""
    from pallas_kernels.mosaic.target import assume_compute_capability

    return assume_compute_capability((9, 0))
