"""Amounts of memory as people write them."""

import re
from typing import Final

from dynaexq_jax.errors import InputError

_BYTES_OF_UNIT: Final = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_AMOUNT: Final = re.compile(r"([0-9]+)(?:\.([0-9]+))?\s*([A-Za-z]*)")
_FORMS: Final = "write a positive number with GiB, MiB, KiB, GB, MB, KB or B, like 24GiB or 1.5GB"


def parse_bytes(text: str) -> int:
    """Bytes of an amount like "24GiB", "1.5GB", "700MB" or "123456", rounded down.

    Units are exact (1 KiB = 1024 B, 1 KB = 1000 B) and upper or lower case does not matter.

    Raises InputError for what is not a positive amount, with the accepted forms.
    """
    match = _AMOUNT.fullmatch(text.strip())
    by_lower = {unit.lower(): size for unit, size in _BYTES_OF_UNIT.items()}
    if match is None or match[3].lower() not in by_lower:
        raise InputError(f"cannot read {text!r} as an amount of memory: {_FORMS}")
    whole, fraction, unit = match[1], match[2] or "", match[3].lower()
    # Integers throughout: a float would round amounts above 2**53 and decimal fractions.
    size = int(whole + fraction) * by_lower[unit] // 10 ** len(fraction)
    if size == 0:
        raise InputError(f"an amount of memory must be at least 1 byte, got {text!r}: {_FORMS}")
    return size


def format_bytes(size: int) -> str:
    """Bytes for people, like "23.9 GiB" or "512 B"; one decimal, rounded to nearest.

    Raises ValueError for a negative size.
    """
    if size < 0:
        raise ValueError(f"a size in bytes cannot be negative, got {size}")
    if size < 1024:
        return f"{size} B"
    for unit in ("KiB", "MiB"):
        if round(size / _BYTES_OF_UNIT[unit], 1) < 1024:
            return f"{size / _BYTES_OF_UNIT[unit]:.1f} {unit}"
    return f"{size / _BYTES_OF_UNIT['GiB']:.1f} GiB"


def parse_share(text: str) -> float:
    """A share of a whole as a number, "25%" or "0.25" alike, in 0..1.

    Raises InputError for other text.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if rest or not 0 <= share <= 1:
        raise InputError(f"cannot read {text!r} as a share: give one like 25% or 0.25")
    return share
