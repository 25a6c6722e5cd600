"""``dynaexq generate``: continues a prompt, streaming."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import (
    add_json,
    add_model,
    add_precision,
    add_shapes,
    add_traffic_files,
    keeping_hotness,
    serve_config,
)
from dynaexq_jax.cli.sampling import add_sampling, sampling_params
from dynaexq_jax.output_file import check_place, write_whole
from dynaexq_jax.text.documents import read_text

if TYPE_CHECKING:
    from dynaexq_jax.serving.llm import LLM, Piece


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", type=Path, metavar="F", help="UTF-8 text")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message to a chat model"
    )
    add_sampling(parser)
    add_precision(parser)
    add_traffic_files(parser)
    add_shapes(parser, batch=False)
    parser.add_argument(
        "--stats-json", type=Path, metavar="F", help="write speed, memory and movements here"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Streams the text to stdout and a summary to stderr; with --json, one object to stdout."""
    prompt = arguments.prompt if arguments.prompt_file is None else read_text(arguments.prompt_file)
    sampling = sampling_params(arguments)
    serve = serve_config(arguments)
    stats_json: Path | None = arguments.stats_json
    if stats_json is not None:
        check_place("--stats-json", stats_json)
    prepare_device(serve.budget_bytes)
    from dynaexq_jax.serving.llm import LLM
    from dynaexq_jax.serving.loading import load_served

    started = time.perf_counter()
    llm = LLM(load_served(arguments.model, serve))
    startup_s = time.perf_counter() - started
    options = {"max_tokens": arguments.max_tokens, "sampling": sampling, "stop": arguments.stop}
    stream = (
        llm.stream_chat([{"role": "user", "content": prompt}], **options)
        if arguments.chat
        else llm.stream_generate(prompt, **options)
    )
    pieces = []
    with keeping_hotness(llm, serve):
        for piece in stream:
            pieces.append(piece)
            print(piece.text, end="", flush=True, file=sys.stderr if arguments.json else sys.stdout)
    print(file=sys.stderr if arguments.json else sys.stdout)
    stats = _stats(llm, pieces[-1], startup_s)
    if arguments.json:
        result = {
            "text": "".join(piece.text for piece in pieces),
            "token_ids": [token for piece in pieces for token in piece.token_ids],
            "finish_reason": pieces[-1].finish_reason,
            "stats": stats,
        }
        print(json.dumps(result))
    else:
        _summarize(stats)
    if stats_json is not None:
        write_whole(stats_json, json.dumps(stats, indent=1) + "\n")
    return 0


def _stats(llm: "LLM", last: "Piece", startup_s: float) -> dict[str, Any]:
    from dynaexq_jax.report.table import plan_json

    levels = llm.residency()
    controller = llm.engine.controller
    return {
        "prompt_tokens": last.stats.prompt_tokens,
        "tokens": last.stats.tokens,
        "startup_s": round(startup_s, 3),
        "first_token_s": round(last.stats.first_token_s, 4),
        "tokens_per_s": last.stats.tokens_per_s,
        "plan": None if llm.plan is None else plan_json(llm.plan),
        "experts_by_bits": None
        if levels is None
        else {str(bits): int((levels == i).sum()) for i, bits in enumerate((2, 4, 8))},
        "levels": None if levels is None else levels.tolist(),
        "moved": None if controller is None else vars(controller.counters),
    }


def _summarize(stats: dict[str, Any]) -> None:
    speed = stats["tokens_per_s"]
    parts = [
        f"{stats['tokens']} tokens",
        f"{speed:.1f} tokens/s" if speed else "",
        f"first token {stats['first_token_s']:.2f} s (compilation included)",
        f"start-up {stats['startup_s']:.1f} s",
    ]
    if stats["experts_by_bits"]:
        parts += [f"{n} experts at {bits} bits" for bits, n in stats["experts_by_bits"].items()]
    if stats["moved"]:
        parts.append(f"{stats['moved']['pages']} pages moved")
    print("[" + ", ".join(filter(None, parts)) + "]", file=sys.stderr)
