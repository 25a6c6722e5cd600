"""Every implementation of the expert feed-forward against its float64 definition.

Tolerance: 32-bit sums of at most 512 products each, relative to the largest output.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.experts import define, expert_matrices, random_experts, random_routing

from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.expert_ffn.grouping import group_by_expert, tile_count
from pallas_kernels.pages import PlainExperts, interleave_gate_up

TOLERANCE = 2e-6
RUNNABLE = ["xla"]  # "mosaic" rounds to bfloat16: test_expert_prefill.py
EXPERTS = 6


run = jax.jit(expert_ffn, static_argnames=("layer", "implementation"))


def assert_matches(experts, ids, weights, *, implementation="auto", layer=1):
    x = np.random.default_rng(9).normal(size=(ids.shape[0], experts.hidden)).astype(np.float32)
    y = run(*map(jnp.asarray, (x, ids, weights)), experts, layer, implementation)
    expected = define(lambda e: expert_matrices(experts, layer, e), x, ids, weights)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=TOLERANCE * max(np.abs(expected).max(), 1e-9))


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("base_bits", [2, 4, 8])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 2), (3, 2), (40, 2), (70, 5)])
def test_any_mix_of_levels(implementation, base_bits, tokens, top_k):
    experts = random_experts(hidden=96, width=40, base_bits=base_bits)
    assert_matches(experts, *random_routing(tokens, top_k, EXPERTS), implementation=implementation)


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("encoding", ["bf16", "log8"])
def test_groups_and_scale_encodings(implementation, group_size, encoding):
    experts = random_experts(hidden=256, width=64, group_size=group_size, encoding=encoding)
    assert_matches(experts, *random_routing(5, 2, EXPERTS), implementation=implementation)


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize(("hidden", "width"), [(128, 128), (200, 304), (512, 16), (384, 512)])
def test_shapes(implementation, hidden, width):
    experts = random_experts(hidden=hidden, width=width)
    assert_matches(experts, *random_routing(4, 3, EXPERTS), implementation=implementation)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_all_tokens_choose_one_expert(implementation):
    ids = np.full((33, 1), 4, np.int32)
    weights = np.ones((33, 1), np.float32)
    assert_matches(random_experts(hidden=64, width=32), ids, weights, implementation=implementation)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_sorted_and_ragged_routing_with_empty_experts(implementation):
    ids = np.repeat(np.asarray([0, 2, 5], np.int32), [1, 17, 9])[:, None]
    weights = np.linspace(0.1, 1, 27, dtype=np.float32)[:, None]
    assert_matches(random_experts(hidden=64, width=32), ids, weights, implementation=implementation)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_tokens_without_experts_get_zero(implementation):
    ids, weights = random_routing(12, 3, EXPERTS)
    ids[[0, 5, 11]] = -1
    experts = random_experts(hidden=64, width=32)
    assert_matches(experts, ids, weights, implementation=implementation)
    assert_matches(experts, np.full_like(ids, -1), weights, implementation=implementation)


def test_other_layers_pages_do_not_matter():
    ids, weights = random_routing(6, 2, EXPERTS)
    assert_matches(random_experts(hidden=64, width=32), ids, weights, layer=0)


def test_plain_experts():
    rng = np.random.default_rng(0)
    gate_up, down = rng.normal(size=(2, 6, 64, 48)), rng.normal(size=(2, 6, 48, 32))
    ids, weights = random_routing(20, 3, EXPERTS)
    x = rng.normal(size=(20, 48)).astype(np.float32)
    plain = PlainExperts(*(jnp.asarray(w, jnp.float32) for w in (gate_up, down)))
    y = run(*map(jnp.asarray, (x, ids, weights)), plain, 1)
    stored = interleave_gate_up(*np.split(gate_up[1], 2, axis=1))
    expected = define(lambda e: (stored[e], down[1, e]), x, ids, weights)
    np.testing.assert_allclose(y, expected, atol=TOLERANCE * np.abs(expected).max())


def test_result_has_the_dtype_of_x():
    experts = random_experts(hidden=64, width=32)
    ids, weights = map(jnp.asarray, random_routing(2, 2, EXPERTS))
    y = run(jnp.ones((2, 64), jnp.bfloat16), ids, weights, experts, 0)
    assert y.dtype == jnp.bfloat16


def test_bad_arguments_are_named():
    experts = random_experts(hidden=64, width=32)
    x = jnp.ones((2, 64))
    ids, weights = map(jnp.asarray, random_routing(2, 2, EXPERTS))
    with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'cuda'"):
        expert_ffn(x, ids, weights, experts, 0, "cuda")
    with pytest.raises(ValueError, match=r"x must be \[T, 64\]"):
        expert_ffn(x[:, :63], ids, weights, experts, 0)
    with pytest.raises(ValueError, match="must both be"):
        expert_ffn(x, ids[:1], weights, experts, 0)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.1, got 2"):
        expert_ffn(x, ids, weights, experts, 2)
    with pytest.raises(ValueError, match="7 experts a token, but there are 6"):
        expert_ffn(x, jnp.zeros((2, 7), jnp.int32), jnp.zeros((2, 7)), experts, 0)


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("seed", range(8))
def test_grouping_puts_every_assignment_in_a_tile_of_its_expert(rows, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 5, (rng.integers(1, 30), 2)).astype(np.int32)
    tiles = jax.tree.map(np.asarray, jax.jit(group_by_expert, static_argnums=(1, 2))(ids, 5, rows))
    assert tiles.expert.size == tile_count(ids.size, 5, rows)
    placed = tiles.assignment[tiles.assignment >= 0]
    assert sorted(placed.tolist()) == np.flatnonzero(ids.reshape(-1) >= 0).tolist()
    for expert, row in zip(tiles.expert, tiles.assignment, strict=True):
        assert (ids.reshape(-1)[row[row >= 0]] == expert).all()
    used = np.count_nonzero(tiles.expert >= 0)
    counts = np.bincount(ids[ids >= 0], minlength=5)
    assert used == (-(-counts // rows)).sum()
