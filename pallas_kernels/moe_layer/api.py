"""Chooses the implementation of the MoE block and checks its arguments."""

from typing import Final, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32

from pallas_kernels.implementations import resolve, target_obstacle
from pallas_kernels.moe_layer.xla import moe_layer_xla
from pallas_kernels.pages import PagedExperts, PlainExperts

Norm: TypeAlias = tuple[Float[jax.Array, "Ln H"], Int32[jax.Array, ""] | int, float]
"""Weights of a norm, stacked over layers; the layer among them; eps."""

_MOST_TOKENS: Final = 64
_MOST_EXPERTS: Final = 512
_LEAST_GROUP: Final = 32  # columns of an instruction of the tensor cores
_COLUMNS: Final = 256  # the hidden size is a multiple of it: a warp reads so many at once


def moe_layer(
    x: Float[jax.Array, "T H"],
    norm: Norm,
    router: Float[jax.Array, "L E H"],
    experts: PagedExperts | PlainExperts,
    layer: Int32[jax.Array, ""] | int,
    valid: Bool[jax.Array, " T"],
    mass: Float32[jax.Array, "L E"],
    counter: Int32[jax.Array, " 1"],
    *,
    top_k: int,
    normalize: bool,
    implementation: str = "auto",
) -> tuple[Float[jax.Array, "T H"], Float32[jax.Array, "L E"], Int32[jax.Array, " 1"]]:
    """``x`` plus the experts' feed-forward of ``h = rms_norm(x)``; ``(y, mass, counter)``.

    h is normed in float32 and rounded to the dtype of x. The logits ``h @ router[layer].T`` and
    their softmax over E are float32; each token goes to the ``top_k`` experts with the largest
    logits (ties: the lower index first), weighted by their probabilities, which ``normalize``
    divides by their sum. Their weighted outputs are added up in float32, then x; the result has
    the dtype of x. A token that is not ``valid`` has no experts: it comes back as it was.

    ``mass[layer, e]`` grows by the weights that valid tokens gave expert e. ``counter`` belongs to
    the kernel: zero before the first call, then what the call before gave back. Donate both: they
    are updated in place.

    ``layer`` counts the layers with experts, as ``router`` and ``experts`` do; the norm's layer
    counts those of its weights. Both may be traced: all layers share one trace.

    "auto" is "mosaic" on a GPU of compute capability 9.x for up to 64 tokens, else "xla".

    Raises ValueError if shapes contradict each other, a layer does not exist or the named
    implementation cannot run.
    """
    _check(x, norm, router, experts, layer, valid, top_k)
    _check_state(mass, counter, experts)
    weight, norm_layer, eps = norm
    norm = (weight, jnp.asarray(norm_layer, jnp.int32), float(eps))
    layer = jnp.asarray(layer, jnp.int32)
    if resolve(implementation, lambda: _obstacle(x, weight, router, experts)) == "xla":
        y, mass = moe_layer_xla(
            x, norm, router, experts, layer, valid, mass, top_k=top_k, normalize=normalize
        )
        return y, mass, counter
    from pallas_kernels.moe_layer.mosaic import moe_layer_kernel

    assert isinstance(experts, PagedExperts)
    return moe_layer_kernel(
        x,
        norm=norm,
        router=router,
        experts=experts,
        layer=layer,
        valid=valid,
        mass=mass,
        counter=counter,
        top_k=top_k,
        normalize=normalize,
    )


def _obstacle(
    x: jax.Array,
    norm_weight: jax.Array,
    router: jax.Array,
    experts: PagedExperts | PlainExperts,
) -> str | None:
    """Why the kernel cannot run on these arguments here, if it cannot."""
    if reason := target_obstacle():
        return reason
    if reason := experts_obstacle(experts):
        return reason
    for name, array in {"x": x, "norm's weight": norm_weight, "router": router}.items():
        if array.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, not {array.dtype}"
    tokens, hidden = x.shape
    if not 1 <= tokens <= _MOST_TOKENS:
        return f"it takes 1 to {_MOST_TOKENS} tokens, not {tokens}"
    if hidden % _COLUMNS:
        return f"H must be a multiple of {_COLUMNS}, not {hidden}"
    return None


def experts_obstacle(experts: PagedExperts | PlainExperts) -> str | None:
    """Why kernels of decode steps do not take these experts, if so."""
    if isinstance(experts, PlainExperts):
        return "experts must be packed in pages"
    if experts.experts > _MOST_EXPERTS:
        return f"at most {_MOST_EXPERTS} experts, not {experts.experts}"
    if experts.format.group_size < _LEAST_GROUP:
        return f"groups must have at least {_LEAST_GROUP} columns, not {experts.format.group_size}"
    return None


def _check(
    x: jax.Array,
    norm: Norm,
    router: jax.Array,
    experts: PagedExperts | PlainExperts,
    layer: jax.Array | int,
    valid: jax.Array,
    top_k: int,
) -> None:
    weight, norm_layer, _ = norm
    if x.ndim != 2 or x.shape[1] != experts.hidden:
        raise ValueError(f"x must be [T, {experts.hidden}] for these experts, got {x.shape}")
    wanted = (experts.layers, experts.experts, experts.hidden)
    if router.shape != wanted:
        raise ValueError(f"router must be {wanted} for these experts, got {router.shape}")
    if weight.ndim != 2 or weight.shape[1] != experts.hidden:
        raise ValueError(
            f"norm's weight must be [L, {experts.hidden}] for these experts, got {weight.shape}"
        )
    if valid.shape != x.shape[:1] or valid.dtype != jnp.bool_:
        raise ValueError(
            f"valid must be bool {x.shape[:1]} for x {x.shape}, got {valid.dtype} {valid.shape}"
        )
    if not 1 <= top_k <= experts.experts:
        raise ValueError(f"top_k must be in 1..{experts.experts} (experts), got {top_k}")
    for name, index, layers in (
        ("layer", layer, experts.layers),
        ("norm's layer", norm_layer, weight.shape[0]),
    ):
        if isinstance(index, int) and not 0 <= index < layers:
            raise ValueError(f"{name} must be in 0..{layers - 1}, got {index}")


def _check_state(mass: jax.Array, counter: jax.Array, experts: PagedExperts | PlainExperts) -> None:
    for name, array, dtype, shape in (
        ("mass", mass, jnp.float32, (experts.layers, experts.experts)),
        ("counter", counter, jnp.int32, (1,)),
    ):
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{name} must be {jnp.dtype(dtype)} {shape}, got {array.dtype} {array.shape}"
            )
