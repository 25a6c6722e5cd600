"""One pass over the columns of a batch of matrices, group by group.

All arrays have the columns before the rows, [E, K, N], so that a column is contiguous. What a group
takes from all others is one matmul; inside the group columns follow one after another, each
choosing codes for its targets and passing its change on to the rest of the group. A group may try
several scales, and each row keeps the one with the least loss.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32, UInt8

from convert.joint.choices import Choice
from convert.joint.feedback import Feedback
from pallas_kernels.scales import LOG8_STEPS_PER_OCTAVE


class State(NamedTuple):
    """Codes and scales of a batch, columns first; a pytree."""

    codes: UInt8[jax.Array, "E K N"]
    scales: Float32[jax.Array, "E G N"]
    errors: Float32[jax.Array, "L E K N"]
    """Value less weight at each level of the choice; all zero before a start."""


@functools.partial(jax.jit, static_argnames="choice")
def with_errors(
    codes: UInt8[jax.Array, "E K N"],
    scales: Float32[jax.Array, "E G N"],
    weights: Float32[jax.Array, "E K N"],
    *,
    choice: Choice,
) -> State:
    """The state that codes and scales stand for."""
    group_size = codes.shape[1] // scales.shape[1]
    spread = jnp.repeat(scales, group_size, axis=1)
    return State(codes, scales, choice.values(codes) * spread - weights)


@functools.partial(jax.jit, static_argnames="choice", donate_argnums=0)
def better(first: State, second: State, feedback: Feedback, *, choice: Choice) -> State:
    """Of each row the state with less loss, the first of equals. ``feedback`` is of descent."""
    is_better = loss(second, feedback, choice=choice) < loss(first, feedback, choice=choice)
    return jax.tree.map(lambda a, b: jnp.where(is_better[:, None, :], b, a), first, second)


def loss(state: State, feedback: Feedback, *, choice: Choice) -> Float32[jax.Array, "E N"]:
    """Weighted sum over the levels of ``d @ H @ d`` for the errors d of each row."""
    passed = jnp.einsum(
        "ejk,lekn->lejn", feedback.matrix, state.errors, precision=lax.Precision.HIGHEST
    )
    by_column = jnp.square(state.errors) + state.errors * passed
    weights = jnp.asarray(choice.weights, jnp.float32)
    return jnp.einsum("l,ek,lekn->en", weights, feedback.curvature, by_column)


@functools.partial(jax.jit, static_argnames=("choice", "steps", "is_start"), donate_argnums=0)
def sweep(
    state: State,
    weights: Float32[jax.Array, "E K N"],
    feedback: Feedback,
    *,
    choice: Choice,
    steps: tuple[int, ...],
    is_start: bool = False,
) -> State:
    """Visits every group once.

    ``steps`` are the scales that a group tries: the present one times ``2**(step / 32)``, so scales
    that log8 can hold lead to such. Of equals the first is kept. In a start (``is_start``: errors
    are zero where no group was visited, and feedback is from earlier columns) the loss of a scale
    is that of the group's codes; in descent it is the change of the whole loss, and with 0 first
    among the steps no pass raises it.
    """
    groups = state.scales.shape[1]
    size = state.codes.shape[1] // groups
    factors = 2.0 ** (jnp.asarray(steps, jnp.float32) / LOG8_STEPS_PER_OCTAVE)
    visit = functools.partial(_visit, choice=choice, is_start=is_start)

    def group(index: jax.Array, state: State) -> State:
        first = index * size

        def part(array: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, first, size, axis)

        rows = part(feedback.matrix, 1)
        taken = jnp.einsum("ejk,lekn->lejn", rows, state.errors, precision=lax.Precision.HIGHEST)
        of_group = part(weights, 1)
        scale = lax.dynamic_index_in_dim(state.scales, index, 1, keepdims=False)
        tried = jax.vmap(
            lambda factor: visit(
                part(state.codes, 1),
                scale * factor,
                part(state.errors, 2),
                of_group - taken,
                of_group,
                Feedback(part(rows, 2), part(feedback.curvature, 1)),
            )
        )(factors)
        best = jnp.argmin(tried.loss, axis=0)
        codes, errors = (_pick(tried.codes, best), _pick(tried.errors, best))
        update = lax.dynamic_update_slice_in_dim
        return State(
            update(state.codes, codes, first, 1),
            lax.dynamic_update_index_in_dim(state.scales, scale * factors[best], index, 1),
            update(state.errors, errors, first, 2),
        )

    return lax.fori_loop(0, groups, group, state)


class _Visited(NamedTuple):
    """A group after its columns were visited at one scale, C columns."""

    codes: UInt8[jax.Array, "E C N"]
    errors: Float32[jax.Array, "L E C N"]
    targets: Float32[jax.Array, "L E C N"]
    loss: Float32[jax.Array, "E N"]


def _visit(
    codes: UInt8[jax.Array, "E C N"],
    scale: Float32[jax.Array, "E N"],
    errors: Float32[jax.Array, "L E C N"],
    targets: Float32[jax.Array, "L E C N"],
    weights: Float32[jax.Array, "E C N"],
    feedback: Feedback,  # of the group: [E, C, C] and [E, C]
    *,
    choice: Choice,
    is_start: bool,
) -> _Visited:
    unit = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0)
    level_weights = jnp.asarray(choice.weights, jnp.float32)[:, None, None]

    def column(index: jax.Array, visited: _Visited) -> _Visited:
        def at(array: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_index_in_dim(array, index, axis, keepdims=False)

        target, error, weight = at(visited.targets, 2), at(visited.errors, 2), at(weights, 1)
        code = choice.nearest(target * unit, at(visited.codes, 1))
        value = choice.values(code) * scale
        missed = jnp.square(value - target)
        if not is_start:
            missed = missed - jnp.square(weight + error - target)
        change = value - weight - error
        passed = at(feedback.matrix, 2)[..., None] * change[:, :, None, :]
        update = lax.dynamic_update_index_in_dim
        return _Visited(
            update(visited.codes, code, index, 1),
            update(visited.errors, value - weight, index, 2),
            visited.targets - passed,
            visited.loss
            + at(feedback.curvature, 1)[:, None] * jnp.sum(level_weights * missed, axis=0),
        )

    start = _Visited(codes, errors, targets, jnp.zeros_like(scale))
    return lax.fori_loop(0, codes.shape[1], column, start)


def _pick(tried: jax.Array, best: jax.Array) -> jax.Array:
    """Of arrays [S, ..., E, C, N] those that ``best`` [E, N] names: [..., E, C, N]."""
    return functools.reduce(
        lambda picked, index: jnp.where((best == index)[:, None, :], tried[index], picked),
        range(1, tried.shape[0]),
        tried[0],
    )
