"""The prefill kernels against the float64 definition of the expert feed-forward.

Tolerance, per output: the kernels round every weight, every hidden value and every expert's output
to bfloat16, independent relative errors of at most r = 2^-8, so of variance at most r^2 / 3 each;
log8 scales are rounded too, which doubles that of a weight. We allow four standard deviations of
what they sum up to, and the rounding of the result.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.experts import expert_matrices, random_experts, random_routing
from kernels.targets import assuming_hopper, needs_mosaic, runner

from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.pages import PlainExperts

pytestmark = needs_mosaic
EXPERTS = 6
ROUNDING = 2**-8 / np.sqrt(3)


def define(matrices_of, x, ids, weights, log8):
    """The result in float64, and the variance of its error."""
    of_weight = ROUNDING**2 * (2 if log8 else 1)
    y, variance = np.zeros(x.shape), np.zeros(x.shape)
    for token, k in np.ndindex(*ids.shape):
        if ids[token, k] < 0:
            continue
        gate_up, down = matrices_of(ids[token, k])
        products = (gate_up @ x[token]).reshape(-1, 2, 8)  # eights alternate
        errors = of_weight * (gate_up**2 @ x[token] ** 2).reshape(-1, 2, 8)
        gate, up = (products[:, i].reshape(-1) for i in range(2))
        of_gate, of_up = (errors[:, i].reshape(-1) for i in range(2))
        silu = gate / (1 + np.exp(-gate))
        hidden = silu * up
        of_hidden = (1.1 * up) ** 2 * of_gate + silu**2 * of_up + (ROUNDING * hidden) ** 2
        out = down @ hidden
        of_out = down**2 @ (of_hidden + of_weight * hidden**2) + (ROUNDING * out) ** 2
        y[token] += weights[token, k] * out
        variance[token] += weights[token, k] ** 2 * of_out
    return y, variance


@jax.jit
def run_by_name(x, ids, weights, experts, layer):
    return expert_ffn(x, ids, weights, experts, layer, "mosaic")


def assert_matches(experts, ids, weights, *, layer=1, call=run_by_name):
    x = np.random.default_rng(9).normal(size=(ids.shape[0], experts.hidden))
    x = jnp.asarray(x, jnp.bfloat16)

    with runner():
        y = call(x, jnp.asarray(ids), jnp.asarray(weights), experts, jnp.int32(layer))
    log8 = experts.format.scale_encoding == "log8"
    matrices = {e: expert_matrices(experts, layer, e) for e in set(ids[ids >= 0].tolist())}
    wide = np.asarray(x, np.float64)
    expected, variance = define(matrices.__getitem__, wide, ids, weights, log8)
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert y.dtype == jnp.bfloat16
    assert (error <= 4 * np.sqrt(variance) + 2**-8 * np.abs(expected)).all()


@pytest.mark.parametrize("base_bits", [2, 4, 8])
def test_any_mix_of_levels(base_bits):
    experts = random_experts(hidden=256, width=128, base_bits=base_bits)
    assert_matches(experts, *random_routing(70, 3, EXPERTS))


@pytest.mark.parametrize(("group_size", "encoding"), [(16, "bf16"), (32, "log8"), (128, "log8")])
def test_groups_and_scale_encodings(group_size, encoding):
    experts = random_experts(hidden=128, width=128, group_size=group_size, encoding=encoding)
    assert_matches(experts, *random_routing(5, 2, EXPERTS))


@pytest.mark.parametrize(("hidden", "width"), [(384, 256), (512, 128)])
def test_steps_of_one_two_and_four_chunks(hidden, width):
    assert_matches(random_experts(hidden=hidden, width=width), *random_routing(4, 3, EXPERTS))


def test_all_tokens_choose_one_expert():
    """More rows than a tile holds: 160 are two tiles of 80."""
    ids = np.full((160, 1), 4, np.int32)
    assert_matches(random_experts(hidden=128, width=128), ids, np.ones((160, 1), np.float32))


def test_ragged_routing_with_empty_experts_and_tokens_without():
    ids = np.repeat(np.asarray([2, 0, -1, 5], np.int32), [17, 1, 4, 9])[:, None]
    weights = np.linspace(0.1, 1, 31, dtype=np.float32)[:, None]
    experts = random_experts(hidden=128, width=128)
    assert_matches(experts, ids, weights, layer=0)
    assert_matches(experts, np.full_like(ids, -1), weights)


def test_every_height_and_three_consumers():
    """Five row tiles for three consumers: the last item has one too few."""
    if int(os.environ.get("NPROC") or os.cpu_count() or 1) < 4 and jax.default_backend() != "gpu":
        pytest.skip("interpreting four warpgroups takes four CPU cores, or NPROC=4")
    from pallas_kernels.expert_ffn.mosaic_prefill.ffn import expert_ffn_mosaic
    from pallas_kernels.expert_ffn.mosaic_prefill.plan import PrefillConfig

    config = PrefillConfig(heights=(16, 32, 48))
    ids = np.repeat(np.arange(5, dtype=np.int32), [3, 60, 33, 16, 40])[:, None]
    weights = np.linspace(0.1, 1, ids.size, dtype=np.float32)[:, None]
    assert_matches(
        random_experts(hidden=640, width=128),
        ids,
        weights,
        call=jax.jit(lambda *args: expert_ffn_mosaic(*args, config)),
    )


def test_named_kernel_that_cannot_run_says_why():
    experts = random_experts(hidden=128, width=128)
    ids, weights = map(jnp.asarray, random_routing(3, 2, EXPERTS))
    x = jnp.ones((3, 128), jnp.bfloat16)

    def run(x, experts):
        expert_ffn(x, ids, weights, experts, 0, "mosaic")

    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="'mosaic' cannot run: there is no GPU"):
            run(x, experts)
    with assuming_hopper():
        with pytest.raises(ValueError, match="x must be bfloat16, not float32"):
            run(x.astype(jnp.float32), experts)
        with pytest.raises(ValueError, match="width must be a multiple of 128, not 64"):
            run(x, random_experts(hidden=128, width=64))
        plain = PlainExperts(jnp.zeros((1, 6, 256, 128)), jnp.zeros((1, 6, 128, 128)))
        with pytest.raises(ValueError, match="these experts are not quantized"):
            run(x, plain)


def test_bad_tuning_is_named():
    from pallas_kernels.expert_ffn.mosaic_prefill.plan import PrefillConfig

    with pytest.raises(ValueError, match="heights must be ascending multiples of 16"):
        PrefillConfig(heights=(32, 24))
    with pytest.raises(ValueError, match="slots must be at least 4, got 3"):
        PrefillConfig(slots=3)
