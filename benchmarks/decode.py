"""Decoding speed at each level, start-up time, and the ceiling that memory sets.

    python benchmarks/decode.py CONVERTED [--source HF_DIR] [--tokens 128] [--repeats 5]

Batch 1, greedy, after a prompt of 32 tokens. Start-up is loading; compilation is the time of a
first, short run less that of the same run again. The ceiling is the bytes that a step must read
(dense weights, the pages and scales of its experts) over the machine's copy rate. Ends with one
line of JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from environment import copy_bytes_per_s, describe

from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.report.table import text_table
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import Served, load_served
from pallas_kernels.levels import PAGES_OF_BITS

PROMPT_TOKENS = 32


def main() -> None:
    """Times every precision and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("converted", type=Path, metavar="CONVERTED")
    parser.add_argument("--source", type=Path, metavar="HF_DIR", help="time it unquantized too")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.converted)
    quarter = len(checkpoint.layers) * checkpoint.experts // 4
    cases: dict[str, tuple[Path, ServeConfig]] = {
        f"{bits} bits": (arguments.converted, ServeConfig(base_bits=bits)) for bits in (2, 4, 8)
    }
    cases["2 bits, a quarter at 4"] = (
        arguments.converted,
        ServeConfig(base_bits=2, pages=quarter, policy="static-high"),
    )
    cases["dynamic, a quarter at 4"] = (
        arguments.converted,
        ServeConfig(base_bits=2, pages=quarter),
    )
    if arguments.source is not None:
        cases["bf16"] = (arguments.source, ServeConfig())

    rate = copy_bytes_per_s()
    rows, results = [], {}
    for name, (path, serve) in cases.items():
        start = time.perf_counter()
        served = load_served(path, serve)
        startup_s = time.perf_counter() - start
        compile_s = _run(served, 2) - _run(served, 2)
        speeds = [_speed(served, arguments.tokens) for _ in range(arguments.repeats)]
        speed = statistics.median(speeds)
        ceiling = rate / _bytes_per_step(served)
        rows.append(
            [
                name,
                f"{speed:.1f}",
                f"{ceiling:.0f}",
                f"{100 * speed / ceiling:.1f} %",
                f"{startup_s:.2f}",
                f"{compile_s:.2f}",
            ]
        )
        results[name] = {
            "tokens_per_s": speed,
            "ceiling_tokens_per_s": ceiling,
            "startup_s": startup_s,
            "compile_s": compile_s,
        }
    header = ["experts", "tokens/s", "ceiling", "share", "start-up s", "compile s"]
    print(f"copy rate {rate / 1e9:.1f} GB/s (read + write)")
    print(text_table(header, rows))
    facts = {"benchmark": "decode", "model": arguments.converted.name, **describe()}
    print(json.dumps({**facts, "copy_bytes_per_s": rate, "results": results}))


def _prompt(served: Served) -> np.ndarray:
    return np.random.default_rng(0).integers(0, served.config.vocab_size // 2, PROMPT_TOKENS)


def _run(served: Served, tokens: int) -> float:
    """Seconds of one prompt and its continuation."""
    start = time.perf_counter()
    served.engine.add(_prompt(served), max_tokens=tokens)
    for _ in served.engine.run():
        pass
    return time.perf_counter() - start


def _speed(served: Served, tokens: int) -> float:
    """Decoded tokens a second, from the first token to the last."""
    served.engine.add(_prompt(served), max_tokens=tokens)
    times = [time.perf_counter() for _ in served.engine.run()]
    return (len(times) - 1) / (times[-1] - times[0])


def _bytes_per_step(served: Served) -> float:
    """Dense weights and the chosen experts; the cache is small beside them."""
    config = served.config
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(served.engine.params))
    chosen = len(config.sparse_layers) * config.num_experts_per_tok
    if served.plan is None:
        expert = 2 * 3 * config.hidden_size * config.moe_intermediate_size
        return dense + chosen * expert
    fmt = served.engine.experts.format
    pages = PAGES_OF_BITS[served.plan.base_bits]
    if served.engine.controller is not None:
        pages += served.plan.pool_pages / (len(config.sparse_layers) * config.num_experts)
    return dense + chosen * (pages * fmt.page_bytes + fmt.scale_bytes)


if __name__ == "__main__":
    main()
