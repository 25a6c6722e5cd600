"""``dynaexq perplexity``: loss on text files at one or several precisions."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import (
    PRECISIONS,
    add_json,
    add_map,
    add_model,
    add_routing_trace,
    add_texts,
    check_precisions,
    check_windows,
)
from dynaexq_jax.text.documents import read_text

if TYPE_CHECKING:
    import numpy as np

    from dynaexq_jax.engine.divergence import Divergence
    from dynaexq_jax.serving.loading import Served
    from dynaexq_jax.serving.perplexity import TextScore


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
    check_precisions([arguments.precision], arguments)
    for path in arguments.text:
        read_text(path)  # what cannot be read is reported before anything is loaded
    prepare_device(None)
    from dynaexq_jax.serving.perplexity import load_for_scoring
    from dynaexq_jax.text.documents import read_windows

    served = load_for_scoring(
        arguments.model,
        precision=arguments.precision,
        window=arguments.window,
        pages=arguments.pages,
        map=arguments.map,
        routing_trace=arguments.routing_trace,
    )
    # all of them before any is scored: one that is too short costs no results of others
    texts = [
        (path, read_windows(path, served.tokenizer, arguments.window, arguments.max_windows))
        for path in arguments.text
    ]
    results = list(score_texts(served, arguments.precision, texts, lines=not arguments.json))
    if arguments.json:
        print(json.dumps({"results": results}))
    return 0


def score_texts(
    served: "Served",
    precision: str,
    texts: "list[tuple[Path, np.ndarray]]",
    *,
    divergence: "Divergence | None" = None,
    lines: bool,
) -> Iterator[dict[str, Any]]:
    """Scores the windows of each text: what the JSON says of it, printed if ``lines`` are wanted.

    ``divergence`` as of ``score_windows``.
    """
    from tqdm import tqdm

    from dynaexq_jax.serving.perplexity import score_windows

    for path, windows in texts:
        with tqdm(
            total=len(windows),
            desc=f"{path.name} at {precision}",
            unit="window",
            delay=1,
            file=sys.stderr,
            leave=False,
        ) as bar:
            score = score_windows(served, windows, divergence=divergence, on_window=bar.update)
        yield _report(path, precision, score, line=lines)


def _report(path: Path, precision: str, score: "TextScore", *, line: bool) -> dict[str, Any]:
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
