"""Matrices at 8 bits: what rounding may cost, which scale is chosen, and the corners."""

import ml_dtypes
import numpy as np
import pytest

from convert.dense import quantize_rows


def gaussian(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def squared_error(weights, codes, scale):
    difference = weights.astype(np.float64) - codes.astype(np.float64) * scale[:, None]
    return np.square(difference).sum(axis=1)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_error_is_that_of_rounding(dtype):
    """Uniform in a step of max|w| / 127: a twelfth of its square, and the search only helps."""
    weights = (0.05 * gaussian(2050, 512)).astype(dtype)  # more rows than are done at a time
    codes, scale = quantize_rows(weights)
    assert (codes.dtype, codes.shape) == (np.int8, weights.shape)
    assert (scale.dtype, scale.shape) == (np.float32, (2050,))
    assert codes.min() >= -127
    weights = weights.astype(np.float64)
    step = np.abs(weights).max(axis=1) / 127
    error = squared_error(weights, codes, scale) / 512
    assert error.mean() == pytest.approx(np.mean(step**2 / 12), rel=0.05)
    assert (error <= 1.2 * step**2 / 12).all()
    assert (scale <= step * (1 + 1e-6)).all()


def test_no_scale_tried_is_better():
    weights = gaussian(40, 1024)
    codes, scale = quantize_rows(weights)
    found = squared_error(weights, codes, scale)
    plain = np.abs(weights).max(axis=1) / 127
    for factor in np.linspace(0.95, 1, 11):
        tried = (plain * factor).astype(np.float32)
        nearest = np.clip(np.rint(weights / tried[:, None]), -127, 127)
        assert (found <= squared_error(weights, nearest, tried) * (1 + 1e-4)).all()
    assert len(np.unique(np.round(scale / plain, 3))) > 1  # one factor would not do for all rows


def test_codes_are_the_nearest():
    weights = gaussian(30, 64)
    codes, scale = quantize_rows(weights)
    nearest = np.clip(np.rint(weights / scale[:, None]), -127, 127)
    assert (np.abs(codes - nearest) <= 1).all()
    np.testing.assert_array_less(
        np.abs(weights - codes * scale[:, None])[np.abs(codes) < 127],
        0.5001 * np.broadcast_to(scale[:, None], weights.shape)[np.abs(codes) < 127],
    )


def test_rows_that_need_no_rounding_come_back():
    rng = np.random.default_rng(0)
    integers = rng.integers(-127, 128, (6, 300)).astype(np.float32)
    integers[:, 0] = 127
    scales = np.float32(2.0) ** np.arange(-60, 60, 20, dtype=np.float32)
    codes, scale = quantize_rows(integers * scales[:, None])
    np.testing.assert_array_equal(codes, integers)
    np.testing.assert_array_equal(scale, scales)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-31])
def test_rows_of_next_to_nothing_are_zero(size):
    weights = gaussian(3, 16)
    weights[1] *= np.float32(size)
    codes, scale = quantize_rows(weights)
    assert scale[1] == 0
    assert (codes[1] == 0).all()
    assert (scale[[0, 2]] > 0).all()


def test_weights_as_large_as_float32_has_them():
    weights = np.clip(gaussian(4, 64), -3, 3) * np.float32(1e38)
    codes, scale = quantize_rows(weights)
    assert np.isfinite(scale).all()
    left = np.abs(weights / scale[:, None] - codes)
    assert left[np.abs(codes) < 127].max() < 0.501
    assert left.max() < 0.06 * 127
