"""What switching costs: the rate of promotions, and decode steps while precision moves.

    python benchmarks/switching_cost.py --base-bits 2 --pages 1536 --batch 8 --out OUT
    python benchmarks/switching_cost.py --staging 16x4 16x8 32x4 32x8 64x4 --out OUT
    python benchmarks/switching_cost.py --small --out OUT      # a tiny shape, on a CPU

All in one process, on Qwen3-30B-A3B with random weights (``random_source``):

1. the rate at which this machine copies page-locked memory to the device: the ceiling;
2. a full batch that decodes while nothing moves, first and last;
3. for every way of staging (pages of a batch x batches at once): plans that fill the pool, carried
   out with nothing else to do: bytes a second of promotions; then a full batch that decodes while
   every I steps N experts change places with N others, for some I and N, up to a new plan as soon
   as the last is carried out;
4. with the last of them the same, waiting for each copy;
5. on a GPU, a trace of steps of which some read a prompt, under the heaviest switching: how long no
   kernel ran while pages were copied, and a picture.

Steps are seen by the caller of ``Engine.step``; the hold is what of it ``Controller.advance``
takes: reading statistics, planning, and moving pages. The last line is JSON.
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
from timeline import Idle, Timeline, draw, record

from dynaexq_jax.bank import ExpertBank, HostPages
from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.controller import Controller, ControllerConfig
from dynaexq_jax.engine.engine import Engine
from dynaexq_jax.migration import Migration, MigrationConfig
from dynaexq_jax.policy import Plan, PolicyInput
from dynaexq_jax.report.table import text_table
from dynaexq_jax.residency import Residency
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import build_engine
from pallas_kernels.levels import LEVEL_BITS, level_of_bits

SMALL_DEFAULTS = {
    "layers": 4,
    "pages": 32,
    "batch": 4,
    "prompt": 32,
    "context": 256,
    "steps": 100,
    "interval": [16, 1],
    "changes": [8],
}
"""Of a model and of steps that a CPU runs in a minute."""
PINNED_BYTES = 2**28
TURNS = 5
"""Plans that the rate of promotions is the median of."""
TRACED_STEPS = 24
"""Of the timeline: four or five times from one plan to the next."""


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
    prepare_device(None)
    config = full_size.config(options.layers, small=options.small)
    shares = full_size.popularity_by_domain("zipf", len(config.sparse_layers), config.num_experts)
    source = RandomSource.make(config, shares)
    serve = ServeConfig(
        base_bits=options.base_bits, pages=options.pages, policy="off", batch=options.batch,
        context=options.context, chunk=options.prompt,
    )  # fmt: skip
    copy = _pinned_rate()
    engine, plan = build_engine(source, serve)
    host = HostPages.read(source, (LEVEL_BITS[level_of_bits(plan.base_bits) + 1],))
    print(describe(), plan.rows, flush=True)
    print(f"page-locked memory to the device: {copy / 1e9:.1f} GB/s", flush=True)
    default = MigrationConfig.of(page_bytes=source.format.page_bytes, pool_pages=options.pages)
    moving = [(interval, n) for interval in options.interval for n in options.changes]
    rates: list[dict[str, Any]] = []
    still, rows = [_decode(engine, 16, 0, False, options)], []
    for staging in options.staging or [default]:
        residency, migration = _migration(engine.bank, host, staging)
        rates.append(_row_of(staging) | _promotion_rate(engine.bank, residency, migration, copy))
        print(rates[-1], flush=True)
        engine.controller = _controller(source, residency, migration)
        for interval, changes in moving:
            row = _decode(engine, interval, changes, False, options)
            rows.append(_row_of(staging) | row)
            print(rows[-1], flush=True)
    for interval, changes in moving:
        rows.append(_row_of(staging) | _decode(engine, interval, changes, True, options))
        print(rows[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    still.append(_decode(engine, 16, 0, False, options))
    for row in rows:
        row["p99_of_still"] = round(
            2 * row["step_p99_ms"] / sum(s["step_p99_ms"] for s in still), 3
        )
    for table in (rates, still, rows):
        print(text_table(list(table[0]), [[str(v) for v in row.values()] for row in table]))
    result = {
        "benchmark": "switching_cost", **describe(), "batch": options.batch,
        "pages": options.pages, "page_bytes": source.format.page_bytes,
        "pinned_gb_s": copy / 1e9, "promotion": rates, "still": still, "decode": rows,
    }  # fmt: skip
    if timeline := _timeline(engine, options):
        idle = Idle.of(timeline)
        copies = len(timeline.page_copies)
        print(f"{TRACED_STEPS} steps, {copies} copies of pages: no kernel for {idle.total:.2f} ms, "
              f"of which {idle.beside_copies:.2f} beside copies")  # fmt: skip
        result["trace"] = {"copies": copies, "idle_ms": round(idle.total, 3),
                           "idle_beside_copies_ms": round(idle.beside_copies, 3)}  # fmt: skip
        title = f"steps of {options.batch} sequences, some of which read a prompt, while pages move"
        draw(timeline, options.out / "switching_timeline.png", title)
    (options.out / "switching_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _row_of(staging: MigrationConfig) -> dict[str, str]:
    sizes = staging.staging_pages, staging.staged_batches
    return {"staging": "x".join(map(str, sizes))}


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


def _controller(source: RandomSource, residency: Residency, migration: Migration) -> Controller:
    return Controller(
        policy=Churn(changes=0),
        residency=residency,
        pages_of_level=residency.pages_of_level[: residency.base_level + 2],
        migration=migration,
        benefit=source.benefit[:, : residency.base_level + 1],
        config=ControllerConfig(),
    )


def _promotion_rate(
    bank: ExpertBank, residency: Residency, migration: Migration, ceiling: float
) -> dict[str, Any]:
    base = residency.levels()
    count = residency.pool_pages // residency.pages_of_level[residency.base_level + 1]
    rates = []
    for turn in range(TURNS + 1):
        wanted = base.copy()
        wanted.flat[np.random.default_rng(turn).permutation(base.size)[:count]] += 1
        migration.submit(Plan.between(residency.levels(), wanted, np.ones(base.shape)))
        before = migration.counters.bytes
        start = time.perf_counter()
        migration.drain()
        jax.block_until_ready(bank.experts.pool)
        rates.append((migration.counters.bytes - before) / (time.perf_counter() - start))
    migration.submit(Plan.between(residency.levels(), base, np.ones(base.shape)))
    migration.advance()
    rate = statistics.median(rates[1:])  # the first has compiled, and kept what it was given before
    return {"gb_s": round(rate / 1e9, 2), "share_of_pinned": round(rate / ceiling, 3)}


def _restart(engine: Engine, interval: int, changes: int, waits: bool) -> None:
    """Fills the pool; from there on experts change places."""
    assert engine.controller is not None
    engine.controller.config = ControllerConfig(interval=interval, max_transitions=max(changes, 1))
    engine.controller.restart(Churn(changes=changes, waits_for_copies=waits))


def _start(engine: Engine, options: argparse.Namespace, steps: int) -> list[int]:
    """Fills every slot with a sequence of ``steps`` tokens and gets the prompts out of the way.

    Returns their numbers.
    """
    rng = np.random.default_rng(0)
    numbers = [
        engine.add(_prompt(engine, rng, options.prompt), max_tokens=steps)
        for _ in range(options.batch)
    ]
    started: set[int] = set()
    while len(started) < options.batch:
        started |= {event.sequence for event in engine.step()}
    return numbers


def _prompt(engine: Engine, rng: np.random.Generator, tokens: int) -> np.ndarray:
    return rng.integers(0, engine.model_config.vocab_size, tokens)


def _decode(
    engine: Engine, interval: int, changes: int, waits: bool, options: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    _restart(engine, interval, changes, waits)
    _start(engine, options, options.steps + 2 * options.batch)
    holds = _timed_advance(engine.controller)
    counters = dataclasses.replace(engine.controller.counters)
    stamps = [time.perf_counter()]
    for _ in range(options.steps):
        engine.step()
        stamps.append(time.perf_counter())
    moved = engine.controller.counters
    del engine.controller.advance  # the class's own again
    collections.deque(engine.run(), maxlen=0)
    steps = np.diff(stamps)[4:] * 1e3
    seconds = stamps[-1] - stamps[0]
    return {
        "interval": interval,
        "changes": changes,
        "waits": waits,
        "tokens_per_s": round(options.batch * options.steps / seconds, 1),
        **_percentiles("step", steps, (50, 95, 99)),
        **_percentiles("hold", 1e3 * np.array(holds[4:]), (50, 99)),
        "pages": moved.pages - counters.pages,
        "gb_s": round((moved.bytes - counters.bytes) / seconds / 1e9, 2),
        "cancelled": moved.cancelled - counters.cancelled,
    }


def _timed_advance(controller: Any) -> list[float]:
    """Seconds of every call of ``controller.advance`` from now on."""
    seconds: list[float] = []
    advance = controller.advance

    def timed(*, during_chunk: bool = False) -> None:
        start = time.perf_counter()
        advance(during_chunk=during_chunk)
        seconds.append(time.perf_counter() - start)

    controller.advance = timed
    return seconds


def _percentiles(name: str, values_ms: np.ndarray, which: tuple[int, ...]) -> dict[str, float]:
    return {
        f"{name}_p{percent}_ms": round(float(np.percentile(values_ms, percent)), 3)
        for percent in which
    }


def _timeline(engine: Engine, options: argparse.Namespace) -> Timeline | None:
    """Of steps during the heaviest switching, while a prompt of two chunks is read twice.

    None without a GPU.
    """
    _restart(engine, 1, max(options.changes), False)
    numbers = _start(engine, options, 60 + 2 * options.batch)
    engine.cancel(numbers.pop())  # the first time it is compiled
    rng = np.random.default_rng(1)

    def steps() -> Any:
        for step in range(TRACED_STEPS):
            if step % (TRACED_STEPS // 2) == 4:
                engine.cancel(numbers.pop())
                prompt = _prompt(engine, rng, 2 * options.prompt)
                numbers.insert(0, engine.add(prompt, max_tokens=4))
            engine.step()
        return engine.state

    timeline = record(steps)
    collections.deque(engine.run(), maxlen=0)
    return timeline if timeline.kernels else None


def _parse() -> argparse.Namespace:
    def staging(text: str) -> MigrationConfig:
        pages, batches = text.split("x")
        return MigrationConfig(staging_pages=int(pages), staged_batches=int(batches))

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-bits", type=int, choices=(2, 4), default=2)
    parser.add_argument("--pages", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--context", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--interval", type=int, nargs="+", default=[200, 16, 1])
    parser.add_argument("--changes", type=int, nargs="+", default=[256])
    parser.add_argument("--staging", type=staging, nargs="+", metavar="PAGESxBATCHES",
                        help="default: as for serving")  # fmt: skip
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--small", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=Path("out/switching"))
    options = parser.parse_args()
    if options.small:
        parser.set_defaults(**SMALL_DEFAULTS)
        options = parser.parse_args()
    return options


if __name__ == "__main__":
    main()
