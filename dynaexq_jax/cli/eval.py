"""``dynaexq eval``: text files against the unquantized model, or benchmarks through lm-eval."""

import argparse
from pathlib import Path

from dynaexq_jax.cli import eval_tasks, eval_texts
from dynaexq_jax.cli.options import (
    PRECISIONS,
    add_json,
    add_map,
    add_model,
    add_windows,
    check_precisions,
)
from dynaexq_jax.errors import InputError

OF_TEXTS = ("reference", "window", "max_windows")
OF_TASKS = (
    "include_path",
    "data_dir",
    "limit",
    "fewshot",
    "chat",
    "allow_code",
    "pages",
    "batch",
    "context",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_model(parser)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 text files: perplexity, and KL divergence from the unquantized --reference",
    )
    kind.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="benchmarks, by lm-eval's names of tasks, groups and tags; MODEL may be a Hugging "
        "Face directory too, for --precision bf16",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        nargs="+",
        required=True,
        help="bits of every expert, one after another; dynamic follows the text, or the requests, "
        "static-mixed holds a map, both with a page for a quarter of the experts",
    )
    add_map(parser)
    add_json(parser)
    texts = parser.add_argument_group("with --text")
    texts.add_argument(
        "--reference",
        type=Path,
        metavar="HF_DIR",
        help="Hugging Face directory that MODEL was converted from; its experts stay unquantized, "
        "and both models are on the device together, so it must have memory for both",
    )
    add_windows(texts)
    eval_tasks.add_arguments(parser.add_argument_group("with --tasks"))
    parser.set_defaults(default_of=parser.get_default)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates every text or task at every precision, each afresh."""
    kind, other, foreign = (
        ("--text", "--tasks", OF_TASKS) if arguments.text else ("--tasks", "--text", OF_TEXTS)
    )
    for name in foreign:
        if getattr(arguments, name) != arguments.default_of(name):
            raise InputError(
                f"--{name.replace('_', '-')} is for {other}, not for {kind}; leave it out"
            )
    check_precisions(arguments.precision, arguments)
    if arguments.tasks:
        return eval_tasks.run(arguments)
    if arguments.reference is None:
        raise InputError(
            "--text needs --reference, the Hugging Face directory that MODEL was converted from"
        )
    if "bf16" in arguments.precision:
        raise InputError(
            "--precision bf16 with --text is the reference itself; leave it out, or use: "
            "dynaexq perplexity HF_DIR --precision bf16"
        )
    return eval_texts.run(arguments)
