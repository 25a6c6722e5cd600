"""What is summed over the tokens of each expert: Hessians, output errors, largest outputs.

Assignments of tokens to experts are sorted by expert and cut into tiles; a loop takes one tile
after another, so that nothing is as large as tokens times experts, and sums do not depend on
timing. Axis letters: E experts, H hidden, F expert width, N rows and K columns of a matrix, M rows
of a tile, G groups.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, UInt8

from convert.calibration.block import Block, Routed, routed
from pallas_kernels.expert_ffn.grouping import group_by_expert
from pallas_kernels.levels import LEVEL_BITS, LevelTable
from pallas_kernels.pages import Matrices

_TILE_ROWS = (8, 16, 32, 64, 128, 256, 512)
_Sums = TypeVar("_Sums")


class QuantizedMatrices(NamedTuple):
    """One of the two matrices of every expert of a layer, on the device; a pytree."""

    codes: UInt8[jax.Array, "E N K"]
    scales: Float32[jax.Array, "E G N"]

    def of(self, expert: jax.Array, values: jax.Array, group_size: int) -> jax.Array:
        """Weights of one expert where code c stands for ``values[c]``: float32 [N, K]."""
        codes = self.codes[expert]
        scale = jnp.repeat(self.scales[expert].T, group_size, axis=1)[:, : codes.shape[1]]
        return values[codes] * scale


def values_of_levels(table: LevelTable) -> Float32[jax.Array, "levels 256"]:
    """What an 8-bit code stands for at each level, in units of its scale."""
    codes = jnp.arange(256)
    return jnp.stack([jnp.asarray(table.values(bits))[codes >> (8 - bits)] for bits in LEVEL_BITS])


class InputSums(NamedTuple):
    """Over the tokens of each expert, w its router weight; a pytree."""

    hessian: Float32[jax.Array, "E H H"]
    """Of w**2 x x'."""
    squared: Float32[jax.Array, " E"]
    """Of w**2."""
    mass: Float32[jax.Array, " E"]
    """Of w."""
    tokens: Float32[jax.Array, " E"]

    @staticmethod
    def zeros(experts: int, hidden: int) -> "InputSums":
        """No tokens yet."""
        return InputSums(
            jnp.zeros((experts, hidden, hidden)), *(jnp.zeros(experts) for _ in range(3))
        )


class ErrorSums(NamedTuple):
    """Over the tokens of each expert, w its router weight; a pytree."""

    errors: Float32[jax.Array, "levels E"]
    """Of w**2 times the squared difference to the unquantized expert's output."""
    mass: Float32[jax.Array, " E"]
    """Of w."""

    @staticmethod
    def zeros(experts: int) -> "ErrorSums":
        """No tokens yet."""
        return ErrorSums(jnp.zeros((len(LEVEL_BITS), experts)), jnp.zeros(experts))


@partial(jax.jit, donate_argnames="sums")
def add_inputs(block: Block, x: jax.Array, count: jax.Array, sums: InputSums) -> InputSums:
    """Adds the rows of ``x`` [B, W, H] after attention, of which ``count`` are no padding."""

    def add(sums: InputSums, expert: jax.Array, rows: jax.Array, w: jax.Array, _: Any) -> InputSums:
        parts = (w * w).sum(), w.sum(), (w > 0).sum()
        return InputSums(
            _add_outer(sums.hessian, expert, rows * w[:, None]),
            *(total.at[expert].add(part) for total, part in zip(sums[1:], parts, strict=True)),
        )

    return _over_tiles(routed(block, x, count), block.config.num_experts, sums, add)


@partial(jax.jit, static_argnames="group_size", donate_argnames="hessian")
def add_activations(
    block: Block,
    x: jax.Array,
    count: jax.Array,
    gate_up: QuantizedMatrices,
    values: jax.Array,
    group_size: int,
    hessian: Float32[jax.Array, "E F F"],
) -> Float32[jax.Array, "E F F"]:
    """Adds w**2 a a' of the activations a that the quantized ``gate_up`` gives."""

    def add(
        hessian: jax.Array, expert: jax.Array, rows: jax.Array, w: jax.Array, _: Any
    ) -> jax.Array:
        activations = _gated(rows, gate_up.of(expert, values, group_size))
        return _add_outer(hessian, expert, activations * w[:, None])

    return _over_tiles(routed(block, x, count), block.config.num_experts, hessian, add)


@partial(jax.jit, static_argnames="group_size", donate_argnames=("x", "largest"))
def run_experts(
    block: Block,
    x: jax.Array,
    count: jax.Array,
    experts: Matrices,
    values: jax.Array,
    group_size: int,
    largest: Float32[jax.Array, " E"],
) -> tuple[jax.Array, Float32[jax.Array, " E"]]:
    """``x`` with the outputs of the quantized experts added, and ``largest`` brought up to date.

    ``largest`` is the largest magnitude in the output of each expert, before its router weight.
    """

    def add(
        sums: tuple[jax.Array, jax.Array],
        expert: jax.Array,
        rows: jax.Array,
        w: jax.Array,
        tokens: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        y, largest = sums
        gate_up, down = (m.of(expert, values, group_size) for m in experts)
        output = _gated(rows, gate_up) @ down.T
        peak = jnp.max(jnp.where(w[:, None] > 0, jnp.abs(output), 0))
        return y.at[tokens].add(output * w[:, None]), largest.at[expert].max(peak)

    given = routed(block, x, count)
    y, largest = _over_tiles(
        given, block.config.num_experts, (jnp.zeros_like(given.x), largest), add
    )
    return x + y.reshape(x.shape), largest


@partial(jax.jit, static_argnames="group_size", donate_argnames="sums")
def add_errors(
    block: Block,
    x: jax.Array,
    count: jax.Array,
    plain: Matrices,
    experts: Matrices,
    values: jax.Array,
    group_size: int,
    sums: ErrorSums,
) -> ErrorSums:
    """Adds the errors of every level. ``plain`` are the unquantized matrices, any dtype."""

    def add(sums: ErrorSums, expert: jax.Array, rows: jax.Array, w: jax.Array, _: Any) -> ErrorSums:
        gate_up, down = (matrix[expert].astype(jnp.float32) for matrix in plain)
        exact = _gated(rows, gate_up) @ down.T

        def error(of_level: jax.Array) -> jax.Array:
            gate_up, down = (m.of(expert, of_level, group_size) for m in experts)
            difference = _gated(rows, gate_up) @ down.T - exact
            return jnp.square(difference * w[:, None]).sum()

        errors = sums.errors.at[:, expert].add(lax.map(error, values))
        return ErrorSums(errors, sums.mass.at[expert].add(w.sum()))

    return _over_tiles(routed(block, x, count), block.config.num_experts, sums, add)


def _over_tiles(given: Routed, experts: int, sums: _Sums, add: Callable[..., _Sums]) -> _Sums:
    """``add(sums, expert, rows [M, H], w [M], tokens [M])`` for one tile after another.

    Rows that pad a tile have w = 0, and a token that does not exist.
    """
    tokens, chosen = given.ids.shape
    tiles = group_by_expert(given.ids, experts, _rows_per_tile(given.ids.size, experts))
    weights = given.weights.reshape(-1)

    def body(index: jax.Array, sums: _Sums) -> _Sums:
        assignment = tiles.assignment[index]
        exists = assignment >= 0
        token = jnp.where(exists, assignment // chosen, tokens)
        w = jnp.where(exists, weights[assignment], 0.0)
        rows = given.x.at[token].get(mode="fill", fill_value=0.0)
        return add(sums, tiles.expert[index], rows, w, token)

    return lax.fori_loop(0, jnp.sum(tiles.expert >= 0), body, sums)


def _rows_per_tile(assignments: int, experts: int) -> int:
    """Rows that keep both the padding and the repeated decoding of an expert small."""
    mean = -(-assignments // experts)
    return next(rows for rows in _TILE_ROWS if rows >= min(mean, _TILE_ROWS[-1]))


def _add_outer(hessian: jax.Array, expert: jax.Array, rows: Float[jax.Array, "M K"]) -> jax.Array:
    """In place where the loop carries ``hessian``."""
    updated = hessian[expert] + rows.T @ rows
    return lax.dynamic_update_index_in_dim(hessian, updated, expert, 0)


def _gated(rows: Float[jax.Array, "M H"], gate_up: Float[jax.Array, "F2 H"]) -> jax.Array:
    gate, up = jnp.split(rows @ gate_up.T, 2, axis=1)
    return jax.nn.silu(gate) * up
