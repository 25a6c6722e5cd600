"""Shifting traffic under every policy, on one engine: latencies, pages moved, hit share.

    python benchmarks/serve_shift.py --budget 24GiB --batch 8 --interval 200 --out out/
    python benchmarks/serve_shift.py --small --out out/        # a tiny shape, on a CPU

Qwen3-30B-A3B with random weights and pages in host memory, whose routing follows the domain of its
tokens (``full_size``). The traffic changes domain from phase to phase; every policy gets the same,
from the same start: all experts at the base. The hit share is the share of the router's mass that
met an expert above the base. ``static-mixed`` holds the best map for the hotness that the run of
``off`` recorded, the whole traffic known beforehand. ``dynamic-unread`` moves pages as ``dynamic``
does, but its steps read the base alone, as under ``off``: what switching itself costs.

Writes OUT/serve_shift.json, OUT/switching.json (a row a policy) and plots. The last line of stdout
is JSON.
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import full_size
import jax
import numpy as np
from environment import describe
from random_source import RandomSource
from shift_plots import write_plots
from shifting_traffic import Phase, Traffic

from dynaexq_jax.budget import MemoryPlan
from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.engine.engine import Engine
from dynaexq_jax.errors import InputError
from dynaexq_jax.measure.policies import run_policy, warm_up
from dynaexq_jax.measure.report import PolicyRun, run_json, runs_table
from dynaexq_jax.measure.requests import Request
from dynaexq_jax.measure.run import controller_of
from dynaexq_jax.measure.summary import hotness
from dynaexq_jax.models.names import DENSE_BITS
from dynaexq_jax.policy import Dynamic, DynamicConfig, Policy, StaticMixed, make_policy
from dynaexq_jax.report.table import plan_json, plan_table
from dynaexq_jax.residency import pages_of_levels
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import build_engine
from pallas_kernels.levels import LEVEL_BITS, level_of_bits

RECORDED = Path(__file__).resolve().parents[1] / "examples" / "nano-moe" / "routing.json"
UNREAD = "dynamic-unread"
POLICIES = (
    "off",
    "static-high",
    "static-mixed",
    "dynamic",
    "dynamic-no-hysteresis",
    UNREAD,
    "blocking",
)
SMALL_DEFAULTS = {
    "layers": 4,
    "pages": 32,
    "interval": 16,
    "batch": 4,
    "chunk": 32,
    "prompt": 32,
    "output": 32,
    "phases": ["0:16", "1:16", "2:16"],
    "routing": "zipf",
}
"""Of a model and of traffic that a CPU runs in a minute."""


def main() -> None:
    """Runs every policy, prints a table, writes JSON and plots."""
    options = _parse()
    try:
        serve = _serve(options)
        prepare_device(serve.budget_bytes)
        source = _source(options)
        requests = _traffic(options).requests(source.domains, source.config.vocab_size)
        engine, plan = build_engine(source, serve)
        controller_of(engine)
    except InputError as error:
        raise SystemExit(f"serve_shift: error: {error}") from error
    print(plan_table(plan))
    repeated = [_run_all(engine, plan, source, requests, options) for _ in range(options.repeats)]
    runs = _medians(repeated)
    print(runs_table(runs))
    rows = [_row(run, plan, options) for run in runs]
    result = {
        "benchmark": "serve_shift",
        **describe(),
        "options": {name: str(value) for name, value in vars(options).items()},
        "plan": plan_json(plan),
        "policies": [run_json(run) for run in runs],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serve_shift.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "switching.json").write_text(json.dumps(rows, indent=1) + "\n")
    write_plots(options.out, runs)
    print(json.dumps({"benchmark": "serve_shift", **describe(), "switching": rows}))


def _run_all(
    engine: Engine,
    plan: MemoryPlan,
    source: RandomSource,
    requests: list[Request],
    options: argparse.Namespace,
) -> list[PolicyRun]:
    warm_up(engine, requests)
    recorded: np.ndarray | None = None
    runs: list[PolicyRun] = []
    for name in options.policies:
        if name == "static-high" and not _fits_high(plan, source):
            print("static-high: the next level of all experts does not fit the pool, left out")
            continue
        with _unread(engine.bank) if name == UNREAD else contextlib.nullcontext():
            runs.append(run_policy(engine, _policy(name, recorded), requests))
        if name == "off":
            recorded = hotness(runs[-1].log)
        summary = runs[-1].summary
        print(f"{name}: {summary.tokens_per_s:.1f} tokens/s in {summary.seconds:.1f} s", flush=True)
    return runs


def _policy(name: str, recorded: np.ndarray | None) -> Policy:
    match name:
        case StaticMixed.name:
            assert recorded is not None
            return StaticMixed(hotness=recorded)
        case "dynamic-no-hysteresis":
            return Dynamic(name=name, config=DynamicConfig(margin=0, dwell=0))
        case "dynamic-unread":
            return Dynamic(name=name)
    return make_policy(name)


def _fits_high(plan: MemoryPlan, source: RandomSource) -> bool:
    """Whether every expert can hold the level above the base."""
    level = level_of_bits(plan.base_bits) + 1
    if level == len(LEVEL_BITS):
        return False
    pages = pages_of_levels(plan.base_bits)[level] * len(source.layers) * source.experts
    return plan.pool_pages >= pages


@contextlib.contextmanager
def _unread(bank: Any) -> Iterator[None]:
    """Pages are written to the pool, but the table that steps read has none of them."""
    commit, publish = bank.commit, bank.publish
    table = bank.experts.table
    # not filled by a program of its own, which would not be a graph
    nothing = jax.device_put(np.full(table.shape, -1, np.int32), bank.device)

    def unread(change: Callable[[Any], None], argument: Any) -> None:
        nonlocal table
        bank.experts = dataclasses.replace(bank.experts, table=table)
        change(argument)
        table = bank.experts.table
        bank.experts = dataclasses.replace(bank.experts, table=nothing)

    bank.commit, bank.publish = partial(unread, commit), partial(unread, publish)
    try:
        yield
    finally:
        del bank.commit, bank.publish
        bank.experts = dataclasses.replace(bank.experts, table=table)


def _medians(repeated: list[list[PolicyRun]]) -> list[PolicyRun]:
    """The run of each policy whose throughput is the median of its repeats."""

    def middle(of_policy: tuple[PolicyRun, ...]) -> PolicyRun:
        ordered = sorted(of_policy, key=lambda run: run.summary.tokens_per_s)
        return ordered[len(ordered) // 2]

    return [middle(of_policy) for of_policy in zip(*repeated, strict=True)]


def _row(run: PolicyRun, plan: MemoryPlan, options: argparse.Namespace) -> dict[str, Any]:
    summary, budget = run.summary, plan.budget_bytes
    return {
        "device": jax.devices()[0].device_kind,
        "policy": run.policy,
        "batch": options.batch,
        "budget_gib": _rounded(None if budget is None else budget / 2**30),
        "tokens_per_s": round(summary.tokens_per_s, 2),
        "ttft_ms": round(summary.ttft_p50_ms, 2),
        "tpot_p50_ms": _rounded(summary.tpot_p50_ms),
        "tpot_p99_ms": _rounded(summary.tpot_p99_ms),
        "pages_moved": run.log.moved["pages"],
        "hit_share": round(summary.hit_share, 4),
        "peak_gib": _rounded(None if run.peak_bytes is None else run.peak_bytes / 2**30),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _source(options: argparse.Namespace) -> RandomSource:
    config = full_size.config(options.layers, small=options.small)
    shares = full_size.popularity_by_domain(
        options.routing, options.layers, config.num_experts, options.domains
    )
    return RandomSource.make(config, shares, dense_bits=options.dense_bits)


def _traffic(options: argparse.Namespace) -> Traffic:
    return Traffic(
        phases=tuple(map(Phase.parse, options.phases)),
        rate=options.rate,
        prompt_tokens=options.prompt,
        output_tokens=options.output,
        seed=options.seed,
    )


def _serve(options: argparse.Namespace) -> ServeConfig:
    return ServeConfig(
        hbm_budget=options.budget,
        base_bits=options.base_bits,
        pages=options.pages,
        policy="off",
        interval=options.interval,
        batch=options.batch,
        context=options.prompt + options.output,
        chunk=options.chunk,
        implementation=options.implementation,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--budget", metavar="B", help="device memory, like 24GiB")
    memory.add_argument("--pages", type=int, help="pages of the pool")
    parser.add_argument("--base-bits", type=int, choices=LEVEL_BITS, default=2)
    parser.add_argument("--dense-bits", type=int, choices=DENSE_BITS, default=8)
    parser.add_argument("--interval", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chunk", type=int)
    parser.add_argument(
        "--rate", type=float, help="requests a second, Poisson; default: whenever a slot is free"
    )
    parser.add_argument(
        "--phases",
        nargs="+",
        default=["python:24", "ru:24", "math:24"],
        help="DOMAIN[=WEIGHT][+DOMAIN...]:REQUESTS, or ...:SECONDSs with a rate",
    )
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--output", type=int, default=256, help="tokens")
    parser.add_argument(
        "--routing",
        default=str(RECORDED),
        help="JSON file of recorded shares by domain, or zipf, whose domains are 0, 1, 2 ...; "
        "default: those of the shipped model",
    )
    parser.add_argument("--domains", type=int, default=4, help="of zipf")
    parser.add_argument("--layers", type=int, default=full_size.QWEN3_30B["num_hidden_layers"])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--repeats", type=int, default=1, help="of all policies; takes the median")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a tiny model and short traffic")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    mixed, policies = StaticMixed.name, options.policies
    if mixed in policies and "off" not in policies[: policies.index(mixed)]:
        parser.error("static-mixed needs the hotness that off records: name off before it")
    if options.small:
        parser.set_defaults(**SMALL_DEFAULTS)
        budget = options.budget
        options = parser.parse_args()
        options.pages = None if budget else options.pages
    return options


if __name__ == "__main__":
    main()
