"""Random packed experts and a float64 definition of what they compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import pack_pages, unpack_pages, untile_scales
from pallas_kernels.levels import DEFAULT_TABLE, LEVEL_BITS, PAGES_OF_BITS
from pallas_kernels.pages import ExpertFormat, PagedExperts, abstract_experts, levels_of_table
from pallas_kernels.scales import Scales, decode_scales


def random_experts(
    *, hidden, width, base_bits=2, layers=2, experts=6, group_size=64, encoding="bf16", seed=0
) -> PagedExperts:
    """Random bits everywhere; every expert holds a random part of the ladder."""
    rng = np.random.default_rng(seed)
    fmt = ExpertFormat(
        hidden=hidden,
        width=width,
        group_size=group_size,
        scale_encoding=encoding,
        table=DEFAULT_TABLE,
    )
    rungs = 4 - PAGES_OF_BITS[base_bits]
    shapes = abstract_experts(
        fmt,
        layers=layers,
        experts=experts,
        base_bits=base_bits,
        pool_pages=rungs * layers * experts,
    )
    pages = iter(rng.permutation(rungs * layers * experts))
    table = np.full(shapes.table.shape, -1, np.int32)
    for layer, expert in np.ndindex(layers, experts):
        for rung in range(rng.integers(0, rungs + 1)):
            table[rung, layer, expert] = next(pages)

    def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.dtype == jnp.uint32:
            return jnp.asarray(rng.integers(0, 2**32, shape.shape, dtype=np.uint32))
        if shape.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 64, shape.shape, dtype=np.uint8))
        return jnp.asarray(rng.uniform(0.01, 0.03, shape.shape), shape.dtype)

    return dataclasses.replace(
        jax.tree.map(fill, dataclasses.replace(shapes, table=None)), table=jnp.asarray(table)
    )


def random_tile(rng, *, bits, columns, group_size, log8):
    """Pages of 64 rows, each uint32 [2C, 256], and their scales [columns / group_size, 64]."""
    codes = rng.integers(0, 256, (64, columns), dtype=np.uint8)
    pages = list(pack_pages(codes)[: PAGES_OF_BITS[bits], 0])
    shape = columns // group_size, 64
    if log8:
        return pages, rng.integers(0, 256, shape, dtype=np.uint8)
    return pages, rng.uniform(0.01, 0.03, shape).astype(jnp.bfloat16)


def expert_matrices(experts: PagedExperts, layer: int, expert: int) -> tuple[np.ndarray, ...]:
    """gate_up [2F, H], as stored, and down [H, F] in float64, straight from the definitions."""
    table = np.asarray(experts.table)
    level = int(levels_of_table(table, experts.base_bits)[layer, expert])
    bits = LEVEL_BITS[level]
    matrices = []
    for index, shape in enumerate(experts.format.matrix_shapes.values()):
        pages = [np.asarray(page[index][layer, expert]) for page in experts.base]
        pool = np.asarray(experts.pool[index])
        pages += [pool[table[r, layer, expert]] for r in range(PAGES_OF_BITS[bits] - len(pages))]
        codes = unpack_pages(np.stack(pages), *shape)
        codes_of_scales, base = experts.scales[index]
        scales = Scales(
            untile_scales(np.asarray(codes_of_scales)[layer, expert]),
            None if base is None else np.asarray(base)[layer, expert],
        )
        scale = np.repeat(decode_scales(scales).T, experts.format.group_size, axis=1)
        values = experts.format.table.values(bits)[codes >> (8 - bits)]
        matrices.append(values.astype(np.float64) * scale[: shape[0], : shape[1]])
    return tuple(matrices)


def define(matrices_of, x, ids, weights) -> np.ndarray:
    """The expert feed-forward in float64, one assignment at a time."""
    matrices_of = functools.cache(matrices_of)
    y = np.zeros(x.shape)
    for token, k in np.ndindex(*ids.shape):
        if ids[token, k] >= 0:
            gate_up, down = matrices_of(int(ids[token, k]))
            product = (gate_up @ x[token].astype(np.float64)).reshape(-1, 2, 8)  # eights alternate
            gate, up = product[:, 0].reshape(-1), product[:, 1].reshape(-1)
            y[token] += weights[token, k] * (down @ (gate / (1 + np.exp(-gate)) * up))
    return y


def random_routing(tokens, top_k, experts, seed=0):
    """x [T, H] is the caller's; ids [T, k] without repeats in a row, weights [T, k]."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    return ids, rng.uniform(0, 1, (tokens, top_k)).astype(np.float32)
