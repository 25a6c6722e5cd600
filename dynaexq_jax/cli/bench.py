"""``dynaexq bench``: several policies over the same text traffic, shifting from file to file."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import add_model, add_precision, serve_config
from dynaexq_jax.errors import InputError
from dynaexq_jax.text.documents import read_text

if TYPE_CHECKING:
    from dynaexq_jax.measure.requests import Request
    from dynaexq_jax.text.tokenizer import Tokenizer

POLICIES = ("off", "dynamic", "blocking")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_model(parser)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="UTF-8 text; each file is a phase of the traffic",
    )
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="of each file")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="of a request")
    parser.add_argument(
        "--max-tokens", type=int, default=32, metavar="N", help="new tokens of a request at most"
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences decoded together")
    parser.add_argument("--chunk", type=int, metavar="N", help="prompt tokens of one prefill call")
    add_precision(parser, policy=False)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of the policies, then one line of JSON."""
    for name in ("requests", "prompt_tokens", "max_tokens"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be positive, got {getattr(arguments, name)}")
    for path in arguments.text:
        read_text(path)  # what cannot be read is reported before anything is loaded
    from dynaexq_jax.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(arguments.model)
    context = arguments.prompt_tokens + arguments.max_tokens
    if context > checkpoint.config.max_position_embeddings:
        raise InputError(
            f"--prompt-tokens and --max-tokens are {context} together, more than the "
            f"{checkpoint.config.max_position_embeddings} positions of this model; lower them"
        )
    changes: dict[str, object] = {"policy": "off", "context": context}
    if arguments.hbm_budget is None and arguments.base_bits is None and arguments.pages is None:
        changes |= {"base_bits": 2, "pages": len(checkpoint.layers) * checkpoint.experts // 4}
    serve = serve_config(arguments, **changes)
    prepare_device(serve.budget_bytes)
    from dynaexq_jax.measure.policies import run_policy, warm_up
    from dynaexq_jax.measure.report import run_json, runs_table
    from dynaexq_jax.policy import StaticMixed, make_policy
    from dynaexq_jax.report.table import plan_json
    from dynaexq_jax.serving.loading import load_served
    from dynaexq_jax.traffic import RoutedModel, read_map

    served = load_served(arguments.model, serve)
    requests = _requests(arguments, served.tokenizer)
    warm_up(served.engine, requests)
    runs = []
    mixed = None
    if serve.map is not None:
        mixed = read_map(Path(serve.map), RoutedModel.of(checkpoint.config)).hotness
    for name in POLICIES if mixed is None else (*POLICIES, StaticMixed.name):
        runs.append(run_policy(served.engine, make_policy(name, mixed), requests))
        print(f"{name}: {runs[-1].summary.seconds:.1f} s", file=sys.stderr)
    print(runs_table(runs))
    plan = None if served.plan is None else plan_json(served.plan)
    print(json.dumps({"plan": plan, "policies": [run_json(run) for run in runs]}))
    return 0


def _requests(arguments: argparse.Namespace, tokenizer: "Tokenizer") -> list["Request"]:
    """Prompts from the start of each file on, one file after another."""
    from dynaexq_jax.measure.requests import Request
    from dynaexq_jax.text.documents import read_windows

    requests = []
    for phase, path in enumerate(arguments.text):
        windows = read_windows(path, tokenizer, arguments.prompt_tokens, arguments.requests)
        requests += [
            Request(
                prompt=windows[number % len(windows), :-1],
                max_tokens=arguments.max_tokens,
                phase=phase,
                arrival_s=None,
            )
            for number in range(arguments.requests)
        ]
    return requests
