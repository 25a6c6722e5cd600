"""Sampling flags."""

import argparse

from dynaexq_jax.engine.sampling import SamplingParams


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn, with the defaults of ``SamplingParams``."""
    default = SamplingParams()
    for flag, kind, text in (
        ("--temperature", float, "0 takes the likeliest token"),
        ("--top-k", int, "keep the k likeliest tokens, 0 keeps all"),
        ("--top-p", float, "keep the likeliest tokens that reach this probability"),
        ("--min-p", float, "drop tokens below this share of the likeliest"),
        ("--seed", int, "the same seed gives the same tokens"),
    ):
        name = flag.removeprefix("--").replace("-", "_")
        parser.add_argument(flag, type=kind, default=getattr(default, name), help=text)
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="new tokens at most"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="S", help="end before this text"
    )


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The settings that the given flags fill."""
    return SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
    )
