"""Every implementation of the linear layer against its float64 definition.

Tolerances, per output: 32-bit sums of at most 1024 exact products, so 2e-6 of the sum of their
magnitudes; so with weights at 8 bits, whose scales come in later. With the norm, each normed input
is rounded once to 8 significant bits, wherever an implementation rounds it: independent relative
errors of at most 2^-8, so an error of 2^-8 / sqrt(3) of the root of the sum of squared products, of
which we allow six.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.targets import RUNNABLE, assuming_hopper, needs_mosaic, runner
from pairwise import pairwise

from pallas_kernels.linear import Int8Matrix, LinearConfig, default_config, linear

BITS = [16, 8]
"""Of the weights: bfloat16, or ``Int8Matrix``."""
EPS = 1e-6
CONFIGS = [
    LinearConfig(rows=16, step=64, stages=2),
    LinearConfig(rows=32, step=128, stages=2),
    LinearConfig(rows=32, step=64, stages=3),
    LinearConfig(rows=64, step=256, stages=2),
    LinearConfig(rows=64, step=128, stages=9),
    LinearConfig(rows=128, step=64, stages=2),
    LinearConfig(rows=128, step=128, stages=3),
]


def random_case(tokens, outputs=72, inputs=512, layers=3, seed=0, bits=16):
    """x [T, K], weight [L, N, K], norm's weight [L, K], residual [T, N], all bfloat16.

    At 8 bits the weight is an Int8Matrix.
    """
    rng = np.random.default_rng(seed)
    shapes = ((tokens, inputs), (layers, outputs, inputs), (layers, inputs), (tokens, outputs))
    x, weight, norm, residual = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
    if bits == 8:
        codes = rng.integers(-127, 128, weight.shape)
        scale = rng.uniform(0.5, 1.5, weight.shape[:-1]) / 64
        weight = Int8Matrix(jnp.asarray(codes, jnp.int8), jnp.asarray(scale, jnp.float32))
    return 3 * x, weight, 1 + norm / 4, 20 * residual


def values_of(weight, layer):
    """Of one layer, in float64."""
    if isinstance(weight, Int8Matrix):
        codes, scale = (np.asarray(part[layer], np.float64) for part in weight)
        return codes * scale[:, None]
    return np.asarray(weight[layer], np.float64)


def define(x, weight, layer, norm_weight=None, residual=None):
    """The result in float64, and the error that it may have."""
    x, weight = np.asarray(x, np.float64), values_of(weight, layer)
    if norm_weight is not None:
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
        x *= np.asarray(norm_weight[layer], np.float64)
    y, error = x @ weight.T, 2e-6 * (np.abs(x) @ np.abs(weight).T)
    if norm_weight is not None:
        error += 6 * 2**-8 / np.sqrt(3) * np.sqrt((x * x) @ (weight * weight).T)
    if residual is not None:
        y, error = y + np.asarray(residual, np.float64), error + 2e-7 * np.abs(y)
    return y, error


@functools.cache
def jitted(**keywords):
    """``linear`` of a traced layer."""

    def call(x, weight, layer, norm_weight, residual):
        norm = None if norm_weight is None else (norm_weight, EPS)
        return linear(x, weight, layer, norm=norm, residual=residual, **keywords)

    return jax.jit(call)


def run(x, weight, layer, norm_weight=None, residual=None, *, implementation, **keywords):
    """``linear`` under jit."""
    call = jitted(implementation=implementation, **keywords)
    with runner(implementation):
        return call(x, weight, jnp.int32(layer), norm_weight, residual)


def assert_matches(*case, implementation, config=None):
    y = run(*case, implementation=implementation, out_dtype=jnp.float32, config=config)
    expected, error = define(*case)
    assert y.dtype == jnp.float32
    assert (np.abs(np.asarray(y, np.float64) - expected) <= error).all()


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize(
    ("tokens", "bits"), [(1, 16), (1, 8), (3, 8), (8, 16), (13, 8), (24, 16), (64, 16), (64, 8)]
)
def test_norm_and_residual(implementation, tokens, bits):
    x, weight, norm, residual = random_case(tokens, bits=bits)
    assert_matches(x, weight, 1, norm, residual, implementation=implementation)


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 8, 20])
def test_plain_product_is_exact_up_to_its_sum(implementation, tokens, bits):
    x, weight, _, residual = random_case(tokens, bits=bits)
    assert_matches(x, weight, 0, implementation=implementation)
    assert_matches(x, weight, 2, None, residual, implementation=implementation)


@needs_mosaic
@pytest.mark.parametrize(("config", "outputs", "bits"), pairwise(CONFIGS, [8, 136], BITS), ids=str)
def test_every_cut(config, outputs, bits):
    """The ring of stages wraps around in all but one."""
    x, weight, norm, residual = random_case(5, outputs, 1024, bits=bits)
    assert_matches(x, weight, 2, norm, residual, implementation="mosaic", config=config)
    assert_matches(x, weight, 0, implementation="mosaic", config=config)


@needs_mosaic
def test_norm_of_tiny_and_huge_tokens():
    x, weight, norm, _ = random_case(4)
    x = x * jnp.asarray([[1e-20], [1e-3], [1e4], [0]], jnp.bfloat16)
    assert_matches(x, weight, 1, norm, implementation="mosaic")


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_result_has_the_dtype_of_x_and_its_leading_axes(implementation):
    x, weight, norm, residual = random_case(6)
    expected, error = define(x, weight, 1, norm, residual)
    shaped = (x.reshape(2, 3, -1), weight, 1, norm, residual.reshape(2, 3, -1))
    y = run(*shaped, implementation=implementation)
    assert (y.shape, y.dtype) == ((2, 3, 72), jnp.bfloat16)
    y = np.asarray(y, np.float64).reshape(6, -1)
    assert (np.abs(y - expected) <= error + 2**-8 * np.abs(expected)).all()


@pytest.mark.parametrize("bits", BITS)
def test_float32_everywhere(bits):
    x, weight, norm, residual = random_case(4, bits=bits)
    x, norm, residual = (a.astype(jnp.float32) / 3 for a in (x, norm, residual))
    if bits == 16:
        weight = weight.astype(jnp.float32) / 3
    y = run(x, weight, 1, norm, residual, implementation="xla")
    expected, _ = define(x, weight, 1, norm, residual)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max())


@needs_mosaic
@pytest.mark.parametrize("bits", BITS)
def test_repeats_bit_for_bit(bits):
    case = random_case(3, bits=bits)
    first, second = (run(*case[:2], 1, *case[2:], implementation="mosaic") for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


QWEN3_30B = {
    "qkv": (5120, 2048, True, False),
    "output": (2048, 4096, False, True),
    "head": (151936, 2048, True, False),
}


def lower_for_hopper(tokens, outputs, inputs, normed, added, *, layers=48, config=None, bits=16):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    weight = array(layers, outputs, inputs)
    if bits == 8:
        scale = array(layers, outputs, dtype=jnp.float32)
        weight = Int8Matrix(array(layers, outputs, inputs, dtype=jnp.int8), scale)

    def call(x, weight, layer, norm_weight, residual):
        norm = None if norm_weight is None else (norm_weight, EPS)
        return linear(
            x,
            weight,
            layer,
            norm=norm,
            residual=residual,
            config=config,
            implementation="mosaic",
        )

    with assuming_hopper():
        return (
            jax.jit(call)
            .trace(
                array(tokens, inputs),
                weight,
                jax.ShapeDtypeStruct((), jnp.int32),
                array(layers, inputs) if normed else None,
                array(tokens, outputs) if added else None,
            )
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )


@needs_mosaic
@pytest.mark.parametrize(
    ("tokens", "name", "bits"), pairwise([1, 2, 4, 8, 12, 16, 32, 64], [*QWEN3_30B], BITS)
)
def test_lowers_for_hopper(name, tokens, bits):
    layers = 1 if name == "head" else 48
    text = lower_for_hopper(tokens, *QWEN3_30B[name], layers=layers, bits=bits)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert ("stablehlo.pad" in text) == (tokens == 12)  # else the kernel is all there is


@needs_mosaic
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_cut_lowers_for_hopper(config, bits):
    lower_for_hopper(8, 2048, 4096, True, True, config=config, bits=bits)


@pytest.mark.parametrize("tokens", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", QWEN3_30B)
def test_default_cut_fits_and_gives_memory_enough_to_do(name, tokens, bits):
    outputs, inputs, *_ = QWEN3_30B[name]
    weight_bytes = bits // 8
    config = default_config(tokens, outputs, inputs, weight_bytes)
    assert config.obstacle(tokens, outputs, inputs, weight_bytes) is None
    blocks = -(-outputs // config.rows)
    a_processor = max(1, min(2, blocks // 132))
    assert config.shared_bytes(tokens, weight_bytes) * a_processor < 215 * 1024
    of_block = config.stages * max(64, config.rows) * config.step * weight_bytes
    in_flight = min(blocks, 2 * 132) * of_block
    # a microsecond of 3 TB/s; at 8 bits and 64 tokens x, four times as large, takes the longest
    x_is_what_counts = (name, bits, tokens) == ("output", 8, 64)
    assert in_flight >= (1.5 if x_is_what_counts else 3) * 2**20


def test_default_cut_of_other_shapes():
    assert default_config(1, 72, 64).chunks == 1
    assert default_config(1, 72, 192).obstacle(1, 72, 192) is None
    assert default_config(64, 40, 128).obstacle(64, 40, 128) is None


def test_auto_is_xla_on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("there is another device")
    x, weight, *_ = random_case(2)
    first, second = (run(x, weight, 0, implementation=name) for name in ("auto", "xla"))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_bad_arguments_are_named():
    x, weight, norm, residual = random_case(2)
    with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'cuda'"):
        linear(x, weight, 0, implementation="cuda")
    with pytest.raises(ValueError, match=r"x must be \[..., 512\]"):
        linear(x[:, 1:], weight, 0)
    with pytest.raises(ValueError, match=r"weight must be \[L, N, K\]"):
        linear(x, weight[0], 0)
    with pytest.raises(ValueError, match=r"norm's weight must be \(3, 512\)"):
        linear(x, weight, 0, norm=(norm[0], EPS))
    with pytest.raises(ValueError, match=r"residual must be \(2, 72\)"):
        linear(x, weight, 0, residual=residual[:1])
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.2, got 3"):
        linear(x, weight, 3)
    _, coded, *_ = random_case(2, bits=8)
    with pytest.raises(ValueError, match=r"weight must be \[L, N, K\]"):
        linear(x, Int8Matrix(coded.codes[0], coded.scale[0]), 0)
    with pytest.raises(ValueError, match=r"int8 codes and a float32 scale, got int32 and float32"):
        linear(x, coded._replace(codes=coded.codes.astype(jnp.int32)), 0)
    with pytest.raises(ValueError, match=r"scale must be \(3, 72\) for codes .*, got \(3, 71\)"):
        linear(x, coded._replace(scale=coded.scale[:, 1:]), 0)
    with pytest.raises(ValueError, match="rows must be one of"):
        LinearConfig(rows=8, step=64, stages=2)
    with pytest.raises(ValueError, match="stages must be at least 2"):
        LinearConfig(rows=16, step=64, stages=1)


@needs_mosaic
def test_named_kernel_that_cannot_run_says_why():
    x, weight, *_ = random_case(2)
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="'mosaic' cannot run: there is no GPU"):
            linear(x, weight, 0, implementation="mosaic")

    def refuse(match, x, weight):
        with assuming_hopper(), pytest.raises(ValueError, match=match):
            linear(x, weight, 0, implementation="mosaic")

    refuse("1 to 64 tokens, not 65", jnp.zeros((65, 512), jnp.bfloat16), weight)
    refuse("x must be bfloat16, not float32", x.astype(jnp.float32), weight)
    refuse("weight must be bfloat16, not float32", x, weight.astype(jnp.float32))
    _, coded, *_ = random_case(2, bits=8)
    refuse("x must be bfloat16, not float32", x.astype(jnp.float32), coded)
    refuse(
        "N must be a multiple of 8, not 71", x, Int8Matrix(coded.codes[:, :71], coded.scale[:, :71])
    )
    refuse("N must be a multiple of 8, not 71", x, weight[:, :71])
    refuse("K must be a multiple of 64 for .*, not 100", x[:, :100], weight[..., :100])
