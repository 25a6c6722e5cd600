"""``dynaexq convert``: also ``python -m convert``."""

import argparse
import os
from pathlib import Path
from typing import Final

import jax

from convert.calibration.text import DEFAULT_ROWS, DEFAULT_WINDOW, CalibrationConfig
from convert.pipeline import (
    DEFAULT_DENSE_BITS,
    DEFAULT_GROUP_SIZE,
    DEFAULT_SCALE_ENCODING,
    Summary,
    convert,
)
from dynaexq_jax.errors import InputError
from dynaexq_jax.models.names import DENSE_BITS
from pallas_kernels.scales import GROUP_SIZES, SCALE_ENCODINGS

METHODS = ("joint", "grid")
AUTOTUNING: Final = "--xla_gpu_autotune_level"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "source", type=Path, metavar="HF_DIR", help="Hugging Face Qwen3-MoE directory"
    )
    parser.add_argument("output", type=Path, metavar="OUT_DIR", help="checkpoint to write")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="joint: codes for the inputs that each expert gets on calibration text, on the GPU "
        "where JAX has one; grid: no data, always on the CPU (default: joint with --calibration, "
        "else grid)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 text files like what the model will read; documents end with <|endoftext|>",
    )
    parser.add_argument(
        "--calibration-rows",
        type=int,
        metavar="N",
        help=f"rows of each file, from its start (default: {DEFAULT_ROWS})",
    )
    parser.add_argument(
        "--calibration-window",
        type=int,
        metavar="N",
        help=f"tokens of a row (default: {DEFAULT_WINDOW})",
    )
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
    calibration = _calibration(args)
    if calibration is None:
        # the work is done on the CPU; an accelerator's libraries would only take memory
        jax.config.update("jax_platforms", "cpu")
    else:
        repeat_exactly()
    summary = convert(
        args.source,
        args.output,
        group_size=args.group_size,
        scale_encoding=args.scale_encoding,
        dense_bits=args.dense_bits,
        calibration=calibration,
        force=args.force,
    )
    print(describe(summary))
    return 0


def repeat_exactly() -> None:
    """Keeps a GPU's compiler from timing which product is the fastest.

    They add up in different orders, so two runs would end in different codes. Comes ahead of all
    work on a device. A level that the user has set stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if AUTOTUNING not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {AUTOTUNING}=0".strip()


def _calibration(args: argparse.Namespace) -> CalibrationConfig | None:
    """What --method and the flags of calibration ask for. Raises InputError."""
    method = args.method or ("joint" if args.calibration else "grid")
    if method == "joint":
        if not args.calibration:
            raise InputError("--method joint needs text: give --calibration FILE [FILE ...]")
        rows, window = args.calibration_rows, args.calibration_window
        return CalibrationConfig(
            files=tuple(args.calibration),
            rows=DEFAULT_ROWS if rows is None else rows,
            window=DEFAULT_WINDOW if window is None else window,
        )
    for name in ("calibration", "calibration_rows", "calibration_window"):
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is for --method joint, not for grid, which uses no data")
    return None


def describe(summary: Summary) -> str:
    """A summary for people."""
    errors = ", ".join(f"{bits} bits {e:.3g}" for bits, e in summary.errors_by_bits.items())
    pinned = ", ".join(f"{expert} of layer {layer}" for layer, expert in summary.super_experts)
    resumed = f", {summary.resumed_steps} steps resumed" if summary.resumed_steps else ""
    return (
        f"{summary.output}: {summary.nbytes / 2**20:.1f} MiB in {summary.seconds:.1f} s{resumed}\n"
        f"relative squared error of expert weights: {errors}\n"
        f"peak memory: {summary.peak_rss_bytes / 2**20:.0f} MiB"
        + (f"\nsuper experts, pinned: {pinned}" if pinned else "")
    )
