"""``python -m convert HF_DIR OUT_DIR``: the same as ``dynaexq convert``."""

import sys

from dynaexq_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
