"""The convert command: ``python -m convert`` and ``dynaexq convert``."""

import argparse
from pathlib import Path

import jax

from convert.pipeline import (
    DEFAULT_DENSE_BITS,
    DEFAULT_GROUP_SIZE,
    DEFAULT_SCALE_ENCODING,
    Summary,
    convert,
)
from dynaexq_jax.models.names import DENSE_BITS
from pallas_kernels.scales import GROUP_SIZES, SCALE_ENCODINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "source", type=Path, metavar="HF_DIR", help="Hugging Face Qwen3-MoE directory"
    )
    parser.add_argument("output", type=Path, metavar="OUT_DIR", help="checkpoint to write")
    parser.add_argument(
        "--group-size",
        type=int,
        default=DEFAULT_GROUP_SIZE,
        choices=GROUP_SIZES,
        help="weights that share a scale (default: %(default)s)",
    )
    parser.add_argument(
        "--scale-encoding",
        default=DEFAULT_SCALE_ENCODING,
        choices=SCALE_ENCODINGS,
        help="how scales are stored (default: %(default)s)",
    )
    parser.add_argument(
        "--dense-bits",
        type=int,
        default=DEFAULT_DENSE_BITS,
        choices=DENSE_BITS,
        help="bits of attention, head and dense MLP; 16 is as the source has them "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace OUT_DIR if it exists, once the new checkpoint is whole",
    )


def run(args: argparse.Namespace) -> int:
    """Converts and prints a summary; the exit status. Raises InputError."""
    # the work is done on the CPU; an accelerator's libraries would only take memory
    jax.config.update("jax_platforms", "cpu")
    summary = convert(
        args.source,
        args.output,
        group_size=args.group_size,
        scale_encoding=args.scale_encoding,
        dense_bits=args.dense_bits,
        force=args.force,
    )
    print(describe(summary))
    return 0


def describe(summary: Summary) -> str:
    """A summary for people."""
    errors = ", ".join(f"{bits} bits {e:.3g}" for bits, e in summary.errors_by_bits.items())
    resumed = f", {summary.resumed_steps} steps resumed" if summary.resumed_steps else ""
    return (
        f"{summary.output}: {summary.nbytes / 2**20:.1f} MiB in {summary.seconds:.1f} s{resumed}\n"
        f"relative squared error of expert weights: {errors}\n"
        f"peak memory: {summary.peak_rss_bytes / 2**20:.0f} MiB"
    )
