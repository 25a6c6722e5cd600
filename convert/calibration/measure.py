"""What is measured while the rows pass: output errors of experts, and what they do at the end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.calibration.block import Block, Head, divergence
from convert.calibration.experts import ErrorSums, add_errors
from convert.calibration.walk import Walk
from pallas_kernels.pages import Matrices


def output_errors(
    walk: Walk,
    layer: int,
    block: Block,
    plain: Matrices,
    quantized: Matrices,
    values: jax.Array,
    group_size: int,
) -> dict[str, Any]:
    """``benefit.LayerErrors`` of a layer on a share of the text, as plain JSON data.

    ``plain`` are lists of the unquantized matrices of all experts in any dtype, ``quantized`` are
    ``QuantizedMatrices``, ``values`` [levels, 256] say what their codes stand for.
    """
    total, rows = ErrorSums.zeros(block.config.num_experts), 0
    stacked = Matrices(*(jnp.asarray(np.stack(matrices)) for matrices in plain))
    for _, x, count, _ in walk.batches(walk.states(layer + 1), walk.plan.measured_runs()):
        total = add_errors(block, x, count, stacked, quantized, values, group_size, total)
        rows += count
    return {
        "errors": np.asarray(total.errors).tolist(),
        "mass": np.asarray(total.mass).tolist(),
        "tokens": rows * walk.tokens.shape[1],
    }


def divergences(walk: Walk, head: Head) -> list[float]:
    """KL(reference || stream) of every layer with experts, in nats a token."""
    plan, layers = walk.plan, len(walk.config.sparse_layers)
    states = walk.states(walk.config.num_hidden_layers)
    found = np.zeros(layers)
    for row in range(plan.probes):
        first = plan.text + row
        reference = jnp.asarray(states.read(first, first + 1)[0])
        for index in range(layers):
            first = plan.stream(index) + row
            stream = jnp.asarray(states.read(first, first + 1)[0])
            found[index] += divergence(head, reference, stream, walk.config.rms_norm_eps)
    return (found / (plan.probes * walk.tokens.shape[1])).tolist()
