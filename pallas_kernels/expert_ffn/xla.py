"""Experts in plain JAX: the specification of every other implementation, and what a CPU runs.

Rows are grouped by expert into tiles; each tile decodes just the pages that its expert holds.
Weights are never brought into the order of columns: the input is permuted once instead.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int32

from pallas_kernels.expert_ffn.grouping import group_by_expert
from pallas_kernels.layout import (
    WORD_BITS,
    column_of_word_bit,
    padded_columns,
    unpack_words,
    untile_scales,
)
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS, Bits, level_of_bits
from pallas_kernels.pages import (
    GATE_UP_ROWS,
    ExpertFormat,
    Matrices,
    PagedExperts,
    PlainExperts,
    levels_of_table,
)
from pallas_kernels.scales import Scales, decode_scales

_PRECISION = lax.Precision.HIGHEST


def expert_ffn_pages(
    x: Float[jax.Array, "T H"],
    expert_ids: Int32[jax.Array, "T k"],
    expert_weights: Float32[jax.Array, "T k"],
    arrays: PagedExperts,
    layer: jax.Array | int,
) -> Float32[jax.Array, "T H"]:
    """Weighted sum over each token's experts, each at the level that the page table gives it."""
    fmt = arrays.format
    levels = levels_of_table(arrays.table, arrays.base_bits).reshape(-1)  # [L E]
    x = _in_memory_order(x.astype(jnp.float32), fmt.hidden)

    def at_level(bits: Bits) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def run(rows: jax.Array, owner: jax.Array) -> jax.Array:
            pages = _pages_of_expert(arrays, owner, PAGES_OF_BITS[bits])
            weights = Matrices(
                *(
                    _decode(words, jax.tree.map(lambda s: _flat(s)[owner], scales), bits, fmt)
                    for words, scales in zip(pages, arrays.scales, strict=True)
                )
            )
            hidden = _gated_in_eights(_product(rows, weights.gate_up), fmt.width)
            return _product(_in_memory_order(hidden, fmt.width), weights.down)[:, : fmt.hidden]

        return run

    base_level = level_of_bits(arrays.base_bits)
    reachable = LEVEL_BITS[base_level:] if arrays.pool_pages else (arrays.base_bits,)
    branches = [at_level(bits) for bits in reachable]

    def of_tile(rows: jax.Array, owner: jax.Array) -> jax.Array:
        return lax.switch(levels[owner] - base_level, branches, rows, owner)

    return _over_tiles(x, expert_ids, expert_weights, arrays, layer, fmt.hidden, of_tile)


def expert_ffn_plain(
    x: Float[jax.Array, "T H"],
    expert_ids: Int32[jax.Array, "T k"],
    expert_weights: Float32[jax.Array, "T k"],
    weights: PlainExperts,
    layer: jax.Array | int,
) -> Float32[jax.Array, "T H"]:
    """The same over unquantized weights."""

    def of_tile(rows: jax.Array, owner: jax.Array) -> jax.Array:
        gate_up, down = (_flat(w)[owner].astype(jnp.float32) for w in weights)
        return _product(_gated(_product(rows, gate_up)), down)

    x = x.astype(jnp.float32)
    return _over_tiles(x, expert_ids, expert_weights, weights, layer, weights.hidden, of_tile)


def _over_tiles(
    x: Float32[jax.Array, "T K"],
    expert_ids: Int32[jax.Array, "T k"],
    expert_weights: Float32[jax.Array, "T k"],
    arrays: PagedExperts | PlainExperts,
    layer: jax.Array | int,
    hidden: int,
    of_tile: Callable[[jax.Array, jax.Array], jax.Array],
) -> Float32[jax.Array, "T H"]:
    """Adds up each token's weighted outputs of ``of_tile(rows [M, K], owner) -> [M, H]``.

    An owner is an expert of all layers, layer * E + expert: one index, made outside of the loop.
    """
    experts = arrays.experts
    rows = _rows_per_tile(expert_ids.size, experts)
    tiles = group_by_expert(expert_ids, experts, rows)
    owners = jnp.where(tiles.expert < 0, -1, layer * experts + tiles.expert)
    weights = expert_weights.reshape(-1)

    def add_tile(y: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        owner, assignment = tile
        token = jnp.maximum(assignment, 0) // expert_ids.shape[1]
        weight = jnp.where(assignment < 0, 0, weights[assignment])

        def add() -> jax.Array:
            return y.at[token].add(of_tile(x[token], owner) * weight[:, None])

        return lax.cond(owner < 0, lambda: y, add), None

    zeros = jnp.zeros((x.shape[0], hidden), jnp.float32)
    return lax.scan(add_tile, zeros, (owners, tiles.assignment))[0]


def _rows_per_tile(assignments: int, experts: int) -> int:
    """Rows that keep both the padding and the repeated decoding of an expert small."""
    mean = -(-assignments // experts)
    return next(rows for rows in (1, 8, 16, 32, 64, 128) if rows >= min(mean, 128))


def _pages_of_expert(arrays: PagedExperts, owner: jax.Array, count: int) -> Matrices:
    """First ``count`` pages of an expert: uint32 [count, B, 2C, 256] of each matrix."""
    held = [Matrices(*(_flat(m)[owner] for m in page)) for page in arrays.base[:count]]
    for rung in range(count - len(held)):
        page = arrays.table[rung].reshape(-1)[owner]
        held.append(Matrices(*(m[page] for m in arrays.pool)))
    return Matrices(*(jnp.stack(pages) for pages in zip(*held, strict=True)))


def _decode(
    pages: jax.Array, scales: Scales, bits: Bits, fmt: ExpertFormat
) -> Float32[jax.Array, "N K"]:
    """Weights of one matrix, columns in the order of memory, with the padding."""
    codes = unpack_words(pages)  # [N, W, 32]
    values = jnp.asarray(fmt.table.values(bits))[codes >> (8 - bits)]
    group = column_of_word_bit(codes.shape[1]) // fmt.group_size  # [W, 32]
    rows_scales = decode_scales(Scales(untile_scales(scales.codes), scales.base)).T
    weights = values * rows_scales[:, group]
    return weights.reshape(codes.shape[0], -1)


def _in_memory_order(x: Float32[jax.Array, "M C"], columns: int) -> Float32[jax.Array, "M K"]:
    padded = jnp.pad(x, ((0, 0), (0, padded_columns(columns) - columns)))
    return padded[:, column_of_word_bit(padded.shape[1] // WORD_BITS).reshape(-1)]


def _product(x: Float32[jax.Array, "M K"], w: Float32[jax.Array, "N K"]) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=_PRECISION)


def _gated_in_eights(gate_up: Float32[jax.Array, "M N"], width: int) -> Float32[jax.Array, "M F"]:
    pairs = gate_up[:, : 2 * width].reshape(-1, width // GATE_UP_ROWS, 2, GATE_UP_ROWS)
    return (jax.nn.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(-1, width)


def _gated(gate_up: Float32[jax.Array, "M F2"]) -> Float32[jax.Array, "M F"]:
    gate, up = jnp.split(gate_up, 2, axis=1)
    return jax.nn.silu(gate) * up


def _flat(stack: jax.Array) -> jax.Array:
    """[L, E, ...] by owner."""
    return stack.reshape(-1, *stack.shape[2:])
