"""The calibrated conversion of one layer of Qwen3-30B-A3B, and what 48 of them would take.

    python benchmarks/conversion.py --layer [--experts N] [--tokens N]

Random weights and hidden states. Each part of the work is done once to compile it and once
more to measure it: one batch of tokens, with its hidden states read from a file and written back,
and one batch of experts. The layer is so many of each: as many tokens as 72 rows of 512 of ten
files, and the rows that are carried along to measure what layers are worth, as many as the middle
layer has. Left out: reading the source, writing the checkpoint, and the end (logits of the rows
that were carried).

The ceiling is the matrix products alone (of the quantizer: one product of all its weights with the
Hessian for each of its passes), at the rate of a large float32 product on this device.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from environment import describe, product_flops_per_s
from full_size import QWEN3_30B

from convert.calibration import experts as sums
from convert.calibration.block import Block
from convert.calibration.quantizing import experts_at_a_time, quantize_experts
from convert.calibration.rows import PROBE_ROWS, Run
from convert.calibration.text import DEFAULT_ROWS, DEFAULT_WINDOW
from convert.calibration.walk import TOKENS_PER_BATCH, Walk
from convert.cli import repeat_exactly
from convert.expert_units import ExpertUnits
from convert.joint import JointQuantizer
from convert.pipeline import DEFAULT_GROUP_SIZE, DEFAULT_SCALE_ENCODING
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.names import dense_shapes_of_layer
from dynaexq_jax.report.table import text_table
from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.pages import ExpertFormat, Matrices

LAYERS, FILES = QWEN3_30B["num_hidden_layers"], 10
EXPERTS, CHOSEN = QWEN3_30B["num_experts"], QWEN3_30B["num_experts_per_tok"]
VOCABULARY = 64
"""Of the random tokens: embedding and head are not measured."""


class Part(NamedTuple):
    """One kind of work."""

    name: str
    seconds: float
    """Of what was measured."""
    times: float
    """So often a layer."""
    operations: float
    """Floating-point operations of the products of a layer."""


def run(experts: int | None, tokens: int | None) -> None:
    """Measures, prints the table and the line of JSON."""
    repeat_exactly()
    on_cpu = jax.default_backend() == "cpu"
    experts = experts or (1 if on_cpu else EXPERTS)
    tokens = tokens or (DEFAULT_WINDOW if on_cpu else TOKENS_PER_BATCH)
    of_layer = {"num_hidden_layers": 1, "num_experts": experts, "vocab_size": VOCABULARY}
    chosen = min(experts, CHOSEN)
    config = ModelConfig.from_hf({**QWEN3_30B, **of_layer, "num_experts_per_tok": chosen})
    with tempfile.TemporaryDirectory() as folder:
        parts = _measure(config, tokens, Path(folder))
    rate = product_flops_per_s(1024 if on_cpu else 8192)
    rows = [
        [
            part.name,
            f"{part.seconds:.3f}",
            f"{part.times:.1f}",
            f"{part.seconds * part.times:.1f}",
            f"{part.operations / rate:.1f}",
        ]
        for part in parts
    ]
    layer_s = sum(part.seconds * part.times for part in parts)
    ceiling_s = sum(part.operations for part in parts) / rate
    rows.append(["layer", "", "", f"{layer_s:.1f}", f"{ceiling_s:.1f}"])
    print(f"{experts} experts, {tokens} tokens a batch; products at {rate / 1e12:.2f} TFLOP/s")
    print(text_table(["part", "measured s", "times", "layer s", "ceiling s"], rows))
    print(f"{LAYERS} layers: {LAYERS * layer_s / 60:.1f} minutes")
    facts = {"benchmark": "conversion_layer", "experts": experts, "tokens": tokens, **describe()}
    result = {
        "parts": {part.name: part.seconds * part.times for part in parts},
        "layer_s": layer_s,
        "ceiling_s": ceiling_s,
        "model_minutes": LAYERS * layer_s / 60,
    }
    print(json.dumps({**facts, **result}))


def _measure(config: ModelConfig, tokens: int, folder: Path) -> list[Part]:
    rng = np.random.default_rng(0)
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    text = FILES * DEFAULT_ROWS * DEFAULT_WINDOW
    carried = text + PROBE_ROWS * (1 + LAYERS // 2) * DEFAULT_WINDOW
    fmt = ExpertFormat(
        hidden=hidden,
        width=width,
        group_size=DEFAULT_GROUP_SIZE,
        scale_encoding=DEFAULT_SCALE_ENCODING,
        table=DEFAULT_TABLE,
    )

    def random(*shape: int) -> np.ndarray:
        return (0.03 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)

    rows = -(-tokens // DEFAULT_WINDOW)
    walk = Walk(
        config=config,
        tokens=rng.integers(0, VOCABULARY, (rows, DEFAULT_WINDOW), np.int32),
        folder=folder,
    )
    block = Block.load(
        config,
        0,
        {name: random(*shape) for name, shape in dense_shapes_of_layer(config, 0).items()},
    )
    walk.begin(random(VOCABULARY, hidden) * 30)
    plain = Matrices(
        [random(2 * width, hidden) for _ in range(experts)],
        [random(hidden, width) for _ in range(experts)],
    )
    quantizer = JointQuantizer()
    values = sums.values_of_levels(DEFAULT_TABLE)
    states = walk.states(1)
    batch = [Run(0, rows, 2)]
    parts: list[Part] = []

    def timed(name: str, times: float, operations: float, work: Callable[[], Any]) -> Any:
        jax.block_until_ready(work())
        start = time.perf_counter()
        result = jax.block_until_ready(work())
        parts.append(Part(name, time.perf_counter() - start, times, operations))
        return result

    per_token = (
        2
        * hidden
        * config.head_dim
        * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
        + 4 * DEFAULT_WINDOW * config.num_attention_heads * config.head_dim
    )
    all_rows = walk.states(0).rows * DEFAULT_WINDOW  # those of the reference, too
    timed("attention", carried / all_rows, carried * per_token, lambda: walk.attend(0, block))

    times, assignments = text / (rows * DEFAULT_WINDOW), text * CHOSEN
    # with fewer experts a token, too, is sent to fewer
    times *= CHOSEN / config.num_experts_per_tok
    of_matrix = 2 * hidden * width

    def inputs() -> sums.InputSums:
        found = sums.InputSums.zeros(experts, hidden)
        for _, x, count, _ in walk.batches(states, batch):
            found = sums.add_inputs(block, x, count, found)
        return found

    found = timed("Hessians of gate_up", times, assignments * 2 * hidden**2, inputs)

    def quantize(name: str, hessians: jax.Array) -> sums.QuantizedMatrices:
        matrices = getattr(plain, name)
        n, k = fmt.matrix_shapes[name]
        count = experts_at_a_time(n, k, experts)
        passes = len(quantizer.starts) * (1 + quantizer.rounds) + 2
        small = hessians[:count]
        units = ExpertUnits(fmt, count)
        arguments = (quantizer, fmt, name, matrices[:count], small, units, lambda: None)
        timed(
            f"quantizing {name}, {count} experts",
            EXPERTS / count,
            EXPERTS * passes * 2 * n * k**2,
            lambda: quantize_experts(*arguments),
        )
        codes = jnp.asarray(rng.integers(0, 256, (experts, n, k), np.uint8))
        return sums.QuantizedMatrices(codes, jnp.full((experts, k // fmt.group_size, n), 0.02))

    hessians = found.hessian
    del found
    gate_up = quantize("gate_up", hessians)
    del hessians

    def activations() -> jax.Array:
        hessian = jnp.zeros((experts, width, width))
        for _, x, count, _ in walk.batches(states, batch):
            hessian = sums.add_activations(
                block, x, count, gate_up, values[0], fmt.group_size, hessian
            )
        return hessian

    operations = assignments * (2 * of_matrix + 2 * width**2)
    down = quantize("down", timed("Hessians of down", times, operations, activations))
    quantized = Matrices(gate_up, down)

    def carry() -> jax.Array:
        largest = jnp.zeros(experts)
        for start, x, count, _ in walk.batches(states, batch):
            y, largest = sums.run_experts(
                block, x, count, quantized, values[0], fmt.group_size, largest
            )
            states.write(start, np.asarray(y)[:count])
        return largest

    share = carried / text
    timed("outputs", share * times, share * assignments * 3 * of_matrix, carry)
    stacked = Matrices(*(jnp.asarray(np.stack(matrices)) for matrices in plain))

    def errors() -> sums.ErrorSums:
        total = sums.ErrorSums.zeros(experts)
        for _, x, count, _ in walk.batches(states, batch):
            total = sums.add_errors(
                block, x, count, stacked, quantized, values, fmt.group_size, total
            )
        return total

    timed("errors by level", times / 8, assignments / 8 * 12 * of_matrix, errors)
    return parts
