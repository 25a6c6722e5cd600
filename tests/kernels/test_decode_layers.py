"""All layers of a decode step as one kernel: what it takes, and how it lowers.

Its lanes are tested on a CPU in ``test_decode_project_lanes`` and ``test_decode_attend_lanes``, its
numbers on a GPU in ``test_decode_layers_numbers``.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from kernels.decode_shapes import (
    QWEN3_30B,
    SMALL,
    abstract_arguments,
    call_of,
)
from kernels.targets import like_the_counter, needs_mosaic
from pairwise import pairwise

from pallas_kernels.decode_layers import LayerWeights, obstacle
from pallas_kernels.pages import PlainExperts


def assuming(capability):
    from pallas_kernels.mosaic.target import assume_compute_capability

    return assume_compute_capability(capability)


def lower(sizes, tokens, **kinds):
    with assuming((9, 0)):
        traced = jax.jit(call_of(sizes)).trace(*abstract_arguments(sizes, tokens, **kinds))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
@pytest.mark.parametrize(
    ("tokens", "sizes", "bits"),
    pairwise([1, 8, 16], [QWEN3_30B, SMALL], [16, 8]),
    ids=lambda value: str(getattr(value, "hidden", value)),
)
def test_all_layers_lower_as_one_kernel(sizes, tokens, bits):
    text = lower(sizes, tokens, bits=bits, pool_pages=64)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert not like_the_counter(text)


@needs_mosaic
@pytest.mark.parametrize(("base_bits", "pool_pages"), [(2, 0), (2, 64), (4, 0), (8, 0)], ids=str)
def test_every_base_level_lowers(base_bits, pool_pages):
    text = lower(QWEN3_30B, 8, base_bits=base_bits, pool_pages=pool_pages)
    assert text.count("custom_call @mosaic_gpu") == 1


def with_sizes(**changed):
    return abstract_arguments(dataclasses.replace(SMALL, **changed), 2)


def with_array(name, dtype):
    arguments = abstract_arguments(SMALL, 2)
    weights = arguments[1]
    changed = jax.ShapeDtypeStruct(getattr(weights, name).shape, dtype)
    arguments[1] = weights._replace(**{name: changed})
    return arguments


def with_argument(place, value):
    arguments = abstract_arguments(SMALL, 2)
    arguments[place] = value
    return arguments


def with_group_size(size, base_bits):
    """The shapes of scales are left as they are: nobody looks at them."""
    experts = abstract_arguments(SMALL, 2, base_bits=base_bits)[2]
    fmt = dataclasses.replace(experts.format, group_size=size)
    return with_argument(2, dataclasses.replace(experts, format=fmt))


def other_heads():
    """Of 64 elements."""
    arguments = abstract_arguments(SMALL, 2)
    cache = jax.ShapeDtypeStruct((3, 2, 256, 4, 64), jnp.bfloat16)
    arguments[5:7] = [cache, cache]
    return arguments


REASONS = {
    "tokens": (lambda: abstract_arguments(SMALL, 17), "it takes 1 to 16 tokens, not 17"),
    "no token": (lambda: abstract_arguments(SMALL, 0), "it takes 1 to 16 tokens, not 0"),
    "head": (other_heads, "heads must have 128 elements, not 64"),
    "group": (
        lambda: with_sizes(q_heads=18),
        "at most 8 query heads a key-value head, not 18",
    ),
    "context": (lambda: with_sizes(context=250), "the context must be a multiple of 16, not 250"),
    "hidden": (lambda: with_sizes(hidden=384), "H must be a multiple of 256, not 384"),
    "large projection": (
        lambda: with_sizes(hidden=4096, q_heads=16),
        "24 rows of 8256 bytes, a block's of qkv, are too many",
    ),
    "uneven heads": (
        lambda: with_sizes(q_heads=9, kv_heads=2),
        "9 query heads are no multiple of 2 others",
    ),
    "pairs": (
        lambda: with_sizes(q_heads=80, kv_heads=80),
        "2 tokens of 80 heads are more than 132 blocks",
    ),
    "large output": (
        lambda: with_sizes(hidden=1280, q_heads=48, kv_heads=8),
        "16 rows of 12352 bytes, a block's of o, are too many",
    ),
    "layers without experts": (
        lambda: with_argument(2, abstract_arguments(dataclasses.replace(SMALL, layers=2), 2)[2]),
        "every layer must have experts: 2 of 3 have",
    ),
    "plain experts": (
        lambda: with_argument(
            2,
            PlainExperts(
                jax.ShapeDtypeStruct((3, 16, 128, 512), jnp.bfloat16),
                jax.ShapeDtypeStruct((3, 16, 512, 64), jnp.bfloat16),
            ),
        ),
        "experts must be packed in pages",
    ),
    "small groups": (
        lambda: with_group_size(16, base_bits=4),
        "groups must have at least 32 columns, not 16",
    ),
    "many scales": (
        lambda: with_group_size(32, base_bits=2),
        "bf16 scales of 32 columns at 2 bits do not fit shared memory; 64 do, or log8",
    ),
    "x": (
        lambda: with_argument(0, jax.ShapeDtypeStruct((2, 512), jnp.float32)),
        "x must be bfloat16, not float32",
    ),
    "cache": (
        lambda: with_argument(5, jax.ShapeDtypeStruct((3, 2, 256, 2, 128), jnp.float32)),
        "the cache must be bfloat16, not float32",
    ),
    **{
        name: (
            functools.partial(with_array, name, jnp.float32),
            f"{name} must be bfloat16, not float32",
        )
        for name in LayerWeights._fields
    },
}


def assert_refuses(arguments, reason):
    """Both functions say so."""
    assert obstacle(*arguments[:3], arguments[5]) == reason
    with pytest.raises(ValueError, match="run layer by layer") as info:
        jax.eval_shape(call_of(SMALL), *arguments)
    assert str(info.value).startswith(f"decode_layers cannot run: {reason};")


@needs_mosaic
@pytest.mark.parametrize("name", REASONS)
def test_what_it_does_not_take_is_named(name, monkeypatch):
    from pallas_kernels.mosaic import workers

    monkeypatch.setattr(workers, "multiprocessors", lambda: 132)
    make, reason = REASONS[name]
    with assuming((9, 0)):
        assert_refuses(make(), reason)


@needs_mosaic
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("sizes", [QWEN3_30B, SMALL], ids=["30B", "small"])
def test_nothing_is_in_the_way(sizes, tokens):
    for bits in (8, 16):
        x, weights, experts, _, _, keys, *_ = abstract_arguments(sizes, tokens, bits=bits)
        with assuming((9, 0)):
            assert obstacle(x, weights, experts, keys) is None


@needs_mosaic
def test_other_targets_are_named():
    arguments = abstract_arguments(SMALL, 2)
    with assuming((8, 6)):
        assert_refuses(arguments, "it needs compute capability 9.x, this is 8.6")
    if jax.default_backend() != "gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        assert_refuses(arguments, "there is no GPU")
        with plgpu.force_gpu_interpret_mode():
            assert_refuses(arguments, "interpret mode has no barrier over the grid")


def test_old_jax_is_named():
    if jax.__version_info__ >= (0, 11):
        pytest.skip("this jax has what the kernel needs")
    assert_refuses(abstract_arguments(SMALL, 2), f"it needs jax 0.11, this is {jax.__version__}")


@needs_mosaic
def test_contradicting_rows_are_named():
    arguments = with_argument(0, jax.ShapeDtypeStruct((3, 512), jnp.bfloat16))
    with assuming((9, 0)), pytest.raises(ValueError, match=r"x must have a row a cache slot, 2"):
        jax.eval_shape(call_of(SMALL), *arguments)
