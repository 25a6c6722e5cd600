"""Chooses the implementation of the linear layer and checks its arguments."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from pallas_kernels.implementations import resolve, target_obstacle
from pallas_kernels.linear.config import LinearConfig, default_config
from pallas_kernels.linear.weights import Int8Matrix, Weight
from pallas_kernels.linear.xla import linear_xla


def linear(
    x: Float[jax.Array, "*B K"],
    weight: Weight,  # [L, N, K]
    layer: Int32[jax.Array, ""] | int,
    *,
    norm: tuple[Float[jax.Array, "L K"], float] | None = None,
    residual: Float[jax.Array, "*B N"] | None = None,
    out_dtype: DTypeLike | None = None,
    config: LinearConfig | None = None,
    implementation: str = "auto",
) -> Float[jax.Array, "*B N"]:
    """``norm(x) @ weight[layer].T + residual`` for a few tokens.

    ``weight`` is a float array, or at 8 bits an ``Int8Matrix``.

    ``norm`` is (weight, eps) of a root-mean-square norm of x over K: in float32, its result rounded
    to the dtype of x. Products are summed in float32, where the residual is added; the result has
    ``out_dtype``, by default that of x. ``layer`` may be traced: all layers share one kernel.
    ``config`` tunes "mosaic", by default to the shapes; "xla" does without.

    "auto" is "mosaic" on a GPU of compute capability 9.x for up to 64 tokens, else "xla".

    Raises ValueError if shapes contradict each other, the layer does not exist or the named
    implementation cannot run.
    """
    _check(x, weight, layer, norm, residual)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    norm_weight, eps = (None, 0.0) if norm is None else (norm[0], float(norm[1]))
    outputs, inputs = weight.shape[1:]
    rows = x.reshape(-1, inputs)
    added = None if residual is None else residual.reshape(-1, outputs)
    tokens = max(rows.shape[0], 1)
    config = config or default_config(tokens, outputs, inputs, _weight_bytes(weight))
    if resolve(implementation, lambda: _obstacle(rows, weight, norm_weight, config)) == "xla":
        y = linear_xla(rows, weight, layer, norm_weight, added, eps=eps, out_dtype=out_dtype)
    else:
        from pallas_kernels.linear.mosaic import linear_mosaic

        y = linear_mosaic(
            rows,
            weight,
            jnp.asarray(layer, jnp.int32),
            norm_weight,
            added,
            eps=eps,
            out_dtype=out_dtype,
            config=config,
        )
    return y.reshape(*x.shape[:-1], outputs)


def _obstacle(
    x: jax.Array, weight: Weight, norm_weight: jax.Array | None, config: LinearConfig
) -> str | None:
    """Why the kernel cannot run on these arguments here, if it cannot."""
    if reason := target_obstacle():
        return reason
    dtypes = {"x": x.dtype}
    if not isinstance(weight, Int8Matrix):
        dtypes["weight"] = weight.dtype
    if norm_weight is not None:
        dtypes["norm's weight"] = norm_weight.dtype
    for name, dtype in dtypes.items():
        if dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, not {dtype}"
    _, outputs, inputs = weight.shape
    return config.obstacle(x.shape[0], outputs, inputs, _weight_bytes(weight))


def _weight_bytes(weight: Weight) -> int:
    """Of an element, in a kernel."""
    return 1 if isinstance(weight, Int8Matrix) else 2


def _check(
    x: jax.Array,
    weight: Weight,
    layer: jax.Array | int,
    norm: tuple[jax.Array, float] | None,
    residual: jax.Array | None,
) -> None:
    if len(weight.shape) != 3:
        raise ValueError(f"weight must be [L, N, K], got {weight.shape}")
    if isinstance(weight, Int8Matrix):
        if weight.codes.dtype != jnp.int8 or weight.scale.dtype != jnp.float32:
            raise ValueError(
                "weight must have int8 codes and a float32 scale, "
                f"got {weight.codes.dtype} and {weight.scale.dtype}"
            )
        if weight.scale.shape != weight.shape[:-1]:
            raise ValueError(
                f"weight's scale must be {weight.shape[:-1]} for codes {weight.shape}, "
                f"got {weight.scale.shape}"
            )
    layers, outputs, inputs = weight.shape
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x must be [..., {inputs}] for weight {weight.shape}, got {x.shape}")
    if norm is not None and norm[0].shape != (layers, inputs):
        raise ValueError(
            f"norm's weight must be {(layers, inputs)} for weight {weight.shape}, "
            f"got {norm[0].shape}"
        )
    if residual is not None and residual.shape != (*x.shape[:-1], outputs):
        raise ValueError(
            f"residual must be {(*x.shape[:-1], outputs)} for x {x.shape} and weight "
            f"{weight.shape}, got {residual.shape}"
        )
    if isinstance(layer, int) and not 0 <= layer < layers:
        raise ValueError(f"layer must be in 0..{layers - 1}, got {layer}")
