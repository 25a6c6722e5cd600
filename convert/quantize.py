"""Data-free quantizer: scales and nested codes that together give the least weight error.

For one group x of a row, a scale s and, for every weight, a nested code (sign, outer, child) are
chosen to minimise

    sum (x - s b)**2 + balance * (x - s c)**2

where b is the value of the code at 2 bits and c its value at 4 bits. Given s, the best code has the
sign of x, and of its eight magnitudes the one that maximises 2 (|x|/s) p - q with
p = b + balance c and q = b**2 + balance c**2: eight straight lines, whose upper envelope is cheap
to evaluate. So scales are tried on a grid, then refined by least squares where that helps; then
they are rounded to their encoding, and only then are codes chosen: the nested 4-bit code as
above, and the residual of the 8-bit level nearest to what is left.
"""

import dataclasses
import functools
from typing import Any, Final, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from pallas_kernels.layout import padded_columns
from pallas_kernels.levels import LevelTable
from pallas_kernels.pages import ExpertFormat
from pallas_kernels.scales import decode_scales, encode_scales, groups_per_row

DEFAULT_BALANCE: Final = 10.0
"""Against 1, the loss at 4 bits falls by a third and hardly changes at 2 bits: measured in
``docs/results/quantizer.md``."""
SCALE_GRID: Final = tuple(np.geomspace(0.5, 1.6, 16).tolist())
"""Scales that are tried, in units of the group's root mean square."""
REFINEMENTS: Final = 2
"""Least-squares steps after the grid; a third lowers the error at 4 bits by 0.1 % more."""
LARGEST_WEIGHT: Final = 2.0**100
"""Beyond it reciprocals and products of scales would leave float32."""
GROUPS_PER_BLOCK: Final = 1024
"""Groups that are searched at once: their weights stay in the cache of one core."""


class Quantized(NamedTuple):
    """One quantized matrix."""

    codes: UInt8[np.ndarray, "N K"]
    scales: Float32[np.ndarray, "G N"]
    """As their encoding rounds them; encoding them again changes nothing."""


class Quantizer(Protocol):
    """What the converter asks of a quantizer; it must be deterministic."""

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain JSON data, for the checkpoint's header."""

    def __call__(self, weights: Float32[np.ndarray, "N K"], fmt: ExpertFormat) -> Quantized:
        """Codes and scales of one matrix of weights of magnitude at most ``LARGEST_WEIGHT``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridQuantizer:
    """Data-free: scale by grid on the 2-bit error plus ``balance`` times the 4-bit error."""

    balance: float = DEFAULT_BALANCE

    def describe(self) -> dict[str, Any]:
        return {"name": "grid", "balance": self.balance}

    def __call__(self, weights: Float32[np.ndarray, "N K"], fmt: ExpertFormat) -> Quantized:
        fitted = fit_scales(weights, fmt.group_size, fmt.table, self.balance)
        scales = decode_scales(encode_scales(np.asarray(fitted), fmt.scale_encoding))
        codes = _choose_codes(weights, scales, fmt.group_size, fmt.table, self.balance)
        return Quantized(np.asarray(codes), scales)


class _Lines(NamedTuple):
    """The eight magnitudes of the nested code as lines ``2 x p - q``; index 4 * outer + child."""

    p: tuple[float, ...]
    q: tuple[float, ...]

    @classmethod
    def of(cls, table: LevelTable, balance: float) -> "_Lines":
        base = np.repeat(table.base, 4)
        child = np.ravel(table.children)
        return cls(
            tuple((base + balance * child).tolist()),
            tuple((base**2 + balance * child**2).tolist()),
        )


@functools.partial(jax.jit, static_argnames=("group_size", "table", "balance"))
def fit_scales(weights: Any, group_size: int, table: LevelTable, balance: float) -> Any:
    """Unrounded scale of every group: float32 [N, K] to [G, N]."""
    rows, columns = weights.shape
    groups = groups_per_row(columns, group_size)
    padded = jnp.pad(jnp.abs(weights), ((0, 0), (0, padded_columns(columns) - columns)))
    block = min(GROUPS_PER_BLOCK, rows * groups)
    spare = -(rows * groups) % block
    by_group = jnp.pad(padded.reshape(rows * groups, group_size), ((0, spare), (0, 0)))
    present = np.clip(columns - group_size * np.arange(groups), 0, group_size)
    absent = np.pad(np.tile(group_size - present, rows), (0, spare)).astype(np.float32)
    search = functools.partial(_search, lines=_Lines.of(table, balance))
    scales = jax.lax.map(
        lambda blocks: search(*blocks),
        (
            by_group.reshape(-1, block, group_size).transpose(0, 2, 1),
            absent.reshape(-1, block),
        ),
    )
    return scales.reshape(-1)[: rows * groups].reshape(rows, groups).T


def _search(block: Any, absent: Any, lines: _Lines) -> Any:
    """Best scale of each group of a block of magnitudes: float32 [group_size, B] to [B].

    ``absent`` [B] counts the zeros of a group that are padding, which must not weigh: where x is 0,
    the best line is the first, with value -q.
    """
    largest = block.max(axis=0)
    x = block / jnp.where(largest > 0, largest, 1.0)
    count = jnp.maximum(block.shape[0] - absent, 1.0)
    unit = jnp.sqrt(jnp.square(x).sum(axis=0) / count)

    def gain(scale: Any) -> Any:
        """Sum of squares less the objective, with s taken out of the lines."""
        best = functools.reduce(
            jnp.maximum,
            (
                x * (2 * p * scale) - q * jnp.square(scale)
                for p, q in zip(lines.p, lines.q, strict=True)
            ),
        )
        return best.sum(axis=0) + absent * lines.q[0] * jnp.square(scale)

    def better(best: tuple[Any, Any], scale: Any) -> tuple[Any, Any]:
        gained = gain(scale)
        improves = gained > best[1]
        return jnp.where(improves, scale, best[0]), jnp.where(improves, gained, best[1])

    def try_grid(index: Any, best: tuple[Any, Any]) -> tuple[Any, Any]:
        return better(best, unit * jnp.asarray(SCALE_GRID, jnp.float32)[index])

    def refine(_: Any, best: tuple[Any, Any]) -> tuple[Any, Any]:
        choice = _choose(x, best[0], lines)
        p, q = (_select(choice, values) for values in lines)
        squares = q.sum(axis=0) - absent * lines.q[0]
        return better(best, (x * p).sum(axis=0) / jnp.where(squares > 0, squares, 1.0))

    first = unit * SCALE_GRID[0]
    best = jax.lax.fori_loop(1, len(SCALE_GRID), try_grid, (first, gain(first)))
    scale, _ = jax.lax.fori_loop(0, REFINEMENTS, refine, best)
    return scale * largest


def _choose(x: Any, scale: Any, lines: _Lines) -> Any:
    """Index 4 * outer + child of the best code of each magnitude ``x``: int32."""
    scaled = x / jnp.where(scale > 0, scale, 1.0)
    best = scaled * (2 * lines.p[0]) - lines.q[0]
    choice = jnp.zeros(scaled.shape, jnp.int32)
    for index in range(1, len(lines.p)):
        line = scaled * (2 * lines.p[index]) - lines.q[index]
        choice = jnp.where(line > best, index, choice)
        best = jnp.maximum(line, best)
    return choice


def _select(choice: Any, values: tuple[float, ...]) -> Any:
    """``values[choice]`` by comparisons, which vectorise where a gather does not."""
    selected = jnp.full(choice.shape, values[0], jnp.float32)
    for index in range(1, len(values)):
        selected = jnp.where(choice == index, jnp.float32(values[index]), selected)
    return selected


@functools.partial(jax.jit, static_argnames=("group_size", "table", "balance"))
def _choose_codes(
    weights: Any, scales: Any, group_size: int, table: LevelTable, balance: float
) -> Any:
    """8-bit codes for given scales: float32 [N, K] and [G, N] to uint8 [N, K]."""
    scale = jnp.repeat(scales.T, group_size, axis=1)[:, : weights.shape[1]]
    choice = _choose(jnp.abs(weights), scale, _Lines.of(table, balance))
    negative = weights < 0
    magnitude = _select(choice, tuple(np.ravel(table.children).tolist()))
    step = _select(choice, tuple(np.repeat(table.residual_step, 4).tolist()))
    scaled = weights / jnp.where(scale > 0, scale, 1.0)
    left = scaled - jnp.where(negative, -magnitude, magnitude)
    steps = jnp.clip(jnp.floor(jnp.abs(left) / step), 0, 7).astype(jnp.int32)
    code = (negative << 7) | (choice << 4) | ((left < 0) << 3) | steps
    return code.astype(jnp.uint8)
