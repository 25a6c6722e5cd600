"""The calibrated quantizer against plain numpy, and its invariants."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from convert.joint import JointQuantizer
from convert.joint.choices import PairChoice, ResidualChoice
from convert.joint.feedback import damped, descent_feedback, padded, start_feedback
from convert.joint.sweep import State, better, loss, sweep, with_errors
from convert.quantize import GridQuantizer
from pallas_kernels.levels import DEFAULT_TABLE, LEVEL_BITS
from pallas_kernels.pages import ExpertFormat
from pallas_kernels.scales import SCALE_ENCODINGS, decode_scales, encode_scales

GROUP = 16
BALANCE = 7.0
PAIR = PairChoice(table=DEFAULT_TABLE, balance=BALANCE)
CODES = np.arange(256, dtype=np.uint8)


def make_format(group_size=GROUP, scale_encoding="log8"):
    return ExpertFormat(
        hidden=64,
        width=64,
        group_size=group_size,
        scale_encoding=scale_encoding,
        table=DEFAULT_TABLE,
    )


def problem(experts=2, rows=8, columns=64, samples=200, seed=0):
    """Weights, and Hessians of correlated inputs of uneven size."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((experts, rows, columns))
    mixing = rng.standard_normal((columns, columns)) * np.geomspace(1, 0.1, columns)
    inputs = rng.standard_normal((experts, samples, columns)) @ mixing
    hessians = np.swapaxes(inputs, 1, 2) @ inputs / samples
    return weights.astype(np.float32), hessians.astype(np.float32)


def dequantize(quantized, fmt, bits):
    columns = quantized.codes.shape[-1]
    scales = np.repeat(np.swapaxes(quantized.scales, -2, -1), fmt.group_size, -1)[..., :columns]
    return DEFAULT_TABLE.values(bits)[quantized.codes >> (8 - bits)] * scales


def losses(weights, hessians, quantized, fmt):
    """tr(D H D^T) over tr(W H W^T) at each level, of all experts together."""
    weights, hessians = weights.astype(np.float64), hessians.astype(np.float64)

    def loss(errors):
        return float(np.einsum("enk,ekj,enj->", errors, hessians, errors, optimize=True))

    return [loss(dequantize(quantized, fmt, b) - weights) / loss(weights) for b in LEVEL_BITS]


def swept(weights, hessians, state, **options):
    """A descent with damped Hessians, as numpy; the state is not consumed."""
    feedback = descent_feedback(damped(jnp.asarray(hessians), 0.05))
    copy = State(*map(jnp.array, state))
    return sweep(copy, jnp.asarray(weights).mT, feedback, choice=PAIR, **options)


def random_state(weights, seed=1):
    rng = np.random.default_rng(seed)
    experts, rows, columns = weights.shape
    codes = jnp.asarray(rng.integers(0, 16, (experts, columns, rows)).astype(np.uint8) << 4)
    scales = jnp.asarray(rng.uniform(0.4, 0.9, (experts, columns // GROUP, rows)), jnp.float32)
    return with_errors(codes, scales, jnp.asarray(weights).mT, choice=PAIR)


def objective(state, hessians):
    """By the definition, in float64: per expert and row."""
    errors = np.asarray(state.errors, np.float64)
    h = np.asarray(damped(jnp.asarray(hessians), 0.05), np.float64)
    return np.einsum("l,lekn,ekj,lejn->en", PAIR.weights, errors, h, errors, optimize=True)


def plain_visit(target2, target4, scale):
    """The best of the 16 codes for one weight, by trying them."""
    tried = [
        (scale * DEFAULT_TABLE.values(2)[code >> 2] - target2) ** 2
        + BALANCE * (scale * DEFAULT_TABLE.values(4)[code] - target4) ** 2
        for code in range(16)
    ]
    return int(np.argmin(tried))


def test_pair_values_and_nearest():
    values = np.asarray(PAIR.values(jnp.asarray(CODES)))
    np.testing.assert_array_equal(values[0], DEFAULT_TABLE.values(2)[CODES >> 6])
    np.testing.assert_array_equal(values[1], DEFAULT_TABLE.values(4)[CODES >> 4])
    targets = np.random.default_rng(0).normal(0, 1.5, (2, 500)).astype(np.float32)
    found = np.asarray(PAIR.nearest(jnp.asarray(targets), jnp.zeros(500, jnp.uint8)))
    assert [plain_visit(*t, 1.0) << 4 for t in targets.T] == found.tolist()


def test_residual_values_and_nearest():
    choice = ResidualChoice(table=DEFAULT_TABLE)
    values = np.asarray(choice.values(jnp.asarray(CODES)))[0]
    np.testing.assert_array_equal(values, DEFAULT_TABLE.values(8))
    targets = np.random.default_rng(0).normal(0, 1.5, 500).astype(np.float32)
    codes = np.repeat(CODES, 2)[:500]
    found = np.asarray(choice.nearest(jnp.asarray(targets)[None], jnp.asarray(codes)))
    np.testing.assert_array_equal(found & 0xF0, codes & 0xF0)
    tried = (codes & 0xF0)[:, None] | np.arange(16)
    least = np.abs(DEFAULT_TABLE.values(8)[tried] - targets[:, None]).min(axis=1)
    np.testing.assert_allclose(np.abs(DEFAULT_TABLE.values(8)[found] - targets), least, atol=1e-6)


def test_start_is_gptq():
    """Against GPTQ as its paper has it: column by column, with the inverse of the Hessian."""
    weights, hessians = problem(experts=1, rows=5)
    h = damped(jnp.asarray(hessians), 0.05)
    scales = np.random.default_rng(2).uniform(0.5, 0.8, (1, 4, 5)).astype(np.float32)
    empty = State(
        jnp.zeros((1, 64, 5), jnp.uint8), jnp.asarray(scales), jnp.zeros((2, 1, 64, 5), jnp.float32)
    )
    feedback = start_feedback(h)
    found = sweep(empty, jnp.asarray(weights).mT, feedback, choice=PAIR, steps=(0,), is_start=True)
    left = np.stack([weights[0].astype(np.float64)] * 2)
    inverse = np.linalg.inv(np.asarray(h[0], np.float64))
    expected = np.zeros((64, 5), int)
    for column in range(64):
        value = np.zeros((2, 5))
        for row in range(5):
            scale = scales[0, column // GROUP, row]
            code = plain_visit(*left[:, row, column], scale)
            expected[column, row] = code
            value[:, row] = (
                scale * DEFAULT_TABLE.values(2)[code >> 2],
                scale * (DEFAULT_TABLE.values(4)[code]),
            )
        missed = (left[:, :, column] - value) / inverse[column, column]
        left -= missed[..., None] * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    np.testing.assert_array_equal(np.asarray(found.codes)[0] >> 4, expected)


def test_descent_against_plain_coordinate_descent():
    """Every coordinate gets the code that makes the whole objective least, the others as they
    are; one after another."""
    weights, hessians = problem(experts=1, rows=3, columns=32)
    state = random_state(weights)
    h = np.asarray(damped(jnp.asarray(hessians), 0.05), np.float64)[0]
    codes = np.asarray(state.codes)[0] >> 4
    scales = np.repeat(np.asarray(state.scales)[0], GROUP, axis=0)
    for column, row in itertools.product(range(32), range(3)):
        tried = []
        for code in range(16):
            codes[column, row] = code
            total = 0.0
            for bits, weight in ((2, 1.0), (4, BALANCE)):
                value = DEFAULT_TABLE.values(bits)[codes[:, row] >> (4 - bits)] * scales[:, row]
                error = value - weights[0, row]
                total += weight * error @ h @ error
            tried.append(total)
        codes[column, row] = int(np.argmin(tried))
    found = swept(weights, hessians, state, steps=(0,))
    np.testing.assert_array_equal(np.asarray(found.codes)[0] >> 4, codes)


@pytest.mark.parametrize("steps", [(0,), (0, -2, -1, 1, 2)])
def test_no_round_raises_the_objective(steps):
    weights, hessians = problem()
    state = random_state(weights)
    before = objective(state, hessians)
    for _ in range(4):
        state = swept(weights, hessians, state, steps=steps)
        after = objective(state, hessians)
        assert np.all(after <= before * (1 + 1e-6))
        before = after


def test_scales_that_are_tried_help():
    weights, hessians = problem()
    codes_only = swept(weights, hessians, random_state(weights), steps=(0,))
    both = swept(weights, hessians, random_state(weights), steps=(0, -8, 8))
    assert objective(both, hessians).sum() < 0.95 * objective(codes_only, hessians).sum()


def test_loss_and_the_better_of_two():
    weights, hessians = problem()
    states = [random_state(weights, seed) for seed in (1, 2)]
    feedback = descent_feedback(damped(jnp.asarray(hessians), 0.05))
    expected = [objective(state, hessians) for state in states]
    for state, value in zip(states, expected, strict=True):
        np.testing.assert_allclose(loss(state, feedback, choice=PAIR), value, rtol=1e-4)
    assert 0 < np.mean(expected[1] < expected[0]) < 1
    best = objective(better(*states, feedback, choice=PAIR), hessians)
    np.testing.assert_allclose(best, np.minimum(*expected), rtol=1e-6)


def test_errors_are_those_of_codes_and_scales():
    weights, hessians = problem()
    state = swept(weights, hessians, random_state(weights), steps=(0, -1, 1))
    again = with_errors(state.codes, state.scales, jnp.asarray(weights).mT, choice=PAIR)
    np.testing.assert_allclose(np.asarray(state.errors), np.asarray(again.errors), atol=1e-6)


def test_width_of_a_group_does_not_matter_for_codes():
    """One group of 64 columns, or four of 16 that have its scale: the same descent."""
    weights, hessians = problem(experts=1)
    narrow = random_state(weights)
    narrow = with_errors(
        narrow.codes, jnp.full((1, 4, 8), 0.6, jnp.float32), jnp.asarray(weights).mT, choice=PAIR
    )
    wide = narrow._replace(scales=narrow.scales[:, :1])
    found = [np.asarray(swept(weights, hessians, s, steps=(0,)).codes) for s in (narrow, wide)]
    np.testing.assert_array_equal(*found)


def test_padding_asks_nothing():
    _, hessians = problem(columns=40)
    h = damped(jnp.asarray(hessians), 0.05)
    for feedback in (start_feedback(h), descent_feedback(h)):
        more = padded(feedback, 48)
        assert not np.any(more.matrix[:, 40:])
        assert not np.any(more.matrix[:, :, 40:])
        assert not np.any(more.curvature[:, 40:])
        np.testing.assert_array_equal(more.matrix[:, :40, :40], feedback.matrix)


@pytest.mark.parametrize("encoding", SCALE_ENCODINGS)
@pytest.mark.parametrize("columns", [64, 150])
def test_scales_stay_as_they_are_when_encoded_again(columns, encoding):
    weights, hessians = problem(columns=columns)
    fmt = make_format(16, encoding)
    quantized = JointQuantizer()(weights, hessians, fmt)
    assert quantized.codes.shape == weights.shape
    assert quantized.codes.dtype == np.uint8
    assert quantized.scales.shape == (2, -(-columns // 128) * 8, 8)
    assert quantized.scales.dtype == np.float32
    again = decode_scales(encode_scales(quantized.scales, encoding))
    np.testing.assert_array_equal(again, quantized.scales)


def test_better_than_without_data():
    weights, hessians = problem()
    fmt = make_format()
    quantized = JointQuantizer()(weights, hessians, fmt)
    plain = [GridQuantizer()(matrix, fmt) for matrix in weights]
    data_free = type(quantized)(*(np.stack(parts) for parts in zip(*plain, strict=True)))
    found, expected = (losses(weights, hessians, q, fmt) for q in (quantized, data_free))
    assert found[0] < 0.7 * expected[0]
    assert found[1] < 0.7 * expected[1]
    assert found[2] < 0.25 * found[1]


def test_same_again_and_alone():
    """Twice the same arrays; and an expert's do not depend on the others of its batch."""
    weights, hessians = problem()
    fmt, quantizer = make_format(), JointQuantizer()
    first, second = (quantizer(weights, hessians, fmt) for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scales, second.scales)
    alone = quantizer(weights[1:2], hessians[1:2], fmt)
    assert np.mean(alone.codes[0] == first.codes[1]) > 0.99


def test_identity_hessian_gives_the_nearest_codes():
    """Without correlations every weight is on its own, given the scales."""
    weights, _ = problem()
    identity = np.broadcast_to(np.eye(64, dtype=np.float32), (2, 64, 64))
    quantized = JointQuantizer()(weights, identity, make_format())
    scales = np.repeat(np.swapaxes(quantized.scales, 1, 2), GROUP, axis=2)[..., :64]
    values = [DEFAULT_TABLE.values(b)[np.arange(16) >> (4 - b)] for b in (2, 4)]
    tried = sum(
        weight * (weights[..., None] - scales[..., None] * value) ** 2
        for weight, value in zip((1.0, JointQuantizer.balance), values, strict=True)
    )
    chosen = np.take_along_axis(tried, (quantized.codes >> 4)[..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(chosen, tried.min(axis=-1), rtol=1e-4, atol=1e-6)
    zero = JointQuantizer()(weights, np.zeros_like(identity), make_format())
    np.testing.assert_array_equal(zero.codes, quantized.codes)


def test_few_samples_and_dead_inputs():
    """A Hessian of rank 5, and inputs that never occur."""
    weights, hessians = problem(samples=5)
    hessians[:, 10:30] = 0
    hessians[:, :, 10:30] = 0
    quantized = JointQuantizer()(weights, hessians, make_format())
    assert np.all(np.isfinite(quantized.scales))
    errors = weights - dequantize(quantized, make_format(), 4)
    assert np.mean(errors**2) < 0.05 * np.mean(weights**2)


@pytest.mark.parametrize("encoding", SCALE_ENCODINGS)
def test_zeros(encoding):
    """A matrix of zeros, and one group of zeros."""
    weights, hessians = problem()
    weights[0] = 0
    weights[1, :, :GROUP] = 0
    fmt = make_format(scale_encoding=encoding)
    quantized = JointQuantizer()(weights, hessians, fmt)
    values = dequantize(quantized, fmt, 4)
    assert not np.any(values[0])
    assert np.abs(values[1, :, :GROUP]).max() <= np.abs(values[1]).max() / 200
    if encoding == "bf16":
        assert not np.any(values[1, :, :GROUP])


@pytest.mark.parametrize("unit", [2.0**-90, 2.0**90])
def test_units_of_weights_and_hessians_do_not_matter(unit):
    weights, hessians = problem()
    fmt = make_format()
    quantized = JointQuantizer()(weights, hessians, fmt)
    scaled = JointQuantizer()(weights * np.float32(unit), hessians * np.float32(2.0**20), fmt)
    np.testing.assert_array_equal(scaled.codes, quantized.codes)
    np.testing.assert_array_equal(scaled.scales, quantized.scales * np.float32(unit))


def test_describes_itself():
    quantizer = JointQuantizer(balance=3.0)
    described = quantizer.describe()
    assert described.pop("name") == "joint"
    assert described == json.loads(json.dumps(described))
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in described.items()}
    assert JointQuantizer(**settings) == quantizer
    assert dataclasses.replace(quantizer, rounds=1) != quantizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": -1.0}, "balance must be finite and at least 0, got -1"),
        ({"starts": ()}, r"starts must be some balances of at least 0, got \(\)"),
        ({"damping": 0.0}, "damping must be finite and at least 0.001, got 0"),
        ({"rounds": -1}, "rounds must not be negative, got -1"),
        ({"steps": (1, 0)}, r"steps must begin with 0, got \(1, 0\)"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        JointQuantizer(**options)


def test_bad_arrays():
    weights, hessians = problem()
    quantizer, fmt = JointQuantizer(), make_format()
    with pytest.raises(ValueError, match=r"weights must be \[E, N, K\]"):
        quantizer(weights[0], hessians, fmt)
    with pytest.raises(ValueError, match=r"hessians must be \[E, K, K\] = \(2, 64, 64\)"):
        quantizer(weights, hessians[:1], fmt)
    with pytest.raises(ValueError, match="hessians must be finite"):
        quantizer(weights, hessians * np.float32(np.nan), fmt)
    with pytest.raises(ValueError, match="weights must be finite"):
        quantizer(weights * np.float32(np.inf), hessians, fmt)
