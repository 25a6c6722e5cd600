"""Chooses the implementation of the expert feed-forward and checks its arguments."""

from typing import Final

import jax
from jaxtyping import Float, Float32, Int32

from pallas_kernels.expert_ffn.xla import expert_ffn_pages, expert_ffn_plain
from pallas_kernels.pages import PagedExperts, PlainExperts

IMPLEMENTATIONS: Final = ("auto", "xla")


def resolve_implementation(name: str) -> str:
    """The implementation that ``name`` stands for. Only "auto" chooses by itself.

    Raises ValueError for an unknown name.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {name!r}")
    return "xla" if name == "auto" else name


def expert_ffn(
    x: Float[jax.Array, "T H"],
    expert_ids: Int32[jax.Array, "T k"],
    expert_weights: Float32[jax.Array, "T k"],
    experts: PagedExperts | PlainExperts,
    layer: int,
    implementation: str = "auto",
) -> Float[jax.Array, "T H"]:
    """Sum over a token's experts e of ``weight_e * down_e(silu(gate_e(x)) * up_e(x))``.

    ``layer`` indexes axis L of the arrays. Experts may be at any mix of levels; an id of -1 is no
    expert; tokens need no order. The result has the dtype of ``x``, accumulated in float32. Under
    jit, ``layer`` and ``implementation`` are static.

    Raises ValueError if shapes contradict the experts or the implementation cannot run.
    """
    resolve_implementation(implementation)
    if x.ndim != 2 or x.shape[1] != experts.hidden:
        raise ValueError(f"x must be [T, {experts.hidden}] for these experts, got {x.shape}")
    if not expert_ids.shape == expert_weights.shape == (x.shape[0], expert_ids.shape[-1]):
        raise ValueError(
            f"expert_ids {expert_ids.shape} and expert_weights {expert_weights.shape} must both "
            f"be [{x.shape[0]}, k]"
        )
    if expert_ids.shape[-1] > experts.experts:
        raise ValueError(f"{expert_ids.shape[-1]} experts a token, but there are {experts.experts}")
    if not 0 <= layer < experts.layers:
        raise ValueError(f"layer must be in 0..{experts.layers - 1}, got {layer}")
    if isinstance(experts, PlainExperts):
        y = expert_ffn_plain(x, expert_ids, expert_weights, experts, layer)
    else:
        y = expert_ffn_pages(x, expert_ids, expert_weights, experts, layer)
    return y.astype(x.dtype)
