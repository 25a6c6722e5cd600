"""The data-free quantizer: expected errors, optimal codes, and the corners."""

import itertools

import numpy as np
import pytest

from convert.encode import measure_energy
from convert.quantize import GridQuantizer
from pallas_kernels.layout import padded_columns
from pallas_kernels.levels import DEFAULT_TABLE, LEVEL_BITS
from pallas_kernels.pages import ExpertFormat
from pallas_kernels.scales import GROUP_SIZES, SCALE_ENCODINGS, decode_scales, encode_scales


def make_format(group_size=64, scale_encoding="bf16"):
    return ExpertFormat(
        hidden=256,
        width=256,
        group_size=group_size,
        scale_encoding=scale_encoding,
        table=DEFAULT_TABLE,
    )


def gaussian(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def dequantize(quantized, fmt, bits):
    """Values of the weights, by the definition of the levels."""
    columns = quantized.codes.shape[1]
    scales = np.repeat(quantized.scales.T, fmt.group_size, axis=1)[:, :columns]
    return DEFAULT_TABLE.values(bits)[quantized.codes >> (8 - bits)] * scales


def relative_errors(weights, quantized, fmt):
    return [
        float(np.sum((weights - dequantize(quantized, fmt, bits)) ** 2) / np.sum(weights**2))
        for bits in LEVEL_BITS
    ]


# On the very weights of the test, balance 1. The limit leaves room for the rounding of other
# versions of XLA, which moves single codes, and for nothing else.
EXPECTED = {
    ("bf16", 16): (0.09362, 0.006759, 0.0001411),
    ("bf16", 32): (0.106, 0.008573, 0.0002934),
    ("bf16", 64): (0.1124, 0.01035, 0.0006827),
    ("bf16", 128): (0.1157, 0.01154, 0.001062),
    ("log8", 16): (0.09365, 0.006785, 0.0001418),
    ("log8", 32): (0.106, 0.008594, 0.0002939),
    ("log8", 64): (0.1125, 0.01037, 0.0006837),
    ("log8", 128): (0.1157, 0.01155, 0.001066),
}


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("encoding", SCALE_ENCODINGS)
def test_error_on_gaussian_weights(encoding, group_size):
    fmt = make_format(group_size, encoding)
    weights = gaussian(1024, 256)
    errors = relative_errors(weights, GridQuantizer(balance=1.0)(weights, fmt), fmt)
    np.testing.assert_allclose(errors, EXPECTED[encoding, group_size], rtol=0.003)


def objective(weights, scales, codes, balance):
    """Of groups [..., g] and scales [...], by the definition."""
    base, child = (
        scales[..., None] * DEFAULT_TABLE.values(bits)[codes >> (4 - bits)] for bits in (2, 4)
    )
    return ((weights - base) ** 2 + balance * (weights - child) ** 2).sum(axis=-1)


def best_codes(weights, scales, balance):
    """The best of all 16 nested codes of each weight, by trying them."""
    errors = [
        objective(weights[..., None], scales[..., None], np.array([code]), balance)
        for code in range(16)
    ]
    return np.argmin(errors, axis=0)


@pytest.mark.parametrize("balance", [0.3, 1.0, 10.0])
def test_scale_and_codes_are_nearly_the_best_there_are(balance):
    """Against a search over 400 scales and all codes; heavy tails, where a grid is most tested."""
    weights = np.random.default_rng(3).standard_t(4, (8, 256)).astype(np.float32)
    fmt = make_format(64)
    quantized = GridQuantizer(balance=balance)(weights, fmt)
    groups = weights.reshape(8, 4, 64)
    found = objective(groups, quantized.scales.T, (quantized.codes >> 4).reshape(8, 4, 64), balance)
    unit = np.sqrt(np.mean(groups**2, axis=-1))
    tried = []
    for factor in np.geomspace(0.2, 3.0, 400):
        scales = unit * factor
        codes = best_codes(groups, scales, balance)
        tried.append(objective(groups, scales, codes, balance))
    best = np.min(tried, axis=0)
    assert np.all(found >= best * (1 - 1e-3))
    assert np.all(found <= best * 1.03)
    assert found.sum() <= best.sum() * 1.005


@pytest.mark.parametrize("balance", [0.3, 1.0, 10.0])
def test_codes_are_the_best_for_the_rounded_scale(balance):
    weights = gaussian(16, 256)
    quantized = GridQuantizer(balance=balance)(weights, make_format(64, "log8"))
    groups = weights.reshape(16, 4, 64)
    codes = (quantized.codes >> 4).reshape(16, 4, 64)
    expected = objective(
        groups, quantized.scales.T, best_codes(groups, quantized.scales.T, balance), balance
    )
    found = objective(groups, quantized.scales.T, codes, balance)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_residual_is_the_nearest():
    """No other residual of the chosen 4-bit code comes closer, half a step at most is left."""
    weights = gaussian(16, 256)
    fmt = make_format()
    quantized = GridQuantizer()(weights, fmt)
    error = np.abs(weights - dequantize(quantized, fmt, 8))
    for residual in range(16):
        other = quantized._replace(codes=(quantized.codes & 0xF0) | np.uint8(residual))
        assert np.all(error <= np.abs(weights - dequantize(other, fmt, 8)) + 1e-6)


def test_scales_are_as_their_encoding_rounds_them():
    for encoding in SCALE_ENCODINGS:
        weights = gaussian(32, 200)
        scales = GridQuantizer()(weights, make_format(32, encoding)).scales
        assert scales.dtype == np.float32
        np.testing.assert_array_equal(decode_scales(encode_scales(scales, encoding)), scales)


@pytest.mark.parametrize(
    ("columns", "group_size"),
    [(1, 16), (1, 128), (64, 64), (64, 128), (65, 16), (65, 32), (65, 64), (200, 32), (200, 128)],
)
def test_padding_is_empty_and_changes_nothing(columns, group_size):
    """Groups wholly in the padding have scale 0; a partly padded one is fitted to its weights."""
    weights = gaussian(7, columns)
    fmt = make_format(group_size)
    quantized = GridQuantizer()(weights, fmt)
    assert quantized.codes.shape == (7, columns)
    assert quantized.codes.dtype == np.uint8
    assert quantized.scales.shape == (padded_columns(columns) // group_size, 7)
    used = -(-columns // group_size)
    assert np.all(quantized.scales[:used] > 0)
    assert np.all(quantized.scales[used:] == 0)
    whole = columns // group_size * group_size
    if whole:
        alone = GridQuantizer()(weights[:, :whole], fmt)
        np.testing.assert_array_equal(alone.codes, quantized.codes[:, :whole])


@pytest.mark.parametrize("columns", [16, 32, 64])
def test_partly_padded_group_is_fitted_to_its_weights_alone(columns):
    weights = gaussian(32, columns)
    full = GridQuantizer()(weights, make_format(columns))
    partly = GridQuantizer()(weights, make_format(128))
    np.testing.assert_array_equal(partly.scales[0], full.scales[0])
    np.testing.assert_array_equal(partly.codes, full.codes)


@pytest.mark.parametrize("encoding", SCALE_ENCODINGS)
def test_zero_group_and_zero_matrix(encoding):
    fmt = make_format(64, encoding)
    weights = gaussian(8, 256)
    weights[3, 64:128] = 0
    quantized = GridQuantizer()(weights, fmt)
    smallest = 0.0 if encoding == "bf16" else quantized.scales.max() * 2 ** (-255 / 32)
    np.testing.assert_allclose(quantized.scales[1, 3], smallest, rtol=1e-6)
    assert np.all(quantized.scales[[0, 2, 3], 3] > 0)
    zeros = GridQuantizer()(np.zeros((8, 256), np.float32), fmt)
    for bits in LEVEL_BITS:
        np.testing.assert_array_equal(dequantize(zeros, fmt, bits), 0)
    assert measure_energy(np.zeros((8, 256), np.float32), zeros, fmt).relative() == [0, 0, 0]


def test_sign_and_scale_equivariance():
    """Codes do not depend on the magnitude of the weights, and signs only flip sign bits."""
    weights = gaussian(8, 256)
    fmt = make_format()
    plain = GridQuantizer()(weights, fmt)
    for factor in (2.0**-90, 2.0**90):
        scaled = GridQuantizer()(weights * np.float32(factor), fmt)
        np.testing.assert_array_equal(scaled.codes, plain.codes)
        np.testing.assert_array_equal(scaled.scales, plain.scales * np.float32(factor))
    flipped = GridQuantizer()(-weights, fmt)
    np.testing.assert_array_equal(flipped.codes ^ 0x88, plain.codes)


def test_larger_balance_trades_two_bits_for_four():
    weights = gaussian(256, 256)
    fmt = make_format()
    errors = [
        relative_errors(weights, GridQuantizer(balance=balance)(weights, fmt), fmt)
        for balance in (0.3, 1.0, 3.0, 10.0)
    ]
    for less, more in itertools.pairwise(errors):
        assert more[0] > less[0]
        assert more[1] < less[1]


@pytest.mark.parametrize("columns", [200, 256])
def test_energy_is_what_the_definition_of_the_levels_gives(columns):
    weights = gaussian(16, columns)
    fmt = make_format(32, "log8")
    quantized = GridQuantizer()(weights, fmt)
    energy = measure_energy(weights, quantized, fmt)
    np.testing.assert_allclose(energy.weights, np.sum(weights.astype(np.float64) ** 2), rtol=1e-5)
    np.testing.assert_allclose(
        energy.relative(), relative_errors(weights, quantized, fmt), rtol=1e-4
    )
