"""``dynaexq perplexity``: loss on text files at one or several precisions."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import add_json, add_model, add_routing_trace
from dynaexq_jax.errors import InputError
from dynaexq_jax.text.documents import read_text

PRECISIONS = ("2", "4", "8", "bf16", "dynamic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_model(parser)
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text files"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="dynamic",
        help="bits of every expert; bf16 takes a Hugging Face directory; dynamic follows the text",
    )
    parser.add_argument("--window", type=int, default=512, help="tokens scored together")
    parser.add_argument("--max-windows", type=int, metavar="N", help="of each file, from its start")
    parser.add_argument(
        "--pages",
        type=int,
        metavar="N",
        help="pages above 2 bits for dynamic; default: one for a quarter of the experts",
    )
    add_routing_trace(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Scores every file afresh: a dynamic pool starts each one with all experts at the base."""
    for name in ("window", "max_windows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name in ("pages", "routing_trace"):
        if getattr(arguments, name) is not None and arguments.precision != "dynamic":
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is for --precision dynamic, got {arguments.precision}")
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
        results.append(
            {
                "text": str(path),
                "precision": arguments.precision,
                "nll": score.nll,
                "perplexity": score.perplexity,
                "tokens": score.tokens,
            }
        )
        if not arguments.json:
            print(
                f"{path}: perplexity {score.perplexity:.4f} at {arguments.precision}, "
                f"nll {score.nll:.5f}, {score.tokens} tokens"
            )
    if arguments.json:
        print(json.dumps({"results": results}))
    return 0
