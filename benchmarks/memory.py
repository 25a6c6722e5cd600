"""The plan of memory against what the device says, for budgets, batches and contexts.

    python benchmarks/memory.py --out OUT
    python benchmarks/memory.py --budgets 16 24 --shapes 1x2048 8x2304 --room 120 --out OUT

Each combination of a budget and a shape (batch x context) is a process of its own, with the
allocator held to the budget, that loads Qwen3-30B-A3B, reads prompts and decodes while experts are
promoted. Weights are random, but pages and scales are zero: bytes do not depend on them. So many
processes run at once as the device has room for. A budget that is too small must be refused with
nothing allocated.

OUT/memory.jsonl gains a line as soon as a combination is done; what is there already is not run
again. The last line of stdout is JSON.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from run_file import read_runs

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.errors import InputError
from dynaexq_jax.report.table import text_table
from dynaexq_jax.units import parse_bytes

PROMPT, TOKENS, INTERVAL = 600, 16, 2
"""Two chunks a prompt; pages are on their way while the next prompt is read."""
OUTSIDE_GIB = 1
"""What a process takes of the device beside what the allocator hands out."""
SEQUENCES = 3
"""Of a run: memory is that of all slots anyway."""
COLUMNS = ("budget_gib", "batch", "context", "base_bits", "pool_pages", "planned_gib", "peak_gib",
           "peak_of_plan", "within_budget", "pages_moved", "seconds", "refused")  # fmt: skip


class Shape(NamedTuple):
    """Of the engine."""

    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Reads BATCHxCONTEXT."""
        batch, context = text.split("x")
        return cls(int(batch), int(context))


class Case(NamedTuple):
    """One process."""

    budget_gib: float
    shape: Shape

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Case":
        """That of a row."""
        return cls(row["budget_gib"], Shape(row["batch"], row["context"]))

    def name(self) -> dict[str, float]:
        """What tells its row from others."""
        return {"budget_gib": self.budget_gib, **self.shape._asdict()}


def main() -> None:
    """Runs every combination, prints a table, then JSON."""
    options = _parse()
    if options.one:
        print(json.dumps(_one(Case(options.budgets[0], options.shapes[0]), options)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "memory.jsonl"
    done = {case for case, row in _rows(file).items() if "failed" not in row}
    cases = itertools.starmap(Case, itertools.product(options.budgets, options.shapes))
    for row in _run([case for case in cases if case not in done], options):
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        print(row, flush=True)
    rows = [row for _, row in sorted(_rows(file).items())]
    cells = [[str(row.get(name, "")) for name in COLUMNS] for row in rows]
    print(text_table(list(COLUMNS), cells))
    print(json.dumps({"benchmark": "memory", "runs": rows}))


def _rows(file: Path) -> dict[Case, dict[str, Any]]:
    """The last row of each case."""
    return {Case.of(row): row for row in read_runs(file)}


def _run(cases: list[Case], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The row of each case when it is done; so many at once as there is room for.

    The first runs alone, so that the others find what it has compiled and tuned.
    """
    waiting = list(cases)
    running: dict[Case, tuple[subprocess.Popen[str], float]] = {}
    first = True
    while waiting or running:
        taken = sum(case.budget_gib + OUTSIDE_GIB for case in running)
        fitting = [c for c in waiting if taken + c.budget_gib + OUTSIDE_GIB <= options.room]
        if (fitting or not running) and len(running) < (1 if first else options.jobs):
            case = (fitting or waiting)[0]
            waiting.remove(case)
            running[case] = (_start(case, options), time.perf_counter())
            continue
        for case, (process, started) in list(running.items()):
            if process.poll() is not None:
                del running[case]
                first = False
                seconds = round(time.perf_counter() - started, 1)
                yield _row(case, process, options) | {"seconds": seconds}
        time.sleep(0.1)


def _start(case: Case, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [
        sys.executable, __file__, "--one", "--budgets", str(case.budget_gib), "--shapes",
        f"{case.shape.batch}x{case.shape.context}", "--layers", str(options.layers),
        *(["--small"] if options.small else []),
    ]  # fmt: skip
    with _log(case, options).open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


def _row(case: Case, process: subprocess.Popen[str], options: argparse.Namespace) -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode:
        return {**case.name(), "failed": _log(case, options).read_text(encoding="utf-8")[-1500:]}
    row: dict[str, Any] = json.loads(output.splitlines()[-1])
    return row


def _log(case: Case, options: argparse.Namespace) -> Path:
    path: Path = options.out / f"{case.budget_gib:g}GiB-{case.shape.batch}x{case.shape.context}.log"
    return path


def _one(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    budget_bytes = parse_bytes(f"{case.budget_gib}GiB")
    prepare_device(budget_bytes)
    import full_size
    import jax
    import numpy as np
    from environment import describe
    from random_source import BlankSource

    from dynaexq_jax.serving.config import ServeConfig
    from dynaexq_jax.serving.loading import build_engine

    config = full_size.config(options.layers, small=options.small)
    shares = full_size.popularity_by_domain("zipf", len(config.sparse_layers), config.num_experts)
    batch, context = case.shape
    serve = ServeConfig(hbm_budget=budget_bytes, batch=batch, context=context, interval=INTERVAL)
    row: dict[str, Any] = {**describe(), **case.name()}
    try:
        engine, plan = build_engine(BlankSource.make(config, shares), serve)
    except InputError as error:
        return {**row, "refused": str(error), "peak_gib": _gib(_peak(jax.devices()[0]))}
    rng = np.random.default_rng(0)
    length = min(PROMPT, context - TOKENS)
    for _ in range(SEQUENCES):
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=float, nargs="+", metavar="GIB",
                        default=[16, 20, 24, 32, 48, 72, 8])  # fmt: skip
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", metavar="BATCHxCONTEXT",
                        default=[Shape(1, 2048), Shape(8, 2304), Shape(4, 8192)])  # fmt: skip
    parser.add_argument("--room", type=float, default=125, metavar="GIB",
                        help="device memory that the runs may take at a time")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=6, help="runs at a time, at most")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--small", action="store_true", help="a tiny model, to check on a CPU")
    parser.add_argument("--out", type=Path, default=Path("out/memory"))
    parser.add_argument("--one", action="store_true", help="this process runs the combination")
    return parser.parse_args()


if __name__ == "__main__":
    main()
