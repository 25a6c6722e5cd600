"""How fast the dynamic policy follows a change of topic, and what plans cost, without a model.

    python benchmarks/policy.py examples/nano-moe/routing.json [--tokens 16] [--repeats 9]

Replays routing sampled from recorded shares by domain ([layer][expert]): twelve intervals of one
domain, then twelve of another, a quarter of the experts promoted. Coverage is the share of the
second domain's traffic that meets a promoted expert; the ceiling is that of the best map for it.
Medians over seeds. Then what a plan costs while the map is filled, and plans a second of a replay
whose map has come to rest. Ends with one line of JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from environment import describe, seconds_of

from dynaexq_jax.policy import Hotness, PolicyInput, make_policy, replay
from dynaexq_jax.report.table import text_table
from dynaexq_jax.residency import Residency

SWITCHES = (("python", "ru"), ("fr", "go"), ("en_general", "math"))
INTERVALS = 12
SHOWN = (0, 2, 5, 8)
BENEFIT = np.array([0.1, 0.01])
LAYERS, EXPERTS = 48, 128
REPLAYED = ((3, 32), (LAYERS, EXPERTS))
PLANS = 300


def main() -> None:
    """Replays every switch, times a plan at the shape of a large model, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("routing", type=Path, metavar="ROUTING_JSON")
    parser.add_argument("--tokens", type=int, default=16, help="of an interval")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    recorded = json.loads(arguments.routing.read_text(encoding="utf-8"))
    rows, results = [], {}
    for before, after in SWITCHES:
        runs = [
            follow(np.array(recorded[before]), np.array(recorded[after]), arguments.tokens, seed)
            for seed in range(arguments.repeats)
        ]
        coverage = np.median([run[0] for run in runs], axis=0)
        pages = statistics.median(run[1] for run in runs)
        rows.append(
            [f"{before} to {after}", *(f"{100 * coverage[i]:.0f} %" for i in SHOWN), f"{pages:.1f}"]
        )
        results[f"{before} to {after}"] = {"of_best": coverage.tolist(), "pages_at_rest": pages}
    plan_ms = time_plan(arguments.repeats)
    print(f"intervals of {arguments.tokens} tokens; coverage of the new domain, best map = 100 %")
    header = ["switch", *(f"after {i}" for i in SHOWN), "pages a plan at rest"]
    print(text_table(header, rows))
    print(f"a plan for {LAYERS} layers of {EXPERTS} experts: {plan_ms:.2f} ms")
    rates = {f"{layers} x {experts}": time_replay(layers, experts) for layers, experts in REPLAYED}
    for shape, (plans_per_s, moved) in rates.items():
        print(
            f"replay of {shape} experts: {plans_per_s:,.0f} plans a second, {moved:.2f} pages each"
        )
    found = {"plan_ms": plan_ms, "plans_per_s": rates, "results": results}
    print(json.dumps({"benchmark": "policy", **describe(), **found}))


def follow(
    before: np.ndarray, after: np.ndarray, tokens: int, seed: int
) -> tuple[list[float], float]:
    """Coverage of ``after`` at each of its intervals as a part of the best; pages moved at rest."""
    layers, experts = before.shape
    rng = np.random.default_rng(seed)
    trace = [
        (np.stack([rng.multinomial(4 * tokens, row / row.sum()) / 4 for row in share]), tokens)
        for share in (before, after)
        for _ in range(INTERVALS)
    ]
    pages = layers * experts // 4
    _, *steps = replay(
        make_policy("dynamic"),
        trace,
        residency=Residency(layers=layers, experts=experts, base_bits=2, pool_pages=pages),
        hotness=Hotness.cold(layers, experts),
        benefit=BENEFIT,
        max_transitions=pages,
    )
    best = np.sort(after, axis=None)[-pages:].sum()
    moved = [len(step.plan.promotions) for step in steps[INTERVALS // 2 : INTERVALS]]
    return [float(after[step.levels > 0].sum() / best) for step in steps[INTERVALS:]], float(
        np.mean(moved)
    )


def time_plan(repeats: int) -> float:
    """Milliseconds of one plan at the shape of a large model, half of its pages held."""
    rng = np.random.default_rng(0)
    levels = (rng.uniform(size=(LAYERS, EXPERTS)) < 1 / 8).astype(np.int32)
    given = PolicyInput(
        hotness=rng.dirichlet(np.full(EXPERTS, 0.2), LAYERS) * 8,
        levels=levels,
        age=np.full_like(levels, 9),
        pool_pages=LAYERS * EXPERTS // 4,
        pages_of_level=(0, 1, 3),
        benefit=BENEFIT,
        max_transitions=256,
    )
    return 1000 * statistics.median(seconds_of(lambda: make_policy("dynamic").plan(given), repeats))


def time_replay(layers: int, experts: int) -> tuple[float, float]:
    """Plans a second, by the median plan, and pages a plan, with page table and hotness.

    Intervals of 256 tokens from one distribution; the first plans, which fill the map, are not
    counted.
    """
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(experts, 0.2), layers)
    counts = (np.stack([rng.multinomial(8 * 256, row) for row in share]) for _ in range(PLANS))
    trace = [(count / 8, 256) for count in counts]
    pages = layers * experts // 4
    steps = replay(
        make_policy("dynamic"),
        trace,
        residency=Residency(layers=layers, experts=experts, base_bits=2, pool_pages=pages),
        hotness=Hotness.cold(layers, experts),
        benefit=BENEFIT,
        max_transitions=256,
    )
    seconds, moved = [], []
    for _ in range(PLANS):
        start = time.perf_counter()
        step = next(steps)
        seconds.append(time.perf_counter() - start)
        moved.append(len(step.plan.promotions))
    rest = slice(PLANS // 3, None)
    return 1 / statistics.median(seconds[rest]), statistics.mean(moved[rest])


if __name__ == "__main__":
    main()
