"""The linear layer as one Mosaic GPU kernel for Hopper: a race to read the weights.

A block owns some rows of W and the whole of K, so no two blocks add to the same output. Tensor
cores take 64 rows at a time; a block of fewer rows fills the 64 with chunks of K:

    A [chunk * rows + r, k] = W[row + r, chunk * K / chunks + k]
    B [chunk * columns + t, k] = x[t, chunk * K / chunks + k]

Of A @ B^T only the blocks with one chunk on both sides mean anything; their sum over the chunks is
y^T. What the tensor cores do in vain costs nothing: they wait for A, which they read once.

The norm: B gets x * w, rounded as x is, and y is multiplied by rsqrt(mean(x^2) + eps) in float32,
which every block sums up beside its products. The specification rounds x * rsqrt(...) * w: each
rounds its input once, to as many bits.

Weights at 8 bits stream as codes and become bfloat16 in registers (``mosaic_int8``); 128 rows are
two tiles that share B. The scale of a row comes in at the end.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import BFloat16, Float, Int32

from pallas_kernels.linear.config import LINE, TILE_ROWS, LinearConfig, padded_tokens
from pallas_kernels.linear.mosaic_int8 import SUMS, code_transforms, multiply_codes
from pallas_kernels.linear.weights import Int8Matrix, Weight
from pallas_kernels.mosaic import pdl

_SWIZZLED = (plgpu.TilingTransform((8, LINE)), plgpu.SwizzleTransform(128))
_SPARE = 2  # columns that keep the 64 rows of the sums from falling on the same memory banks


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """One shape of the kernel."""

    tokens: int
    outputs: int
    inputs: int
    rows: int
    step: int
    chunks: int
    stages: int

    @property
    def steps(self) -> int:
        return self.inputs // (self.chunks * self.step)

    @property
    def columns(self) -> int:
        """Of B for one chunk: the tokens, padded."""
        return padded_tokens(self.tokens)

    @property
    def height(self) -> int:
        """Of A: whole tiles of the tensor cores."""
        return max(self.rows, TILE_ROWS)


@functools.partial(jax.jit, static_argnames=("eps", "out_dtype", "config"))
def linear_mosaic(
    x: BFloat16[jax.Array, "T K"],
    weight: Weight,  # bfloat16 [L, N, K], or Int8Matrix
    layer: Int32[jax.Array, ""],
    norm_weight: BFloat16[jax.Array, "L K"] | None,
    residual: Float[jax.Array, "T N"] | None,
    *,
    eps: float,
    out_dtype: jnp.dtype,
    config: LinearConfig,
) -> Float[jax.Array, "T N"]:
    """``norm(x) @ weight[layer].T + residual``; without ``norm_weight`` there is no norm."""
    tokens, inputs = x.shape
    plan = _Plan(
        tokens=tokens,
        outputs=weight.shape[1],
        inputs=inputs,
        rows=config.rows,
        step=config.step,
        chunks=config.chunks,
        stages=min(config.stages, inputs // (config.chunks * config.step)),
    )
    if tokens > 8 and tokens % 8:
        x = jnp.pad(x, ((0, -tokens % 8), (0, 0)))  # copies take whole tiles of 8, or part of one
    scratch: dict[str, Any] = {}
    scale = None
    if isinstance(weight, Int8Matrix):
        elements, scale = weight.codes, weight.scale.reshape(-1)
        # a copy brings at least a byte a thread
        scratch["scale_smem"] = plgpu.SMEM((max(plan.rows, 32),), scale.dtype)
        scratch["scale_bar"] = plgpu.Barrier()
    else:
        elements = weight
    if norm_weight is not None:
        norm_weight = norm_weight.reshape(-1, plan.step)
        lines = inputs // plan.step
        scratch["norm_smem"] = plgpu.SMEM((lines, plan.step), jnp.bfloat16)
        scratch["norm_bar"] = plgpu.Barrier()
    if residual is not None:
        scratch["residual_smem"] = plgpu.SMEM((plan.columns, plan.rows), residual.dtype)
        scratch["residual_bar"] = plgpu.Barrier()
    return plgpu.kernel(
        functools.partial(_body, plan=plan, eps=eps),
        out_type=jax.ShapeDtypeStruct((tokens, plan.outputs), out_dtype),
        grid=(pl.cdiv(plan.outputs, plan.rows),),
        grid_names=("n",),
        kernel_name="linear",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # all layouts are written down here
            unsafe_no_auto_barriers=True,  # and so are all barriers: commit_smem
        ),
    )(layer, elements.reshape(-1, inputs), scale, x, norm_weight, residual)


def _body(
    layer_ref: Any,  # []
    weight_ref: Any,  # [L * N, K]
    scale_ref: Any,  # [L * N] or None
    x_ref: Any,  # [T, K]
    norm_ref: Any,  # [L * K / step, step] or None
    residual_ref: Any,  # [T, N] or None
    y_ref: Any,  # [T, N]
    *,
    plan: _Plan,
    eps: float,
    scale_smem: Any = None,  # [rows or more]
    scale_bar: Any = None,
    norm_smem: Any = None,  # [K / step, step]
    norm_bar: Any = None,
    residual_smem: Any = None,  # [columns, rows]
    residual_bar: Any = None,
) -> None:
    first = lax.axis_index("n") * plan.rows
    layer = layer_ref[...]
    own = (pl.ds(0, plan.columns), pl.ds(first, plan.rows))  # of y; copies skip absent tokens

    def stream(ring: _Ring) -> tuple[jax.Array, jax.Array]:
        """The sums of all products [height, chunks * columns], and of x^2 [columns, step]."""
        for i in range(plan.stages):
            ring.load_weight(i)
        if scale_ref is not None:
            piece = scale_ref.at[pl.ds(ring.row, scale_smem.shape[0])]
            plgpu.copy_gmem_to_smem(piece, scale_smem, scale_bar)
        if norm_ref is not None:
            lines = plan.inputs // plan.step
            piece = norm_ref.at[pl.ds(layer * lines, lines)]
            plgpu.copy_gmem_to_smem(piece, norm_smem, norm_bar)
        pdl.wait()
        pdl.release()
        for i in range(plan.stages):
            ring.load_x(i)
        if residual_ref is not None:
            plgpu.copy_gmem_to_smem(residual_ref.at[own], residual_smem, residual_bar)
        if norm_ref is not None:
            plgpu.barrier_wait(norm_bar)
        if scale_ref is not None:
            return _multiply_codes(ring, norm_smem)
        sums = plgpu.ACC((plan.height, plan.chunks * plan.columns), jnp.float32)
        return pl.run_scoped(functools.partial(_multiply, ring, norm_smem), sums)

    # where the ring was: parts [height, chunks * columns + spare], y [columns, rows]
    def finish(parts: Any, y_smem: Any) -> None:
        layout = _token_layout(1)
        parts[:, pl.ds(0, plan.chunks * plan.columns)] = sums
        plgpu.commit_smem()
        y = plgpu.layout_cast(jnp.zeros((plan.columns, plan.rows), jnp.float32), layout)
        for c in range(plan.chunks):
            part = parts.at[_part(c, plan.rows), _part(c, plan.columns)]
            y += plgpu.load(part.transpose((1, 0)), layout=layout, optimized=False)
        if scale_ref is not None:
            plgpu.barrier_wait(scale_bar)
            own_scale = scale_smem.at[pl.ds(0, plan.rows)]
            scale = plgpu.load(own_scale, layout=layout.reduce(0), optimized=False)
            y *= _spread(scale, y.shape, 1, layout)
        if norm_ref is not None:
            rate = lax.rsqrt(jnp.sum(squares, axis=1) / plan.inputs + eps)
            y *= _spread(rate, y.shape, 0, layout)
        if residual_ref is not None:
            plgpu.barrier_wait(residual_bar)
            residual = plgpu.load(residual_smem, layout=layout, optimized=False)
            y += residual.astype(jnp.float32)
        y_smem[...] = y.astype(y_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, y_ref.at[own])
        plgpu.wait_smem_to_gmem(0)

    width = plan.chunks * plan.columns
    bars = plgpu.Barrier(num_arrivals=plan.chunks, num_barriers=plan.stages)
    sums, squares = pl.run_scoped(
        lambda *refs: stream(_Ring(plan, weight_ref, x_ref, layer * plan.outputs + first, *refs)),
        plgpu.SMEM(
            (plan.stages, plan.height, plan.step),
            weight_ref.dtype,
            transforms=_SWIZZLED if scale_ref is None else code_transforms(plan.step),
        ),
        plgpu.SMEM((plan.stages, width, plan.step), jnp.bfloat16, transforms=_SWIZZLED),
        bars,
        bars,
    )
    plgpu.commit_smem()  # all warps have done with the ring
    pl.run_scoped(
        finish,
        plgpu.SMEM((plan.height, width + _SPARE), jnp.float32),
        plgpu.SMEM((plan.columns, plan.rows), y_ref.dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The stages in shared memory, and what fills them. Step i takes stage i % stages."""

    plan: _Plan
    weight_ref: Any  # [L * N, K]
    x_ref: Any  # [T, K]
    row: Any  # of weight_ref, the block's first
    weight: Any  # [stages, height, step]
    x: Any  # [stages, chunks * columns, step]
    weight_bar: Any
    x_bar: Any

    def load_weight(self, i: Any) -> None:
        stage = lax.rem(i, self.plan.stages)
        for c in range(self.plan.chunks):
            place = self.weight.at[stage, _part(c, self.plan.rows)]
            plgpu.copy_gmem_to_smem(self._weight_piece(i, c), place, self.weight_bar.at[stage])

    def load_x(self, i: Any) -> None:
        """Tokens that are not there come as zeros."""
        stage = lax.rem(i, self.plan.stages)
        for c in range(self.plan.chunks):
            piece = self.x_ref.at[pl.ds(0, self.plan.columns), self._inputs(i, c)]
            place = self.x.at[stage, _part(c, self.plan.columns)]
            plgpu.copy_gmem_to_smem(piece, place, self.x_bar.at[stage])

    def _weight_piece(self, i: Any, chunk: int) -> Any:
        return self.weight_ref.at[pl.ds(self.row, self.plan.rows), self._inputs(i, chunk)]

    def _inputs(self, i: Any, chunk: int) -> Any:
        return pl.ds((chunk * self.plan.steps + i) * self.plan.step, self.plan.step)


def _no_squares(plan: _Plan, norm_smem: Any) -> jax.Array:
    if norm_smem is None:
        return jnp.float32(0)
    squares = jnp.zeros((plan.columns, plan.step), jnp.float32)
    return plgpu.layout_cast(squares, _x_layout(plan.step))


def _multiply(ring: _Ring, norm_smem: Any, sums: Any) -> tuple[jax.Array, jax.Array]:
    plan = ring.plan

    def step(i: jax.Array, squares: jax.Array) -> jax.Array:
        stage = lax.rem(i, plan.stages)
        plgpu.barrier_wait(ring.x_bar.at[stage])
        if norm_smem is not None:
            squares = _apply_norm(ring, norm_smem, i, squares)
        plgpu.barrier_wait(ring.weight_bar.at[stage])
        plgpu.wgmma(sums, ring.weight.at[stage], ring.x.at[stage].transpose((1, 0)))
        plgpu.wgmma_wait(1)  # the step before is done: its stage is free
        ahead = i - 1 + plan.stages

        @pl.when((i > 0) & (ahead < plan.steps))
        def _refill() -> None:
            plgpu.commit_smem()  # all warps have done with it
            ring.load_weight(ahead)
            ring.load_x(ahead)

        return squares

    squares = lax.fori_loop(0, plan.steps, step, _no_squares(plan, norm_smem))
    return sums[...], squares


def _multiply_codes(ring: _Ring, norm_smem: Any) -> tuple[jax.Array, jax.Array]:
    plan = ring.plan

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums, squares = carry
        stage = lax.rem(i, plan.stages)
        plgpu.barrier_wait(ring.x_bar.at[stage])
        if norm_smem is not None:
            squares = _apply_norm(ring, norm_smem, i, squares)
        plgpu.barrier_wait(ring.weight_bar.at[stage])
        sums = multiply_codes(sums, ring.weight.at[stage], ring.x.at[stage], _SWIZZLED)
        ahead = i + plan.stages

        @pl.when(ahead < plan.steps)
        def _refill() -> None:
            plgpu.commit_smem()  # all warps have done with it
            ring.load_weight(ahead)
            ring.load_x(ahead)

        return sums, squares

    sums = jnp.zeros((plan.height, plan.chunks * plan.columns), jnp.float32)
    carry = plgpu.layout_cast(sums, SUMS), _no_squares(plan, norm_smem)
    return lax.fori_loop(0, plan.steps, step, carry)


def _apply_norm(ring: _Ring, norm_smem: Any, i: jax.Array, squares: jax.Array) -> jax.Array:
    """x * w of step i, in place; ``squares`` [columns, step] + x^2."""
    plan = ring.plan
    layout = _x_layout(plan.step)
    for c in range(plan.chunks):
        tile = ring.x.at[lax.rem(i, plan.stages), _part(c, plan.columns)]
        x = plgpu.load(tile, layout=layout, optimized=False)
        wide = x.astype(jnp.float32)
        squares += wide * wide
        w = plgpu.load(norm_smem.at[c * plan.steps + i], layout=layout.reduce(0), optimized=False)
        tile[...] = x * _spread(w, x.shape, 1, layout)
    plgpu.commit_smem()
    return squares


def _part(chunk: int, size: int) -> Any:
    return pl.ds(chunk * size, size)


def _x_layout(step: int) -> Any:
    return _token_layout(min(8, step // 16))


def _token_layout(vector: int) -> Any:
    """Registers of [tokens, values]: 16 threads a token, each with ``vector`` values in a row.

    A token's sum stays within a warp, and a tile of x and one of y have it in the same threads.
    """
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, 16 * vector), (2, 16 * vector), (vector,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def _spread(values: jax.Array, shape: tuple[int, ...], axis: int, layout: Any) -> jax.Array:
    """``values``, along ``axis`` of ``shape``, repeated along the other axis."""
    return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (axis,)), layout)
