"""Flags that several commands share, with defaults from the configuration they fill."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaexq_jax.errors import InputError
from dynaexq_jax.policy import MAP_MISSING, StaticMixed
from dynaexq_jax.serving.config import POLICIES, ServeConfig

if TYPE_CHECKING:
    from dynaexq_jax.serving.llm import LLM

PRECISIONS = ("2", "4", "8", "bf16", "dynamic", "static-mixed")
"""What --precision may be: bits of every expert, or a policy over a base of 2 bits."""
WITH_PAGES = ("dynamic", "static-mixed")
"""Those of them that have pages above the base."""
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ServeConfig)}


def add_model(parser: argparse.ArgumentParser) -> None:
    """The MODEL argument."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="converted checkpoint")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The --json flag."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout, all else on stderr"
    )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Flags for text files that are scored in windows."""
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text files"
    )
    add_windows(parser)


def add_windows(parser: argparse._ActionsContainer) -> None:
    """Flags for the windows of text files."""
    parser.add_argument("--window", type=int, default=512, help="tokens scored together")
    parser.add_argument("--max-windows", type=int, metavar="N", help="of each file, from its start")


def check_windows(arguments: argparse.Namespace) -> None:
    """Raises InputError unless what ``add_windows`` has added is positive."""
    for name in ("window", "max_windows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {value}")


def check_precisions(precisions: Sequence[str], arguments: argparse.Namespace) -> None:
    """Raises InputError for a flag that none of the precisions reads, or a map that one needs."""
    for name in ("pages", "map", "routing_trace"):
        is_given = getattr(arguments, name, None) is not None
        if is_given and not {*precisions} & {*WITH_PAGES}:
            raise InputError(
                f"--{name.replace('_', '-')} is for --precision {' or '.join(WITH_PAGES)}, got "
                f"{', '.join(precisions)}"
            )
    if StaticMixed.name in precisions and arguments.map is None:
        raise InputError(MAP_MISSING)


def add_shapes(parser: argparse.ArgumentParser, *, batch: bool = True) -> None:
    """Flags for what the engine allocates."""
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a sequence")
    if batch:
        parser.add_argument(
            "--batch", type=int, default=_DEFAULTS["batch"], help="sequences decoded together"
        )
    parser.add_argument("--chunk", type=int, metavar="N", help="prompt tokens of one prefill call")


def add_precision(parser: argparse.ArgumentParser, *, policy: bool = True) -> None:
    """Flags for budget, base, pool and policy."""
    parser.add_argument(
        "--hbm-budget", metavar="B", help="device memory to use, like 24GiB; chooses base and pool"
    )
    parser.add_argument(
        "--base-bits", type=int, choices=(2, 4, 8), help="bits that every expert always has"
    )
    parser.add_argument("--pages", type=int, metavar="N", help="pages of the pool above the base")
    if policy:
        add_policy(parser)
    add_map(parser)
    parser.add_argument(
        "--interval",
        type=int,
        metavar="N",
        default=_DEFAULTS["interval"],
        help="steps between two looks at the routing",
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    """The --policy flag."""
    parser.add_argument(
        "--policy", choices=POLICIES, default=_DEFAULTS["policy"], help="who is promoted, and when"
    )


def add_map(parser: argparse.ArgumentParser) -> None:
    """The --map flag."""
    parser.add_argument(
        "--map",
        type=Path,
        metavar="F",
        help="made by calibrate-map: what static-mixed holds, and dynamic begins with",
    )


def add_routing_trace(parser: argparse.ArgumentParser) -> None:
    """The --routing-trace flag."""
    parser.add_argument(
        "--routing-trace", type=Path, metavar="F", help="record the routing here, for simulate"
    )


def add_traffic_files(parser: argparse.ArgumentParser) -> None:
    """Flags for what a run leaves of its traffic."""
    parser.add_argument(
        "--hotness-profile",
        type=Path,
        metavar="F",
        help="begin with the hotness in F, if there is one, and leave this run's there",
    )
    add_routing_trace(parser)


def serve_config(arguments: argparse.Namespace, **extra: Any) -> ServeConfig:
    """The configuration that the given flags fill."""
    given = {name: getattr(arguments, name) for name in _DEFAULTS if hasattr(arguments, name)}
    return ServeConfig(**(given | extra))


@contextlib.contextmanager
def keeping_hotness(llm: "LLM", serve: ServeConfig) -> Iterator[None]:
    """Leaves the hotness in its profile, if there is to be one, however the run ends."""
    try:
        yield
    finally:
        if serve.hotness_profile is not None:
            llm.save_hotness(serve.hotness_profile)
