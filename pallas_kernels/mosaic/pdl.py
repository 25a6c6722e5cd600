"""Programmatic dependent launch: a kernel starts while its predecessor still runs.

Until ``wait`` returns, a block may read only what no kernel of the step writes (weights) and write
only shared memory; ``wait`` returns when all earlier kernels have finished and their writes are
seen. ``release`` lets the next kernel start. It is called after ``wait``, never before: so at most
two kernels overlap, and what is read before ``wait`` was finished two kernels ago.
"""

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.target import HOPPER, compute_capability, interpreting


def wait() -> None:
    """Blocks until every earlier kernel of the stream has finished. Once in every block."""
    if _available():
        plgpu.griddepcontrol_wait()


def release() -> None:
    """Lets the next kernel of the stream start beside this one."""
    if _available():
        plgpu.griddepcontrol_launch_dependents()


def _available() -> bool:
    return not interpreting() and compute_capability() >= HOPPER
