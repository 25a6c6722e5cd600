"""``dynaexq plan``: how a memory budget would be spent; nothing is allocated."""

import argparse
import json

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import add_json, add_model, add_shapes, serve_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_model(parser)
    parser.add_argument(
        "--hbm-budget", required=True, metavar="B", help="device memory to use, like 24GiB"
    )
    parser.add_argument(
        "--base-bits", type=int, choices=(2, 4, 8), help="fix the base instead of choosing it"
    )
    add_shapes(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    serve = serve_config(arguments)
    assert serve.budget_bytes is not None
    prepare_device(None)
    import jax

    from dynaexq_jax.checkpoint import Checkpoint
    from dynaexq_jax.report.table import plan_json, plan_table
    from dynaexq_jax.serving.planning import Planner

    checkpoint = Checkpoint.open(arguments.model)
    plan = Planner(checkpoint, serve, checkpoint.config.eos_token_ids).plan()
    if arguments.json:
        print(json.dumps({**plan_json(plan), "temporaries_of": jax.default_backend()}))
    else:
        print(plan_table(plan))
        print(f"temporaries are those of programs compiled for: {jax.default_backend()}")
    return 0
