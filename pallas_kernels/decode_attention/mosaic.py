"""Decode attention for Hopper: one kernel over splits of the context, one that combines them.

A block of the first kernel holds one slot, one kv head and a share of the old positions. It
prefetches tiles of keys and values before its predecessor has finished: they were written a step
ago. The new key and value come from qkv, never from the cache: the last block that has work
starts its softmax from them, and writes them to the cache in place.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.mosaic_combine import combine_splits
from pallas_kernels.decode_attention.mosaic_heads import (
    dot,
    half_layout,
    load,
    load_halves,
    rotated,
)
from pallas_kernels.decode_attention.shapes import TILE, DecodeConfig, DecodeShapes
from pallas_kernels.mosaic import pdl

_LOG2E = math.log2(math.e)
_OUT = plgpu.Layout.WGMMA  # of scores [TILE, heads] and of outputs [D, heads]
_BY_HEAD = _OUT.reduce(0)
_BY_ROW = _OUT.reduce(1)


@functools.partial(jax.jit, static_argnames=("eps", "shapes", "config"))
def decode_attention_mosaic(
    qkv: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    eps: float,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    layer: jax.Array,
    *,
    shapes: DecodeShapes,
    config: DecodeConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``decode_attention`` of api.py. The kernel writes the cache in place, through references."""
    rows = (shapes.layers * shapes.batch * shapes.context, shapes.kv_heads * shapes.head)
    keys_ref, values_ref = (jax.new_ref(cache.reshape(rows)) for cache in (keys, values))
    partial = _attend(shapes, config, eps)(
        layer.reshape(1), positions, _pad_heads(qkv, shapes), q_norm, k_norm, cos, sin,
        keys_ref, values_ref,
    )  # fmt: skip
    y = partial[0] if config.splits == 1 else combine_splits(*partial)
    y = y[:, :, : shapes.group].reshape(shapes.batch, shapes.q_heads * shapes.head)
    keys, values = (jax.freeze(ref).reshape(keys.shape) for ref in (keys_ref, values_ref))
    return y, keys, values


def _pad_heads(qkv: jax.Array, shapes: DecodeShapes) -> jax.Array:
    """[B, heads, D], where each kv head's query heads are padded with zeros."""
    heads = qkv.reshape(shapes.batch, -1, shapes.head)
    padding = shapes.padded_group - shapes.group
    if not padding:
        return heads
    q, kv = jnp.split(heads, [shapes.q_heads], axis=1)
    q = q.reshape(shapes.batch, shapes.kv_heads, shapes.group, shapes.head)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    return jnp.concatenate([q.reshape(shapes.batch, -1, shapes.head), kv], axis=1)


def _attend(shapes: DecodeShapes, config: DecodeConfig, eps: float) -> Any:
    heads, head, splits = shapes.padded_group, shapes.head, config.splits
    pairs = (shapes.batch, shapes.kv_heads)
    if splits == 1:
        out_type = [jax.ShapeDtypeStruct((*pairs, heads, head), jnp.bfloat16)]
    else:
        out_type = [
            jax.ShapeDtypeStruct((*pairs, splits, heads, head), jnp.float32),
            jax.ShapeDtypeStruct((*pairs, splits, heads), jnp.float32),
            jax.ShapeDtypeStruct((*pairs, splits, heads), jnp.float32),
        ]
    minor = min(64, head // 2)  # a half of a head must be whole tiles of shared memory
    transforms = (plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(2 * minor))
    tiles = plgpu.SMEM((config.stages, TILE, head), jnp.bfloat16, transforms=transforms)
    arrived = plgpu.Barrier(num_barriers=config.stages)
    return plgpu.kernel(
        functools.partial(_attend_body, shapes=shapes, config=config, eps=eps),
        out_type=out_type,
        grid=(shapes.batch, splits, shapes.kv_heads),
        grid_names=("slot", "split", "kv_head"),
        kernel_name="decode_attention",
        scratch_types=[
            tiles,
            tiles,
            plgpu.SMEM((heads, head), jnp.bfloat16, transforms=transforms),  # q
            plgpu.SMEM((heads, TILE), jnp.bfloat16, transforms=transforms),  # probabilities
            plgpu.SMEM((heads,), jnp.float32),  # scores of the new position
            arrived,
            arrived,
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )


def _attend_body(
    layer_ref: Any,  # [1]
    positions_ref: Any,  # [B]
    qkv_ref: Any,  # [B, Nkv * heads + 2 * Nkv, D]
    q_norm_ref: Any,  # [L, D]
    k_norm_ref: Any,  # [L, D]
    cos_ref: Any,  # [B, D / 2]
    sin_ref: Any,  # [B, D / 2]
    keys_ref: Any,  # [L * B * S, Nkv * D]
    values_ref: Any,  # [L * B * S, Nkv * D]
    *refs: Any,
    shapes: DecodeShapes,
    config: DecodeConfig,
    eps: float,
) -> None:
    outputs, (k_smem, v_smem, q_smem, p_smem, new_smem, k_arrived, v_arrived) = refs[:-7], refs[-7:]
    heads, head, stages = shapes.padded_group, shapes.head, config.stages
    slot, split, kv_head = (lax.axis_index(name) for name in ("slot", "split", "kv_head"))
    layer, position = layer_ref[0], positions_ref[slot]
    scale = head**-0.5 * _LOG2E

    # Old positions are dealt out in tiles; an idle slot has none and no new one.
    all_tiles = pl.cdiv(jnp.maximum(position, 0), TILE)
    span = pl.cdiv(all_tiles, config.splits)
    first = split * span
    tiles = jnp.clip(all_tiles - first, 0, span)
    last_split = jnp.maximum(pl.cdiv(all_tiles, jnp.maximum(span, 1)) - 1, 0)
    holds_new = (position >= 0) & (split == last_split)
    row = (layer * shapes.batch + slot) * shapes.context
    columns = pl.ds(kv_head * head, head)

    def fetch(cache_ref: Any, smem: Any, arrived: Any, tile: jax.Array) -> None:
        stage = lax.rem(tile, stages)
        source = cache_ref.at[pl.ds(row + (first + tile) * TILE, TILE), columns]
        plgpu.copy_gmem_to_smem(source, smem.at[stage], arrived.at[stage])

    for tile in range(stages):

        @pl.when(tile < tiles)
        def _(tile: int = tile) -> None:
            fetch(keys_ref, k_smem, k_arrived, jnp.int32(tile))
            fetch(values_ref, v_smem, v_arrived, jnp.int32(tile))

    layout = half_layout(heads, head)
    by_column = layout.reduce(0)
    q_weight = load_halves(q_norm_ref.at[layer], by_column)
    k_weight = load_halves(k_norm_ref.at[layer], by_column)
    pdl.wait()
    pdl.release()

    @pl.when((tiles == 0) & jnp.logical_not(holds_new))
    def _() -> None:
        _store_void(outputs, (slot, kv_head), split)

    @pl.when((tiles > 0) | holds_new)
    def _() -> None:
        q = load_halves(qkv_ref.at[slot, pl.ds(kv_head * heads, heads)], layout)
        k_row = shapes.kv_heads * heads + kv_head
        k = load_halves(qkv_ref.at[slot, k_row], by_column)
        v_ref = qkv_ref.at[slot, k_row + shapes.kv_heads]
        v = load_halves(v_ref, by_column)
        v_by_row = load(v_ref, layout=_BY_ROW)
        cos = load(cos_ref.at[slot], layout=by_column)
        sin = load(sin_ref.at[slot], layout=by_column)
        q = rotated(q, q_weight, cos, sin, eps, layout)
        k = rotated(k, k_weight, cos, sin, eps, by_column)
        half = head // 2
        for index in range(2):
            q_smem[:, index * half : (index + 1) * half] = q[index]
        new_smem[...] = dot(q, k) * scale
        plgpu.commit_smem()

        def step(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            output, top, weights = carry
            stage = lax.rem(tile, stages)
            plgpu.barrier_wait(k_arrived.at[stage])
            scores = _product(k_smem.at[stage], q_smem.transpose((1, 0)))
            rows = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=_OUT)
            old = rows < position - (first + tile) * TILE
            scores = jnp.where(old, scores * scale, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=0))
            shrink = jnp.exp2(top - new_top)
            new_weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, (1,)))
            # The last tile's product has read p_smem in every warp: the maximum joined them.
            p_smem.transpose((1, 0))[...] = new_weights.astype(jnp.bfloat16)
            plgpu.commit_smem()

            # Here every warp is done with this tile's keys and with the last tile's values.
            @pl.when(tile + stages < tiles)
            def _() -> None:
                fetch(keys_ref, k_smem, k_arrived, tile + stages)

            @pl.when((tile > 0) & (tile - 1 + stages < tiles))
            def _() -> None:
                fetch(values_ref, v_smem, v_arrived, tile - 1 + stages)

            plgpu.barrier_wait(v_arrived.at[stage])
            added = _product(v_smem.at[stage].transpose((1, 0)), p_smem.transpose((1, 0)))
            output = output * lax.broadcast_in_dim(shrink, output.shape, (1,)) + added
            weights = weights * lax.broadcast_in_dim(shrink, weights.shape, (1,)) + new_weights
            return output, new_top, weights

        new_score = load(new_smem, layout=_BY_HEAD)
        new_score += jnp.where(holds_new, 0.0, -jnp.inf)
        v_new = v_by_row.astype(jnp.float32) * jnp.where(holds_new, 1.0, 0.0)
        output = lax.broadcast_in_dim(v_new, (head, heads), (0,))
        no_weights = plgpu.layout_cast(jnp.zeros((TILE, heads), jnp.float32), _OUT)
        output, top, weights = lax.fori_loop(0, tiles, step, (output, new_score, no_weights))
        total = jnp.sum(weights, axis=0) + jnp.exp2(new_score - top)
        _store_part(outputs, (slot, kv_head), split, output, top, total)

        @pl.when(holds_new)
        def _() -> None:
            for cache_ref, new in ((keys_ref, k), (values_ref, v)):
                for index in range(2):
                    half_columns = pl.ds(kv_head * head + index * half, half)
                    cache_ref[row + position, half_columns] = new[index]


def _product(a: Any, b: Any) -> jax.Array:
    """``a @ b`` of two matrices in shared memory, in float32."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _store_part(
    outputs: tuple[Any, ...],
    pair: tuple[jax.Array, jax.Array],
    split: jax.Array,
    output: jax.Array,  # [D, heads]
    top: jax.Array,  # [heads]
    total: jax.Array,  # [heads]
) -> None:
    if len(outputs) == 1:
        [y_ref] = outputs
        y = output / lax.broadcast_in_dim(total, output.shape, (1,))
        _store_transposed(y_ref.at[pair], y.astype(y_ref.dtype))
        return
    output_ref, top_ref, total_ref = outputs
    part = (*pair, split)
    _store_transposed(output_ref.at[part], output)
    top_ref[part] = top
    total_ref[part] = total


def _store_transposed(ref: Any, x: jax.Array) -> None:
    ref.transpose((1, 0))[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def _store_void(
    outputs: tuple[Any, ...], pair: tuple[jax.Array, jax.Array], split: jax.Array
) -> None:
    """What a block writes that has no positions: zeros, or a part with total 0."""
    if len(outputs) == 1:
        [y_ref] = outputs
        y = jnp.zeros(y_ref.shape[2:][::-1], y_ref.dtype)
        _store_transposed(y_ref.at[pair], plgpu.layout_cast(y, _OUT))
        return
    _, top_ref, total_ref = outputs
    void = jnp.zeros(top_ref.shape[-1:], jnp.float32)
    top_ref[(*pair, split)] = plgpu.layout_cast(void - jnp.inf, _BY_HEAD)
    total_ref[(*pair, split)] = plgpu.layout_cast(void, _BY_HEAD)
