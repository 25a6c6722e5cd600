"""Which GPU a kernel is traced for, and whether it is interpreted on the CPU instead."""

import contextlib
from collections.abc import Iterator

import jax
from jax._src import config as jax_config
from jax.experimental.mosaic.gpu import utils as mgpu_utils

ComputeCapability = tuple[int, int]

HOPPER: ComputeCapability = (9, 0)

_PROBE = mgpu_utils._infer_arch


def interpreting() -> bool:
    """Whether kernels are traced under Pallas' GPU interpret mode."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def has_target() -> bool:
    """Whether a kernel can be traced here: a GPU, an assumed one, or interpret mode."""
    assumed = mgpu_utils._infer_arch is not _PROBE
    return interpreting() or assumed or jax.default_backend() == "gpu"


def compute_capability() -> ComputeCapability:
    """Of the GPU that kernels are traced for: what is assumed, else what is there."""
    return mgpu_utils._infer_arch()


@contextlib.contextmanager
def assume_compute_capability(capability: ComputeCapability) -> Iterator[None]:
    """Traces and lowers for another GPU than the one (if any) that is here."""
    previous = mgpu_utils._infer_arch
    mgpu_utils._infer_arch = lambda: capability
    try:
        yield
    finally:
        mgpu_utils._infer_arch = previous
        jax.clear_caches()  # traces made for the assumed GPU must not serve the real one
