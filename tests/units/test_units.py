import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaexq_jax.errors import InputError
from dynaexq_jax.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("16MiB", 16 * 2**20),
        ("3KiB", 3 * 2**10),
        ("1.5GB", 1_500_000_000),
        ("700MB", 700_000_000),
        ("2 KB", 2_000),
        ("123456", 123_456),
        ("7B", 7),
        (" 1gib ", 2**30),
        ("0.5KiB", 512),
        ("1.0009765625KiB", 1025),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_reads_amounts(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "0", "0.0GiB", "0.4B", "1TiB", "1e9", "1,5GB", "1.GB", "nan", "٣"]
)
def test_refuses_what_is_not_an_amount(text):
    with pytest.raises(InputError, match="GiB, MiB, KiB, GB, MB, KB or B") as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (1536 * 2**10, "1.5 MiB"),
        (int(23.9 * 2**30), "23.9 GiB"),
        (5000 * 2**30, "5000.0 GiB"),
    ],
)
def test_formats_amounts(size, text):
    assert format_bytes(size) == text


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="-1"):
        format_bytes(-1)


@given(st.integers(1, 2**50))
def test_formatted_amounts_can_be_read_and_are_close(size):
    # One decimal of a number of at least 1.0 is off by at most 5 %.
    assert abs(parse_bytes(format_bytes(size)) - size) <= 0.05 * size
