"""The prefill kernels' lowering for Hopper on a CPU."""

import jax
import jax.numpy as jnp
import pytest
from kernels.targets import assuming_hopper, needs_mosaic

from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.pages import ExpertFormat, abstract_experts

pytestmark = needs_mosaic


def lower_for_hopper(
    tokens,
    *,
    base_bits,
    pool_pages,
    group_size=64,
    encoding="bf16",
    hidden=2048,
    width=768,
    top_k=8,
):
    fmt = ExpertFormat(
        hidden=hidden,
        width=width,
        group_size=group_size,
        scale_encoding=encoding,
        table=DEFAULT_TABLE,
    )
    experts = abstract_experts(
        fmt, layers=48, experts=128, base_bits=base_bits, pool_pages=pool_pages
    )

    def two_layers(x, ids, weights, experts):
        for layer in range(2):
            x = x + expert_ffn(x, ids, weights, experts, layer, "mosaic")
        return x

    with assuming_hopper():
        return (
            jax.jit(two_layers)
            .trace(
                jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16),
                jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
                jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
                experts,
            )
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )


@pytest.mark.parametrize("tokens", [65, 2048, 4096])
def test_lowers_for_hopper_once_for_all_layers(tokens):
    text = lower_for_hopper(tokens, base_bits=4, pool_pages=0)
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    ("base_bits", "group_size", "encoding"), [(2, 64, "bf16"), (4, 32, "log8"), (8, 128, "bf16")]
)
def test_every_level_and_encoding_lowers_for_hopper(base_bits, group_size, encoding):
    lower_for_hopper(
        512,
        base_bits=base_bits,
        pool_pages=4 if base_bits < 8 else 0,
        group_size=group_size,
        encoding=encoding,
    )


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 2), (70, 3)])
def test_awkward_sizes_lower_for_hopper(tokens, top_k):
    """Rows that are no multiple of eight, and 64 bytes of scales a step."""
    lower_for_hopper(
        tokens,
        base_bits=2,
        pool_pages=4,
        group_size=128,
        encoding="log8",
        hidden=128,
        width=384,
        top_k=top_k,
    )
