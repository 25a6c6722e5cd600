"""``dynaexq simulate``: what a policy would have done with recorded routing; needs no device."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from dynaexq_jax.cli.options import add_json, add_map, add_policy
from dynaexq_jax.errors import InputError
from dynaexq_jax.policy import Hotness, make_policy
from dynaexq_jax.report.table import text_table
from dynaexq_jax.traffic import (
    Ladder,
    Simulation,
    Trace,
    TraceHeader,
    read_map,
    read_profile,
    simulate,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command; what is left out is as it was recorded."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="written by --routing-trace")
    add_policy(parser)
    add_map(parser)
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--pages", type=int, metavar="N", help="pages of the pool above the base")
    pages.add_argument(
        "--pages-share", type=float, metavar="X", help="one page for this share of all experts"
    )
    parser.add_argument(
        "--base-bits", type=int, choices=(2, 4, 8), help="bits that every expert always has"
    )
    parser.add_argument(
        "--max-bits", type=int, choices=(2, 4, 8), help="bits that none is promoted above"
    )
    parser.add_argument(
        "--interval", type=int, metavar="N", help="steps between two looks at the routing"
    )
    parser.add_argument(
        "--hotness-profile", type=Path, metavar="F", help="begin with the hotness in F"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table; with --json, one object to stdout."""
    trace = Trace.read(arguments.trace)
    header = trace.header
    if trace.dropped_bytes:
        print(
            f"dynaexq: {arguments.trace}: its last record is cut short, so its last "
            f"{trace.dropped_bytes} bytes are left out",
            file=sys.stderr,
        )
    ladder = _ladder(arguments, header)
    interval = header.interval if arguments.interval is None else arguments.interval
    mixed = None if arguments.map is None else read_map(arguments.map, header.model).hotness
    result = simulate(
        trace,
        make_policy(arguments.policy, mixed),
        ladder=ladder,
        interval=interval,
        hotness=_hotness(arguments, header, mixed),
    )
    settings = {"policy": arguments.policy, **dataclasses.asdict(ladder), "interval": interval}
    if arguments.json:
        figures = {**vars(result), "hit_share": result.hit_share, "of_best": result.of_best}
        figures["plans_per_s"] = result.plans_per_s
        found = {"trace": str(arguments.trace), **settings, **figures}
        print(json.dumps(found | {"dropped_bytes": trace.dropped_bytes}))
    else:
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()))
        print(_table(result))
    return 0


def _hotness(
    arguments: argparse.Namespace, header: TraceHeader, mixed: np.ndarray | None
) -> Hotness | None:
    """What the first plan goes by: the profile, or else the map's."""
    if arguments.hotness_profile is not None:
        return read_profile(arguments.hotness_profile, header.model)
    return None if mixed is None else Hotness.calibrated(mixed)


def _ladder(arguments: argparse.Namespace, header: TraceHeader) -> Ladder:
    """Levels and pages that were asked for; what was not is as in the trace, as far as it fits."""
    experts = header.model.layers * header.model.experts
    pages, share = arguments.pages, arguments.pages_share
    if share is not None:
        if not 0 <= share < float("inf"):
            raise InputError(f"--pages-share must be 0 or more, like 0.25, got {share}")
        pages = int(share * experts)
    ladder = Ladder(
        base_bits=arguments.base_bits or header.base_bits,
        max_bits=arguments.max_bits or header.bits[-1],
        pool_pages=header.pool_pages if pages is None else pages,
    )
    if pages is None:
        pages = min(ladder.pool_pages, ladder.most_pages(experts))
        return dataclasses.replace(ladder, pool_pages=pages)
    return ladder


def _table(result: Simulation) -> str:
    of_best = result.of_best
    rows = [
        ("intervals", f"{result.intervals:,}"),
        ("tokens", f"{result.tokens:,}"),
        ("promotions", f"{result.promotions:,}"),
        ("demotions", f"{result.demotions:,}"),
        ("pages moved", f"{result.pages_moved:,}"),
        ("router mass that met a promoted expert", f"{100 * result.hit_share:.1f} %"),
        ("of what the best map would meet", "-" if of_best is None else f"{100 * of_best:.1f} %"),
        ("plans a second", f"{result.plans_per_s:,.0f}"),
    ]
    return text_table(("simulated", ""), rows)
