"""``python -m convert HF_DIR OUT_DIR``."""

import argparse
import sys

from convert.cli import add_arguments, run
from dynaexq_jax.errors import InputError


def main() -> int:
    """Parses the command line, converts, prints errors as one line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts a Hugging Face Qwen3-MoE directory to a checkpoint of bit planes.",
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except InputError as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
