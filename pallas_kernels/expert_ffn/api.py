"""Chooses the implementation of the expert feed-forward and checks its arguments."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from pallas_kernels.expert_ffn.xla import expert_ffn_pages, expert_ffn_plain
from pallas_kernels.implementations import resolve, target_obstacle
from pallas_kernels.layout import CHUNK
from pallas_kernels.pages import PagedExperts, PlainExperts


def expert_ffn(
    x: Float[jax.Array, "T H"],
    expert_ids: Int32[jax.Array, "T k"],
    expert_weights: Float32[jax.Array, "T k"],
    experts: PagedExperts | PlainExperts,
    layer: Int32[jax.Array, ""] | int,
    implementation: str = "auto",
) -> Float[jax.Array, "T H"]:
    """Sum over a token's experts e of ``weight_e * down_e(silu(gate_e(x)) * up_e(x))``.

    ``layer`` indexes axis L of the arrays. Experts may be at any mix of levels; an id of -1 is no
    expert; tokens need no order. The result has the dtype of ``x``, accumulated in float32.
    ``layer`` may be traced, and should be where layers are many: all share one compiled kernel.
    Under jit, ``implementation`` is static.

    "mosaic" takes bfloat16 x and pages. On compute capability 9.x it is for many tokens: hidden
    size and width are multiples of 128; weights are rounded to bfloat16, and the rows between the
    matmuls. On 8.x and 12.x it serves few and many tokens, with weights as float16. "auto" is
    "mosaic" where that can run.

    Raises ValueError if shapes contradict the experts or the implementation cannot run.
    """
    if x.ndim != 2 or x.shape[1] != experts.hidden:
        raise ValueError(f"x must be [T, {experts.hidden}] for these experts, got {x.shape}")
    if not expert_ids.shape == expert_weights.shape == (x.shape[0], expert_ids.shape[-1]):
        raise ValueError(
            f"expert_ids {expert_ids.shape} and expert_weights {expert_weights.shape} must both "
            f"be [{x.shape[0]}, k]"
        )
    if expert_ids.shape[-1] > experts.experts:
        raise ValueError(f"{expert_ids.shape[-1]} experts a token, but there are {experts.experts}")
    if isinstance(layer, int) and not 0 <= layer < experts.layers:
        raise ValueError(f"layer must be in 0..{experts.layers - 1}, got {layer}")
    if resolve(implementation, lambda: _obstacle(x, experts)) == "mosaic":
        assert isinstance(experts, PagedExperts)
        return _mosaic(x, expert_ids, expert_weights, experts, jnp.asarray(layer, jnp.int32))
    if isinstance(experts, PlainExperts):
        y = expert_ffn_plain(x, expert_ids, expert_weights, experts, layer)
    else:
        y = expert_ffn_pages(x, expert_ids, expert_weights, experts, layer)
    return y.astype(x.dtype)


def _mosaic(
    x: jax.Array, ids: jax.Array, weights: jax.Array, experts: PagedExperts, layer: jax.Array
) -> jax.Array:
    if _on_hopper():
        from pallas_kernels.expert_ffn.mosaic_prefill.ffn import expert_ffn_mosaic

        return expert_ffn_mosaic(x, ids, weights, experts, layer)
    from pallas_kernels.expert_ffn.mosaic_mma import expert_ffn_mma

    return expert_ffn_mma(x, ids, weights, experts, layer).astype(x.dtype)


def _on_hopper() -> bool:
    """Whether the tensor cores have wgmma; interpret mode plays one that does."""
    from pallas_kernels.mosaic import target

    return target.interpreting() or target.compute_capability()[0] == target.HOPPER[0]


def _obstacle(x: jax.Array, experts: PagedExperts | PlainExperts) -> str | None:
    """Why the kernels cannot run on these arguments here, if they cannot."""
    if reason := target_obstacle((8, 9, 12)):
        return reason
    if isinstance(experts, PlainExperts):
        return "it multiplies pages, and these experts are not quantized"
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, not {x.dtype}"
    if not x.shape[0]:
        return "there is no token"
    multiple = CHUNK if _on_hopper() else 8
    for name in ("hidden", "width"):
        if getattr(experts.format, name) % multiple:
            return f"{name} must be a multiple of {multiple}, not {getattr(experts.format, name)}"
    return None
