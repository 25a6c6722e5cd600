"""Which code a weight takes, given targets: chosen for one column of all rows at once.

Values are in units of the scale; a code is the 8-bit code of ``pallas_kernels.levels``.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from pallas_kernels.levels import LevelTable

_SIGN, _CHILD, _RESIDUAL_SIGN = 7, 4, 3
"""Lowest bit of each field of a code."""


class Choice(Protocol):
    """Chooses a code of each weight for one or more levels; hashable, so static under jit."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the squared error of each level."""

    def values(self, codes: UInt8[jax.Array, "*S"]) -> Float32[jax.Array, "L *S"]:
        """Values of codes at each level, in units of the scale."""

    def nearest(
        self, x: Float32[jax.Array, "L *S"], codes: UInt8[jax.Array, "*S"]
    ) -> UInt8[jax.Array, "*S"]:
        """Codes with the least weighted squared error to ``x``; ``codes`` are those so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairChoice:
    """Sign, outer and child: 2 bits with weight 1 and 4 bits with weight ``balance``."""

    table: LevelTable
    balance: float

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0, self.balance)

    def values(self, codes: UInt8[jax.Array, "*S"]) -> Float32[jax.Array, "L *S"]:
        magnitude = codes >> _CHILD & 7
        base, child = np.repeat(self.table.base, 4), np.ravel(self.table.children)
        values = jnp.stack([_select(magnitude, tuple(v.tolist())) for v in (base, child)])
        return jnp.where(codes >> _SIGN == 1, -values, values)

    def nearest(
        self, x: Float32[jax.Array, "L *S"], codes: UInt8[jax.Array, "*S"]
    ) -> UInt8[jax.Array, "*S"]:
        """The sum of weight * (x - value)**2 is that of the squares of x, less 2 y - q, with y
        linear in x and odd in the sign: so the sign is that of y, and |y| decides the rest."""

        def line(base: float, child: float) -> tuple[jax.Array, jax.Array]:
            y = float(base) * x[0] + float(self.balance * child) * x[1]
            return y, 2 * jnp.abs(y) - float(base**2 + self.balance * child**2)

        first, *others = zip(
            np.repeat(self.table.base, 4), np.ravel(self.table.children), strict=True
        )
        y, best = line(*first)
        chosen = jnp.zeros(best.shape, jnp.uint8)
        for magnitude, pair in enumerate(others, start=1):
            other, gain = line(*pair)
            better = gain > best
            best = jnp.where(better, gain, best)
            chosen = jnp.where(better, jnp.uint8(magnitude), chosen)
            y = jnp.where(better, other, y)
        return (y < 0).astype(jnp.uint8) << _SIGN | chosen << _CHILD


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualChoice:
    """The last four bits alone: 8 bits on the 4-bit code as it is."""

    table: LevelTable

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,)

    def values(self, codes: UInt8[jax.Array, "*S"]) -> Float32[jax.Array, "L *S"]:
        steps = (codes & 7).astype(jnp.float32) + 0.5
        residual = steps * self._step(codes)
        return (self._start(codes) + jnp.where(codes >> _RESIDUAL_SIGN & 1, -residual, residual))[
            None
        ]

    def nearest(
        self, x: Float32[jax.Array, "L *S"], codes: UInt8[jax.Array, "*S"]
    ) -> UInt8[jax.Array, "*S"]:
        left = x[0] - self._start(codes)
        steps = jnp.clip(jnp.floor(jnp.abs(left) / self._step(codes)), 0, 7).astype(jnp.uint8)
        return (codes & 0xF0) | (left < 0).astype(jnp.uint8) << _RESIDUAL_SIGN | steps

    def _start(self, codes: UInt8[jax.Array, "*S"]) -> Float32[jax.Array, "*S"]:
        return PairChoice(table=self.table, balance=1.0).values(codes)[1]

    def _step(self, codes: UInt8[jax.Array, "*S"]) -> Float32[jax.Array, "*S"]:
        inner, outer = self.table.residual_step
        return jnp.where(codes >> 6 & 1, jnp.float32(outer), jnp.float32(inner))


def _select(index: jax.Array, values: tuple[float, ...]) -> jax.Array:
    """``values[index]`` by comparisons, which vectorise where a gather does not."""
    pairs = enumerate(values[1:], start=1)
    return functools.reduce(
        lambda selected, pair: jnp.where(index == pair[0], jnp.float32(pair[1]), selected),
        pairs,
        jnp.full(index.shape, values[0], jnp.float32),
    )
