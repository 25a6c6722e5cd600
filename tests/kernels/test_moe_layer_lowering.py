"""The lowering of the MoE block for Hopper on a CPU, at the shape of Qwen3-30B-A3B."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from kernels.moe_blocks import EPS
from kernels.targets import assuming_hopper, like_the_counter, needs_mosaic

from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.moe_layer import moe_layer
from pallas_kernels.pages import ExpertFormat, abstract_experts


def abstract_30b(tokens, base_bits=4, pool_pages=64, encoding="log8"):
    """Arguments of Qwen3-30B-A3B: x, norm, router, experts, valid, both layers, mass, counter."""
    fmt = ExpertFormat(
        hidden=2048, width=768, group_size=64, scale_encoding=encoding, table=DEFAULT_TABLE
    )
    array = jax.ShapeDtypeStruct
    return (
        array((tokens, 2048), jnp.bfloat16),
        array((48, 2048), jnp.bfloat16),
        array((48, 128, 2048), jnp.bfloat16),
        abstract_experts(fmt, layers=48, experts=128, base_bits=base_bits, pool_pages=pool_pages),
        array((tokens,), jnp.bool_),
        array((), jnp.int32),
        array((), jnp.int32),
        array((48, 128), jnp.float32),
        array((1,), jnp.int32),
    )


@needs_mosaic
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32, 64])
def test_lowers_for_hopper(tokens):
    def call(x, norm, router, experts, valid, layer, norm_layer, mass, counter):
        norm = (norm, norm_layer, EPS)
        keywords = {"top_k": 8, "normalize": True, "implementation": "mosaic"}
        return moe_layer(x, norm, router, experts, layer, valid, mass, counter, **keywords)

    with assuming_hopper():
        traced = jax.jit(call).trace(*abstract_30b(tokens))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert not like_the_counter(text)


@needs_mosaic
@pytest.mark.parametrize("encoding", ["bf16", "log8"])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize(("tokens", "base_bits"), [(8, 2), (32, 2), (64, 2), (64, 4), (64, 8)])
def test_shared_memory_suffices(tokens, base_bits, group_size, encoding):
    """As large a ring as fits, at 64 tokens and 2 bits a smaller one."""
    from pallas_kernels.moe_layer.mosaic.kernel import default_config, moe_phases
    from pallas_kernels.mosaic.workers import fits

    _, _, _, experts, *_ = abstract_30b(tokens, base_bits, encoding=encoding)
    fmt = dataclasses.replace(experts.format, group_size=group_size)
    experts = abstract_experts(fmt, layers=48, experts=128, base_bits=base_bits, pool_pages=64)
    found = []

    def trace(experts):
        config = default_config(tokens, experts)
        keywords = {"tokens": tokens, "eps": EPS, "top_k": 8, "normalize": True}
        found.append(moe_phases(experts, config=config, **keywords)[0])

    with assuming_hopper():
        jax.eval_shape(trace, experts)
    (phases,) = found
    assert fits(phases.scratch())
    lines = phases.gate_up.ring_lines
    assert 44 <= lines == phases.down.ring_lines <= 48
    larger = [dataclasses.replace(p, ring_lines=lines + 1) for p in (phases.gate_up, phases.down)]
    phases = dataclasses.replace(phases, gate_up=larger[0], down=larger[1])
    assert lines == 48 or not fits(phases.scratch())
