"""Shapes and abstract arguments of ``decode_layers`` for its tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layers import LayerWeights, decode_layers
from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.linear import Int8Matrix
from pallas_kernels.pages import ExpertFormat, abstract_experts

EPS = 1e-6
HEAD = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Axis letters as in ``decode_layers``."""

    layers: int
    hidden: int
    width: int
    experts: int
    top_k: int
    q_heads: int
    kv_heads: int
    context: int

    @property
    def rows(self):
        return (self.q_heads + 2 * self.kv_heads) * HEAD


QWEN3_30B = Sizes(
    layers=48,
    hidden=2048,
    width=768,
    experts=128,
    top_k=8,
    q_heads=32,
    kv_heads=4,
    context=1024,
)
SMALL = Sizes(
    layers=3,
    hidden=512,
    width=64,
    experts=16,
    top_k=2,
    q_heads=8,
    kv_heads=2,
    context=256,
)


def matrix_kind(bits):
    """A random matrix [L, N, K], or its shape, at 8 or 16 bits."""

    def abstract(*shape):
        if bits == 16:
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        codes = jax.ShapeDtypeStruct(shape, jnp.int8)
        return Int8Matrix(codes, jax.ShapeDtypeStruct(shape[:-1], jnp.float32))

    return abstract


def abstract_arguments(sizes, tokens, *, bits=16, base_bits=4, pool_pages=0):
    array, matrix = jax.ShapeDtypeStruct, matrix_kind(bits)
    layers, hidden, bfloat16 = sizes.layers, sizes.hidden, jnp.bfloat16
    weights = LayerWeights(
        attention_norm=array((layers, hidden), bfloat16),
        qkv=matrix(layers, sizes.rows, hidden),
        q_norm=array((layers, HEAD), bfloat16),
        k_norm=array((layers, HEAD), bfloat16),
        o=matrix(layers, hidden, sizes.q_heads * HEAD),
        mlp_norm=array((layers, hidden), bfloat16),
        router=array((layers, sizes.experts, hidden), bfloat16),
    )
    fmt = ExpertFormat(
        hidden=hidden,
        width=sizes.width,
        group_size=64,
        scale_encoding="bf16",
        table=DEFAULT_TABLE,
    )
    experts = abstract_experts(
        fmt, layers=layers, experts=sizes.experts, base_bits=base_bits, pool_pages=pool_pages
    )
    cache = array((layers, tokens, sizes.context, sizes.kv_heads, HEAD), bfloat16)
    turn = array((tokens, HEAD // 2), jnp.float32)
    return [
        array((tokens, hidden), bfloat16),
        weights,
        experts,
        turn,
        turn,
        cache,
        cache,
        array((tokens,), jnp.int32),
        array((layers, sizes.experts), jnp.float32),
        array((1,), jnp.int32),
    ]


def call_of(sizes):
    return functools.partial(decode_layers, eps=EPS, top_k=sizes.top_k, normalize=True)
