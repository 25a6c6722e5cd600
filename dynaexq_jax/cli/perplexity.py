"""``dynaexq perplexity``: loss on text files at one or several precisions."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import (
    add_json,
    add_map,
    add_model,
    add_routing_trace,
    add_texts,
    check_windows,
)
from dynaexq_jax.errors import InputError
from dynaexq_jax.text.documents import read_text

if TYPE_CHECKING:
    from dynaexq_jax.serving.perplexity import TextScore

PRECISIONS = ("2", "4", "8", "bf16", "dynamic", "static-mixed")

WITH_PAGES = ("dynamic", "static-mixed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_model(parser)
    add_texts(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="dynamic",
        help="bits of every expert; bf16 takes a Hugging Face directory; dynamic follows the text; "
        "static-mixed holds a map",
    )
    parser.add_argument(
        "--pages",
        type=int,
        metavar="N",
        help="pages above 2 bits; default: one for a quarter of the experts",
    )
    add_map(parser)
    add_routing_trace(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Scores every file afresh: a dynamic pool starts each one with all experts at the base."""
    check_windows(arguments)
    for name in ("pages", "map", "routing_trace"):
        if getattr(arguments, name) is not None and arguments.precision not in WITH_PAGES:
            flag = name.replace("_", "-")
            raise InputError(
                f"--{flag} is for --precision {' or '.join(WITH_PAGES)}, got {arguments.precision}"
            )
    for path in arguments.text:
        read_text(path)  # what cannot be read is reported before anything is scored
    prepare_device(None)
    from tqdm import tqdm

    from dynaexq_jax.serving.perplexity import load_for_scoring, score_text

    served = load_for_scoring(
        arguments.model,
        precision=arguments.precision,
        window=arguments.window,
        pages=arguments.pages,
        map=arguments.map,
        routing_trace=arguments.routing_trace,
    )
    results: list[dict[str, Any]] = []
    for path in arguments.text:
        with tqdm(desc=path.name, unit="window", delay=1, file=sys.stderr, leave=False) as bar:
            score = score_text(
                served,
                path,
                window=arguments.window,
                max_windows=arguments.max_windows,
                on_windows=bar.reset,
                on_window=bar.update,
            )
        results.append(report(path, arguments.precision, score, line=not arguments.json))
    if arguments.json:
        print(json.dumps({"results": results}))
    return 0


def report(path: Path, precision: str, score: "TextScore", *, line: bool) -> dict[str, Any]:
    """What the JSON says of one text; printed for people, if it is to be a ``line``."""
    result = {
        "text": str(path),
        "precision": precision,
        "nll": score.nll,
        "perplexity": score.perplexity,
        "tokens": score.tokens,
    }
    if score.kl is not None:
        result["kl"] = score.kl
    if line:
        kl = "" if score.kl is None else f", kl {score.kl:.5f}"
        print(
            f"{path}: perplexity {score.perplexity:.4f} at {precision}, "
            f"nll {score.nll:.5f}{kl}, {score.tokens} tokens"
        )
    return result
