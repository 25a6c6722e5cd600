"""Prefill of a prompt by Qwen3-30B-A3B (random weights): tokens per second, rate of the experts.

    python benchmarks/prefill.py --tokens 2048 --chunk 2048 --expert-bits 4

The engine's own jitted program runs the prompt in chunks. ``expert_tflops`` counts the useful
operations of the experts' products, 2 * assignments * weights of an expert, over the time of the
expert kernels by the GPU's own clock; ``matmul_tflops``, the ceiling, is a large bfloat16 product
measured in the same run. The last line is JSON.
"""

import argparse
import json
import statistics
from typing import Any

import full_size
import jax
import jax.numpy as jnp
import numpy as np
from environment import describe, seconds_of
from gpu import kernels_of

from dynaexq_jax.engine.programs import Programs, split_params
from dynaexq_jax.engine.prompt import Prompt, padded_tokens
from dynaexq_jax.engine.sampling import SamplingParams
from dynaexq_jax.engine.state import EngineState
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from pallas_kernels.pages import PagedExperts

EXPERT_KERNELS = ("expert", "moe")
"""Parts of the names of the kernels that multiply experts."""


def main() -> None:
    """Measures every chunk size asked for and prints a table, then JSON."""
    options = _parse()
    model, _, experts = full_size.random_model(options)
    ceiling = _matmul_flops()
    print(f"matmul {ceiling / 1e12:.0f} TFLOP/s", describe(), flush=True)
    rows = []
    for chunk in options.chunk:
        rows.append(_measure(model, experts, chunk, options))
        print(rows[-1], flush=True)
    print(json.dumps({"matmul_tflops": ceiling / 1e12, **describe(), "prefill": rows}))


def _measure(
    model: Qwen3Moe, experts: PagedExperts, chunk: int, options: argparse.Namespace
) -> dict[str, Any]:
    config = model.config
    programs, params = Programs(model), split_params(model)
    state = EngineState.allocate(config, batch=1, context=options.tokens, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, options.tokens, dtype=np.int32)
    (device,), slot = state.counter.devices(), jnp.int32(0)

    def run() -> Any:
        nonlocal state
        prompt = Prompt.send(
            tokens,
            padded=padded_tokens(options.tokens, chunk),
            max_tokens=1,
            sampling=SamplingParams(),
            device=device,
        )
        for _ in range(0, options.tokens, chunk):
            state, prompt, logits = programs.prefill(
                params, experts, state, prompt, slot, chunk=chunk
            )
        return logits

    (compile_s,) = seconds_of(run, 1)
    print(f"chunks of {chunk}: compiled and run once in {compile_s:.1f} s", flush=True)
    seconds = seconds_of(run, options.repeats)
    kernels = kernels_of(run)
    of_experts = sum(
        count * us
        for name, (count, us) in kernels.items()
        if any(part in name for part in EXPERT_KERNELS)
    )
    weights = 3 * config.hidden_size * config.moe_intermediate_size
    assignments = options.tokens * config.num_experts_per_tok * len(config.sparse_layers)
    prefill_s = statistics.median(seconds)
    return {
        "device": jax.devices()[0].device_kind,
        "tokens": options.tokens,
        "chunk": chunk,
        "expert_bits": options.expert_bits,
        "promoted": options.promoted,
        "group_size": options.group_size,
        "scale_encoding": options.scale_encoding,
        "dense_bits": options.dense_bits,
        "routing": options.routing,
        "prefill_ms": round(prefill_s * 1e3, 1),
        "tokens_per_s": round(options.tokens / prefill_s),
        "launches": sum(count for count, _ in kernels.values()),
        "expert_ms": round(of_experts / 1e3, 1),
        "expert_tflops": round(2 * assignments * weights / (of_experts * 1e-6) / 1e12, 1)
        if of_experts
        else None,
        "compile_s": round(compile_s, 1),
        "kernels": {
            name: [count, round(us, 1)]
            for name, (count, us) in sorted(
                kernels.items(), key=lambda item: -item[1][0] * item[1][1]
            )[:12]
        },
    }


def _matmul_flops() -> float:
    """Operations a second of a square bfloat16 product on random data."""
    size = 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    times = [sum(count * us for count, us in kernels_of(lambda: product(a, b)).values())]
    if not times[0]:
        return float("nan")
    return 2 * size**3 / (statistics.median(times) * 1e-6)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, nargs="+", default=[2048])
    full_size.add_model_options(parser)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
