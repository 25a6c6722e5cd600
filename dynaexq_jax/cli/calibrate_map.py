"""``dynaexq calibrate-map``: the best fixed map for the mix of given texts."""

import argparse
import json
import sys
from pathlib import Path

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import add_json, add_model, add_texts, check_windows
from dynaexq_jax.output_file import check_place
from dynaexq_jax.text.documents import read_text
from dynaexq_jax.units import parse_share
from pallas_kernels.levels import level_of_bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_model(parser)
    add_texts(parser)
    parser.add_argument(
        "--base-bits", type=int, choices=(2, 4), default=2, help="bits that every expert always has"
    )
    parser.add_argument(
        "--max-bits", type=int, choices=(4, 8), help="bits that none is promoted above"
    )
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--pages", type=int, metavar="N", help="pages of the pool above the base")
    pages.add_argument(
        "--promoted",
        metavar="P",
        default="25%",
        help="pages that bring this share of all experts one level up; default: 25%%",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MAP")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the texts, every expert at the base, and writes the map; each text weighs the same."""
    check_windows(arguments)
    check_place("--output", arguments.output)
    for path in arguments.text:
        read_text(path)
    share = parse_share(arguments.promoted) if arguments.pages is None else None
    prepare_device(None)
    from tqdm import tqdm

    from dynaexq_jax.checkpoint import Checkpoint
    from dynaexq_jax.serving.calibration import ladder_of, measure_routing
    from dynaexq_jax.traffic import RoutedModel, calibrated_map, write_map

    checkpoint = Checkpoint.open(arguments.model)
    ladder = ladder_of(
        checkpoint,
        base_bits=arguments.base_bits,
        max_bits=arguments.max_bits,
        pages=arguments.pages,
        share=share,
    )
    with tqdm(unit="window", delay=1, file=sys.stderr, leave=False) as bar:
        hotness, tokens = measure_routing(
            arguments.model,
            arguments.text,
            base_bits=arguments.base_bits,
            window=arguments.window,
            max_windows=arguments.max_windows,
            on_window=bar.update,
        )
    found = calibrated_map(
        RoutedModel.of(checkpoint.config),
        ladder,
        hotness,
        tokens=tokens,
        benefit=checkpoint.benefit,
        pinned=checkpoint.pinned,
    )
    write_map(arguments.output, found)
    facts = {
        "map": str(arguments.output),
        "tokens": tokens,
        "pool_pages": ladder.pool_pages,
        "experts_above_the_base": int((found.levels > level_of_bits(ladder.base_bits)).sum()),
        "value": found.value,
        "bound": found.bound,
        "gap": found.gap,
    }
    if arguments.json:
        print(json.dumps(facts))
    else:
        print(
            f"{arguments.output}: {facts['experts_above_the_base']} experts above "
            f"{ladder.base_bits} bits with {ladder.pool_pages} pages, for {tokens:,} tokens; "
            f"the value is at most {100 * found.gap:.3g} % below that of the best map"
        )
    return 0
