"""What the MoE block takes and refuses, and which implementation it chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.experts import random_experts
from kernels.moe_blocks import EPS, HIDDEN, WIDTH, random_weights
from kernels.targets import assuming_hopper, needs_mosaic

from pallas_kernels.moe_layer import moe_layer
from pallas_kernels.pages import PlainExperts

KEYWORDS = {"top_k": 2, "normalize": True}


def arguments(tokens=2, experts=6):
    norm, router = random_weights(experts)
    packed = random_experts(hidden=HIDDEN, width=WIDTH, experts=experts)
    x = jnp.ones((tokens, HIDDEN), jnp.bfloat16)
    state = jnp.zeros((2, experts)), jnp.zeros(1, jnp.int32)
    return [x, (norm, 0, EPS), router, packed, 0, jnp.ones(tokens, bool), *state]


def test_auto_is_xla_on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("there is another device")
    first, second = (
        moe_layer(*arguments(), **KEYWORDS, implementation=name) for name in ("auto", "xla")
    )
    np.testing.assert_array_equal(np.asarray(first[0]), np.asarray(second[0]))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, jnp.zeros((2, 255)), r"x must be \[T, 256\]"),
        (1, (jnp.zeros((2, 128)), 0, EPS), r"norm's weight must be \[L, 256\]"),
        (1, (jnp.zeros((2, 256)), 2, EPS), r"norm's layer must be in 0\.\.1, got 2"),
        (2, jnp.zeros((1, 6, 256)), r"router must be \(2, 6, 256\)"),
        (4, 2, r"layer must be in 0\.\.1, got 2"),
        (5, jnp.ones(3, bool), r"valid must be bool \(2,\)"),
        (5, jnp.ones(2), r"valid must be bool .*, got float32"),
        (6, jnp.zeros(6), r"mass must be float32 \(2, 6\), got float32 \(6,\)"),
        (7, jnp.zeros(1), r"counter must be int32 \(1,\), got float32"),
    ],
)
def test_bad_arguments_are_named(place, value, message):
    changed = arguments()
    changed[place] = value
    with pytest.raises(ValueError, match=message):
        moe_layer(*changed, **KEYWORDS)


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.6"):
        moe_layer(*arguments(), top_k=7, normalize=True)
    with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'cuda'"):
        moe_layer(*arguments(), **KEYWORDS, implementation="cuda")


@needs_mosaic
def test_named_kernel_that_cannot_run_says_why():
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="'mosaic' cannot run: there is no GPU"):
            moe_layer(*arguments(), **KEYWORDS, implementation="mosaic")
    plain = PlainExperts(jnp.zeros((2, 6, 128, HIDDEN)), jnp.zeros((2, 6, HIDDEN, 64)))
    fine = random_experts(hidden=HIDDEN, width=WIDTH, experts=6, group_size=16)
    norm, router = random_weights(6)
    for place, value, message in (
        (0, jnp.ones((2, HIDDEN)), "x must be bfloat16, not float32"),
        (1, (norm.astype(jnp.float32), 0, EPS), "norm's weight must be bfloat16"),
        (2, router.astype(jnp.float32), "router must be bfloat16"),
        (3, plain, "experts must be packed in pages"),
        (3, fine, "groups must have at least 32 columns, not 16"),
    ):
        changed = arguments()
        changed[place] = value
        with assuming_hopper(), pytest.raises(ValueError, match=message):
            moe_layer(*changed, **KEYWORDS, implementation="mosaic")
    with assuming_hopper(), pytest.raises(ValueError, match="1 to 64 tokens, not 65"):
        moe_layer(*arguments(tokens=65), **KEYWORDS, implementation="mosaic")
