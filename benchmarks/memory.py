"""The plan of memory against what the device says, for budgets, batches and contexts.

    python benchmarks/memory.py --budget 16 20 24 32 48 72 --batch 1 8 --context 2048 --out OUT

Each combination is a process of its own, with the allocator held to the budget, that loads
Qwen3-30B-A3B with random weights, reads prompts and decodes while experts are promoted. A budget
that is too small must be refused with nothing allocated. The last line is JSON.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.errors import InputError
from dynaexq_jax.report.table import text_table
from dynaexq_jax.units import parse_bytes

PROMPT, TOKENS = 1024, 48
SEQUENCES = 4
"""At most, of a run: memory is that of all slots anyway."""
COLUMNS = ("budget_gib", "batch", "context", "base_bits", "pool_pages", "planned_gib", "peak_gib",
           "peak_of_plan", "pages_moved", "refused")  # fmt: skip


def main() -> None:
    """Runs every combination, prints a table, then JSON."""
    options = _parse()
    if options.one:
        print(json.dumps(_one(options.budget[0], options.batch[0], options.context[0], options)))
        return
    rows = []
    for budget, batch, context in itertools.product(options.budget, options.batch, options.context):
        command = [
            sys.executable, __file__, "--one", "--budget", str(budget), "--batch", str(batch),
            "--context", str(context), "--layers", str(options.layers),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    cells = [[str(row.get(name, "")) for name in COLUMNS] for row in rows]
    print(text_table(list(COLUMNS), cells))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps({"benchmark": "memory", "runs": rows}))


def _one(budget: float, batch: int, context: int, options: argparse.Namespace) -> dict[str, Any]:
    budget_bytes = parse_bytes(f"{budget}GiB")
    prepare_device(budget_bytes)
    import full_size
    import jax
    import numpy as np
    from environment import describe
    from random_source import RandomSource

    from dynaexq_jax.serving.config import ServeConfig
    from dynaexq_jax.serving.loading import build_engine

    config = full_size.config(options.layers)
    shares = full_size.popularity_by_domain("zipf", len(config.sparse_layers), config.num_experts)
    source = RandomSource.make(config, shares)
    serve = ServeConfig(hbm_budget=budget_bytes, batch=batch, context=context, interval=8)
    row: dict[str, Any] = {**describe(), "budget_gib": budget, "batch": batch, "context": context}
    try:
        engine, plan = build_engine(source, serve)
    except InputError as error:
        return {**row, "refused": str(error), "peak_gib": _gib(_peak(jax.devices()[0]))}
    rng = np.random.default_rng(0)
    length = min(PROMPT, context - TOKENS)
    for _ in range(min(batch, SEQUENCES)):
        engine.add(rng.integers(0, config.vocab_size, length).tolist(), max_tokens=TOKENS)
    for _ in engine.run():
        pass
    peak = _peak(jax.devices()[0])
    counters = engine.controller.counters if engine.controller else None
    return {
        **row,
        "base_bits": plan.base_bits,
        "pool_pages": plan.pool_pages,
        "planned_gib": _gib(plan.total_bytes),
        "peak_gib": _gib(peak),
        "peak_of_plan": None if peak is None else round(peak / plan.total_bytes, 4),
        "within_budget": None if peak is None else peak <= budget_bytes,
        "pages_moved": counters.pages if counters else 0,
        "rows_gib": {name: _gib(size) for name, size in plan.rows.items()},
    }


def _peak(device: Any) -> int | None:
    """None where the backend does not say, as on a CPU."""
    stats = device.memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats else None


def _gib(size: float | None) -> float | None:
    return None if size is None else round(size / 2**30, 3)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, nargs="+", default=[16, 20, 24, 32, 48, 72])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, nargs="+", default=[2048])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("out/memory"))
    parser.add_argument("--one", action="store_true", help="this process runs the combination")
    return parser.parse_args()


if __name__ == "__main__":
    main()
