"""``python -m dynaexq_jax``: the same as the console script ``dynaexq``."""

import sys

from dynaexq_jax.cli import main

sys.exit(main())
