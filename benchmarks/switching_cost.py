"""What switching costs: the rate of promotions, and decode steps while precision moves.

    python benchmarks/switching_cost.py --base-bits 2 --pages 1536 --batch 8 --out OUT

Three parts, in one process, on Qwen3-30B-A3B with random weights (``random_source``):

1. the rate at which this machine copies page-locked memory to the device: the ceiling;
2. a plan that fills the pool, carried out with nothing else to do: bytes a second of promotions;
3. a full batch that decodes, while every I steps N experts change places with N others, for some
   I and N, up to a new plan as soon as the last is carried out; the same, waiting for each copy.

Steps are seen by the caller of ``Engine.step``. The last line is JSON.
"""

import argparse
import collections
import dataclasses
import json
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import full_size
import jax
import numpy as np
from environment import describe
from random_source import RandomSource
from timeline import draw, record

from dynaexq_jax.bank import ExpertBank, HostPages
from dynaexq_jax.controller import ControllerConfig
from dynaexq_jax.engine.engine import Engine
from dynaexq_jax.migration import Migration, MigrationConfig
from dynaexq_jax.policy import Plan, PolicyInput
from dynaexq_jax.report.table import text_table
from dynaexq_jax.residency import Residency
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import build_engine
from pallas_kernels.levels import LEVEL_BITS, level_of_bits

PINNED_BYTES = 2**28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Churn:
    """A policy that lets ``changes`` random experts give their pages to as many others.

    Its first plan gives every page of the pool to somebody.
    """

    changes: int
    name: str = "churn"
    waits_for_copies: bool = False

    def plan(self, given: PolicyInput, /) -> Plan:
        """Random, but a function of the input: the levels are the seed."""
        rng = np.random.default_rng(zlib.crc32(given.levels.tobytes()))
        wanted = given.levels.copy()
        if not np.any(wanted > given.base_level):
            count = given.pool_pages // int(given.step_pages[given.base_level])
            wanted.flat[rng.permutation(wanted.size)[:count]] += 1
            return Plan.between(given.levels, wanted, rng.random(wanted.shape))
        high = np.flatnonzero(wanted > given.base_level)
        low = np.flatnonzero(wanted == given.base_level)
        count = min(self.changes, high.size, low.size)
        wanted.flat[rng.permutation(high)[:count]] = given.base_level
        wanted.flat[rng.permutation(low)[:count]] = given.base_level + 1
        return Plan.between(given.levels, wanted, rng.random(wanted.shape))


def main() -> None:
    """Measures all parts and prints tables, then JSON."""
    options = _parse()
    config = full_size.config(options.layers)
    shares = full_size.popularity_by_domain("zipf", len(config.sparse_layers), config.num_experts)
    source = RandomSource.make(config, shares)
    serve = ServeConfig(
        base_bits=options.base_bits, pages=options.pages, policy="off", batch=options.batch,
        context=options.context, chunk=options.prompt,
    )  # fmt: skip
    engine, plan = build_engine(source, serve)
    assert isinstance(engine.bank, ExpertBank)
    host = HostPages.read(source, (LEVEL_BITS[level_of_bits(plan.base_bits) + 1],))
    print(describe(), plan.rows, flush=True)
    copy = _pinned_rate()
    rates = [
        _promotion_rate(engine.bank, host, MigrationConfig(staging_pages=p, staged_batches=b), copy)
        for p, b in options.staging
    ]
    print(text_table(list(rates[0]), [[str(v) for v in row.values()] for row in rates]), flush=True)
    rows = []
    for interval, changes, waits in _cases(options):
        rows.append(_decode(engine, interval, changes, waits, options))
        print(rows[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    _draw_timeline(engine, options)
    result = {
        "benchmark": "switching_cost", **describe(), "batch": options.batch,
        "pages": options.pages, "page_bytes": source.format.page_bytes,
        "pinned_gb_s": copy / 1e9, "promotion": rates, "decode": rows, "peak_bytes": _peak(),
        "planned_bytes": plan.total_bytes,
    }  # fmt: skip
    (options.out / "switching_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _pinned_rate() -> float:
    """Bytes a second of one large copy from page-locked memory."""
    device = jax.devices()[0]
    pinned, target = (
        jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        for kind in ("pinned_host", "device")
    )
    array = jax.device_put(np.ones(PINNED_BYTES // 4, np.uint32), pinned)
    seconds = []
    for _ in range(7):
        jax.block_until_ready(array)
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(array, target, may_alias=False))
        seconds.append(time.perf_counter() - start)
    return PINNED_BYTES / statistics.median(seconds)


def _migration(
    bank: ExpertBank, host: HostPages, config: MigrationConfig
) -> tuple[Residency, Migration]:
    """With everybody at the base."""
    experts = bank.experts
    residency = Residency(
        layers=experts.layers, experts=experts.experts, base_bits=experts.base_bits,
        pool_pages=experts.pool_pages,
    )  # fmt: skip
    bank.publish(residency.table)
    return residency, Migration(host=host, residency=residency, bank=bank, config=config)


def _promotion_rate(
    bank: ExpertBank, host: HostPages, config: MigrationConfig, ceiling: float
) -> dict[str, Any]:
    residency, migration = _migration(bank, host, config)
    base = residency.levels()
    count = residency.pool_pages // residency.pages_of_level[residency.base_level + 1]
    seconds = []
    for turn in range(3):
        wanted = base.copy()
        wanted.flat[np.random.default_rng(turn).permutation(base.size)[:count]] += 1
        migration.submit(Plan.between(residency.levels(), wanted, np.ones(base.shape)))
        before = migration.counters.bytes
        start = time.perf_counter()
        migration.drain()
        jax.block_until_ready(bank.experts.pool)
        moved = migration.counters.bytes - before
        seconds.append((time.perf_counter() - start) / moved)
    migration.close()
    bank.publish(np.full_like(residency.table, -1))
    rate = 1 / statistics.median(seconds)
    return {
        "pages a batch": config.staging_pages,
        "batches": config.staged_batches,
        "GB/s": round(rate / 1e9, 2),
        "share of the copy": round(rate / ceiling, 3),
        "bytes": moved,
    }


def _cases(options: argparse.Namespace) -> list[tuple[int, int, bool]]:
    """(interval, changes of a plan, waits for copies): nothing moving first and last."""
    moving = [(interval, n, False) for interval in options.interval for n in options.changes]
    return [(16, 0, False), *moving, *((i, n, True) for i, n, _ in moving), (16, 0, False)]


def _restart(engine: Engine, interval: int, changes: int, waits: bool) -> None:
    """Fills the pool; from there on experts change places."""
    assert engine.controller is not None
    engine.controller.config = ControllerConfig(interval=interval, max_transitions=max(changes, 1))
    engine.controller.restart(Churn(changes=changes, waits_for_copies=waits))


def _start(engine: Engine, options: argparse.Namespace, steps: int) -> None:
    """Fills every slot with a sequence of ``steps`` tokens and gets the prompts out of the way."""
    rng = np.random.default_rng(0)
    for _ in range(options.batch):
        prompt = rng.integers(0, engine.model_config.vocab_size, options.prompt)
        engine.add(prompt.tolist(), max_tokens=steps)
    started: set[int] = set()
    while len(started) < options.batch:
        started |= {event.sequence for event in engine.step()}


def _decode(
    engine: Engine, interval: int, changes: int, waits: bool, options: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    _restart(engine, interval, changes, waits)
    _start(engine, options, options.steps + 2 * options.batch)
    counters = dataclasses.replace(engine.controller.counters)
    stamps = [time.perf_counter()]
    for _ in range(options.steps):
        engine.step()
        stamps.append(time.perf_counter())
    moved = engine.controller.counters
    collections.deque(engine.run(), maxlen=0)
    steps = np.diff(stamps)[4:] * 1e3
    seconds = stamps[-1] - stamps[0]
    return {
        "interval": interval,
        "changes": changes,
        "waits": waits,
        "tokens_per_s": round(options.batch * options.steps / seconds, 1),
        "step_p50_ms": round(float(np.percentile(steps, 50)), 3),
        "step_p95_ms": round(float(np.percentile(steps, 95)), 3),
        "step_p99_ms": round(float(np.percentile(steps, 99)), 3),
        "pages": moved.pages - counters.pages,
        "gb_s": round((moved.bytes - counters.bytes) / seconds / 1e9, 2),
        "cancelled": moved.cancelled - counters.cancelled,
    }


def _draw_timeline(engine: Engine, options: argparse.Namespace) -> None:
    """A picture of some steps during the heaviest switching."""
    _restart(engine, 1, max(options.changes), False)
    _start(engine, options, 60 + 2 * options.batch)

    def steps() -> Any:
        for _ in range(12):
            engine.step()
        return engine.state

    timeline = record(steps)
    collections.deque(engine.run(), maxlen=0)
    if timeline.kernels:
        title = f"decode steps of {options.batch} sequences while every plan moves pages"
        draw(timeline, options.out / "switching_timeline.png", title)


def _peak() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def _parse() -> argparse.Namespace:
    def pair(text: str) -> tuple[int, int]:
        pages, batches = text.split("x")
        return int(pages), int(batches)

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-bits", type=int, choices=(2, 4), default=2)
    parser.add_argument("--pages", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--context", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--interval", type=int, nargs="+", default=[200, 16, 1])
    parser.add_argument("--changes", type=int, nargs="+", default=[256])
    parser.add_argument("--staging", type=pair, nargs="+", default=[(16, 2), (16, 4), (32, 4)],
                        metavar="PAGESxBATCHES")  # fmt: skip
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("out/switching"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
