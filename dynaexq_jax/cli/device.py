"""What the command line asks of Python and of JAX before JAX's backend starts."""

import os
import subprocess
import sys
from pathlib import Path

CACHE_VARIABLE = "DYNAEXQ_CACHE_DIR"
FRACTION_VARIABLE = "XLA_CLIENT_MEM_FRACTION"
FRACTION_VARIABLES = (FRACTION_VARIABLE, "XLA_PYTHON_CLIENT_MEM_FRACTION")
SWITCH_INTERVAL_S = 2e-4
"""Python's own 5 ms let the threads that copy pages keep the decode loop waiting for that long."""


def prepare_device(budget_bytes: int | None) -> None:
    """Keeps compiled programs between runs, and holds the GPU's allocator to the budget.

    Threads take turns often enough for decode steps of a millisecond. Must be called before
    anything runs on a device. An allocator limit that the user has set is left as it is.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if budget_bytes is not None and not any(name in os.environ for name in FRACTION_VARIABLES):
        total = gpu_memory_bytes()
        if total is not None and budget_bytes < total:
            os.environ[FRACTION_VARIABLE] = f"{budget_bytes / total:.6f}"

    import jax

    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dynaexq_jax" / "xla")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # JAX would warn at every program
        print(
            f"dynaexq: {cache}: cannot be made ({error.strerror}), so compiled programs are not "
            f"kept; name another folder in {CACHE_VARIABLE}",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def gpu_memory_bytes() -> int | None:
    """Memory of the first GPU by the driver's own tool, or None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return int(output.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
