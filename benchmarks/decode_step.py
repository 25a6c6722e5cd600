"""One decode step of Qwen3-30B-A3B (random weights): time, tokens per second, launches, floor.

    python benchmarks/decode_step.py --batch 1 8 32 --context 1024 --expert-bits 4

The step is the engine's own jitted program: embedding, 48 layers, head, sampling. All slots are at
the end of their context. A step's inputs are drawn anew before each timed run, so that slots route
apart; ``experts`` is how many distinct ones a layer read, which the floor counts. The floor is the
bytes that must be read over the bandwidth of a copy measured in the same run. The last line is
JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import full_size
import jax
import jax.numpy as jnp
import numpy as np
from environment import describe
from gpu import copy_bandwidth, kernels_of

from dynaexq_jax.engine.programs import Programs, split_params
from dynaexq_jax.engine.state import BatchState, EngineState
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.trees import tree_bytes
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS
from pallas_kernels.pages import PagedExperts, levels_of_table

QUEUED = 8
"""Steps dispatched together, so that the host is not what is timed."""


def main() -> None:
    """Measures every combination asked for and prints a table, then JSON."""
    options = _parse()
    model, dense, experts = full_size.random_model(options)
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s", describe(), flush=True)
    rows = []
    for context in options.context:
        for batch in options.batch:
            row = _measure(model, dense, experts, batch, context, bandwidth, options)
            rows.append(row)
            print(row, flush=True)
    print(json.dumps({"copy_tb_s": bandwidth / 1e12, **describe(), "steps": rows}))


def _measure(
    model: Qwen3Moe, dense: Any, experts: PagedExperts, batch: int, context: int,
    bandwidth: float, options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    config = model.config
    programs, params = Programs(model), split_params(model)
    state = EngineState.allocate(config, batch=batch, context=context, dtype=jnp.bfloat16)
    rng = np.random.default_rng(batch)

    idle = jax.device_get(state.batch)

    def at_the_end() -> BatchState:
        """Fresh tokens at the last position of every slot, in arrays of their own."""
        tokens = rng.integers(0, config.vocab_size, batch, dtype=np.int32)
        full = np.full(batch, context - 1, np.int32)
        return jax.device_put(idle._replace(token=tokens, position=full, end=full.copy()))

    start = time.perf_counter()
    programs.decode.trace(params, experts, state, draws=False)
    trace_s = time.perf_counter() - start

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state = state._replace(batch=at_the_end())
            state, _ = programs.decode(params, experts, state, draws=False)
        jax.block_until_ready(state)

    start = time.perf_counter()
    run(1)
    first_s = time.perf_counter() - start
    run(2)
    seconds, dispatch = [], []
    for _ in range(options.repeats):
        inputs = [at_the_end() for _ in range(QUEUED)]
        jax.block_until_ready(inputs)
        start = time.perf_counter()
        for queued in inputs:
            state, _ = programs.decode(params, experts, state._replace(batch=queued), draws=False)
        dispatch.append((time.perf_counter() - start) / QUEUED)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - start) / QUEUED)
    before = np.asarray(state.stats.mass)
    run(1)
    read = (np.asarray(state.stats.mass) - before) > 0

    def step() -> Any:
        nonlocal state
        state = state._replace(batch=jax.block_until_ready(at_the_end()))
        state, tokens = programs.decode(params, experts, state, draws=False)
        return tokens

    kernels = kernels_of(step)
    floor = _bytes(dense, experts, read, batch, context, config) / bandwidth
    step_s = statistics.median(seconds)
    return {
        "device": jax.devices()[0].device_kind,
        "batch": batch,
        "context": context,
        "expert_bits": options.expert_bits,
        "promoted": options.promoted,
        "group_size": options.group_size,
        "scale_encoding": options.scale_encoding,
        "dense_bits": options.dense_bits,
        "routing": options.routing,
        "step_ms": round(step_s * 1e3, 3),
        "tokens_per_s": round(batch / step_s),
        "launches": sum(count for count, _ in kernels.values()),
        "floor_ms": round(floor * 1e3, 3),
        "share_of_floor": round(floor / step_s, 3),
        "experts": round(float(read.sum(axis=1).mean()), 1),
        "dispatch_ms": round(statistics.median(dispatch) * 1e3, 3),
        "kernels_ms": round(sum(count * us for count, us in kernels.values()) / 1e3, 3),
        "trace_s": round(trace_s, 1),
        "first_step_s": round(first_s, 1),
        "kernels": {
            name: [count, round(us, 1)]
            for name, (count, us) in sorted(
                kernels.items(), key=lambda item: -item[1][0] * item[1][1]
            )[:12]
        },
    }


def _bytes(
    dense: Any, experts: PagedExperts, read: np.ndarray, batch: int, context: int, config: Any
) -> float:
    """Bytes that a step must read: dense weights, the experts it uses, the cache, a row a slot."""
    fmt = experts.format
    levels = np.asarray(levels_of_table(np.asarray(experts.table), experts.base_bits))
    pages = np.asarray([PAGES_OF_BITS[bits] for bits in LEVEL_BITS])[levels]
    of_experts = float((read * (pages * fmt.page_bytes + fmt.scale_bytes)).sum())
    of_dense = sum(
        tree_bytes(weight) for name, weight in dense._asdict().items() if name != "embedding"
    )
    kv = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return of_dense + of_experts + batch * (context * kv + 2 * config.hidden_size)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    full_size.add_model_options(parser)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
