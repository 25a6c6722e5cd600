"""Level tables and scales: what codes and scale bytes mean."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.levels import DEFAULT_TABLE, LevelTable, level_of_bits
from pallas_kernels.pages import ExpertFormat, levels_of_table
from pallas_kernels.scales import Scales, decode_scales, encode_scales, groups_per_row


def test_values_at_two_and_four_bits():
    np.testing.assert_array_equal(DEFAULT_TABLE.values(2), [0.5, 1.75, -0.5, -1.75])
    inner, outer = (7 / 64, 3 / 8, 5 / 8, 7 / 8), (5 / 4, 3 / 2, 2, 5 / 2)
    positive = np.asarray([*inner, *outer], np.float32)
    np.testing.assert_array_equal(DEFAULT_TABLE.values(4), [*positive, *-positive])


def test_values_at_eight_bits_are_residuals_on_four():
    values = DEFAULT_TABLE.values(8).reshape(16, 2, 8)
    steps = np.repeat(DEFAULT_TABLE.residual_step, 4)
    steps = np.concatenate([steps, steps])[:, None]
    offset = (np.arange(8) + 0.5) * steps
    np.testing.assert_array_equal(values[:, 0], DEFAULT_TABLE.values(4)[:, None] + offset)
    np.testing.assert_array_equal(values[:, 1], DEFAULT_TABLE.values(4)[:, None] - offset)


def test_table_survives_json():
    assert LevelTable.from_json(DEFAULT_TABLE.to_json()) == DEFAULT_TABLE
    with pytest.raises(ValueError, match="has fields"):
        LevelTable.from_json({"base": [0.5, 1.75]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": (1.75, 0.5)}, "base must be positive and ascending"),
        ({"base": (0.0, 0.5)}, "base must be positive and ascending"),
        ({"base": (0.3, 1.75)}, "base must be exact in e4m3"),
        ({"residual_step": (7 / 128, 1 / 8)}, "residual_step.0. must be exact in e4m3"),
        ({"children": ((1, 2, 3, 4),)}, "shapes"),
    ],
)
def test_bad_tables_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DEFAULT_TABLE, **change)


def test_bits_other_than_the_ladder_are_refused():
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 4, 8\), got 3"):
        level_of_bits(3)


def scales_example() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.01, 0.1, (2, 4, 6)).astype(np.float32)


def test_bf16_scales():
    encoded = encode_scales(scales_example(), "bf16")
    assert encoded.codes.dtype == ml_dtypes.bfloat16
    assert encoded.base is None
    np.testing.assert_allclose(decode_scales(encoded), scales_example(), rtol=2**-8)


def test_log8_scales_are_within_half_a_step():
    encoded = encode_scales(scales_example(), "log8")
    assert encoded.codes.dtype == np.uint8
    assert encoded.base.shape == (2,)
    np.testing.assert_allclose(
        decode_scales(encoded), scales_example(), rtol=2 ** (1 / 64) - 1 + 1e-6
    )
    on_device = decode_scales(Scales(*map(jnp.asarray, encoded)))
    np.testing.assert_allclose(np.asarray(on_device), decode_scales(encoded), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_scales_are_refused(bad):
    scales = scales_example()
    scales[0, 0, 0] = bad
    with pytest.raises(ValueError, match="finite and not negative"):
        encode_scales(scales, "bf16")


def test_group_sizes():
    assert groups_per_row(768, 64) == 12
    assert groups_per_row(65, 64) == 2
    with pytest.raises(ValueError, match=r"group size must be one of .*, got 48"):
        groups_per_row(768, 48)


def test_bytes_of_a_page():
    fmt = ExpertFormat(
        hidden=2048, width=768, group_size=64, scale_encoding="bf16", table=DEFAULT_TABLE
    )
    weights = 3 * 2048 * 768
    assert fmt.page_bytes == weights * 2 // 8
    assert fmt.scale_bytes == weights // 64 * 2


@pytest.mark.parametrize(
    ("base_bits", "held", "level"),
    [
        (2, [0, 0, 0], 0),
        (2, [1, 0, 0], 1),
        (2, [1, 1, 0], 1),  # level 2 needs both of its pages
        (2, [1, 1, 1], 2),
        (2, [0, 1, 1], 0),  # a gap ends the ladder
        (4, [0, 0], 1),
        (4, [1, 0], 1),
        (4, [1, 1], 2),
        (8, [], 2),
    ],
)
def test_levels_of_table(base_bits, held, level):
    table = np.where(np.asarray(held, bool), 5, -1).astype(np.int32).reshape(-1, 1, 1)
    assert levels_of_table(table, base_bits).tolist() == [[level]]
    assert np.asarray(levels_of_table(jnp.asarray(table), base_bits)).tolist() == [[level]]
