"""Combines the splits of decode attention: one block per slot and query head."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.mosaic_heads import load
from pallas_kernels.mosaic import pdl

_THREADS = 128


def combine_splits(outputs: jax.Array, tops: jax.Array, totals: jax.Array) -> jax.Array:
    """Softmax over all positions from softmaxes over parts of them.

    outputs float32 [B, Nkv, splits, heads, D] are sums of values weighted by 2**(score - top); tops
    and totals float32 [B, Nkv, splits, heads] are the largest score and the sum of weights, in
    units of log2. A part with total 0 is void and its output may be anything. The result is
    bfloat16 [B, Nkv, heads, D], zero where all parts are void.
    """
    batch, kv_heads, splits, heads, head = outputs.shape
    return plgpu.kernel(
        functools.partial(_combine_body, splits=splits, layout=_layout(head)),
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, heads, head), jnp.bfloat16),
        grid=(batch, kv_heads, heads),
        grid_names=("slot", "kv_head", "head"),
        kernel_name="decode_attention_combine",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(outputs, tops, totals)


def _layout(head: int) -> Any:
    if head % _THREADS:
        return plgpu.Layout.WGMMA.reduce(1)  # for any multiple of 64
    return plgpu.Layout.WG_STRIDED((head,), vec_size=head // _THREADS)


def _combine_body(
    outputs_ref: Any,  # [B, Nkv, splits, heads, D]
    tops_ref: Any,  # [B, Nkv, splits, heads]
    totals_ref: Any,  # [B, Nkv, splits, heads]
    y_ref: Any,  # [B, Nkv, heads, D]
    *,
    splits: int,
    layout: Any,
) -> None:
    slot, kv_head, head = (lax.axis_index(name) for name in ("slot", "kv_head", "head"))
    pdl.wait()
    pdl.release()
    parts = [(slot, kv_head, split, head) for split in range(splits)]
    tops = [tops_ref[part] for part in parts]
    totals = [totals_ref[part] for part in parts]
    outputs = [load(outputs_ref.at[part], layout=layout) for part in parts]
    top = functools.reduce(jnp.maximum, tops)
    weights = [
        jnp.where(total > 0, jnp.exp2(part_top - top), 0.0)
        for part_top, total in zip(tops, totals, strict=True)
    ]
    total = sum(w * t for w, t in zip(weights, totals, strict=True))
    y = sum(
        jnp.where(jnp.broadcast_to(w > 0, o.shape), o * w, 0.0)
        for w, o in zip(weights, outputs, strict=True)
    )
    y_ref[slot, kv_head, head] = (y / jnp.where(total > 0, total, 1.0)).astype(y_ref.dtype)
