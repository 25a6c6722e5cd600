"""The implementations that every operation has, and which of them can run here."""

from collections.abc import Callable, Collection
from typing import Final

import jax

IMPLEMENTATIONS: Final = ("auto", "xla", "mosaic")
"""Plain JAX is "xla"; "mosaic" is a kernel for GPUs; only "auto" chooses by itself."""

HOPPER_ONLY: Final = (9,)
"""Major compute capabilities with wgmma."""


def check(name: str) -> None:
    """Raises ValueError for an unknown name, and for "mosaic" where no kernel can run at all."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {name!r}")
    if name == "mosaic" and (reason := _no_kernels()):
        raise _cannot_run(reason)


def resolve(name: str, obstacle: Callable[[], str | None]) -> str:
    """ "xla" or "mosaic". ``obstacle`` says why the kernel cannot run on the arguments, if so.

    "auto" is "mosaic" on a GPU where nothing is in the way. Raises ValueError for an unknown name,
    and for a named "mosaic" that cannot run.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {name!r}")
    if name == "xla" or (name == "auto" and jax.default_backend() != "gpu"):
        return "xla"
    reason = obstacle()
    if reason is None:
        return "mosaic"
    if name == "auto":
        return "xla"
    raise _cannot_run(reason)


def target_obstacle(majors: Collection[int] = HOPPER_ONLY) -> str | None:
    """Why a kernel for GPUs of these major compute capabilities cannot run here, if so."""
    if reason := _no_kernels():
        return reason
    from pallas_kernels.mosaic import target

    capability = target.compute_capability()
    if target.interpreting() or capability[0] in majors:
        return None
    known = " or ".join(f"{major}.x" for major in majors)
    return f"it needs compute capability {known}, this is {capability[0]}.{capability[1]}"


def _no_kernels() -> str | None:
    if jax.__version_info__ < (0, 11):
        return f"it needs jax 0.11, this is {jax.__version__}"
    from pallas_kernels.mosaic import target

    return None if target.has_target() else "there is no GPU"


def _cannot_run(reason: str) -> ValueError:
    return ValueError(f"implementation 'mosaic' cannot run: {reason}; use 'auto' or 'xla'")
