"""Conversion: time, rate and peak memory, each repeat in a process of its own.

    python benchmarks/conversion.py HF_DIR [--repeats 3] [--calibration FILE [FILE ...]]
    python benchmarks/conversion.py --layer [--experts N] [--tokens N]

The ceiling is what the disk takes for the same bytes: the source read and the output written once.
``--layer`` is another benchmark: the calibrated conversion of one layer of Qwen3-30B-A3B
(``conversion_layer.py``). Ends with one line of JSON.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import conversion_layer
from environment import describe

from dynaexq_jax.report.table import text_table


def main() -> None:
    """Converts and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="HF_DIR", nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calibration", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--layer", action="store_true", help="one layer of Qwen3-30B-A3B")
    parser.add_argument("--experts", type=int, help="of the layer; fewer on a CPU")
    parser.add_argument("--tokens", type=int, help="of a batch; fewer on a CPU")
    arguments = parser.parse_args()
    if arguments.layer:
        conversion_layer.run(arguments.experts, arguments.tokens)
        return
    if arguments.source is None:
        parser.error("give HF_DIR, or --layer")
    flags = [] if arguments.calibration is None else ["--calibration", *arguments.calibration]
    source_bytes = sum(f.stat().st_size for f in arguments.source.glob("*.safetensors"))
    seconds, peaks = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(arguments.repeats):
            output = Path(scratch) / f"run{repeat}"
            start = time.perf_counter()
            command = [sys.executable, "-m", "convert", arguments.source, output, *flags]
            run = subprocess.run(
                list(map(str, command)), check=True, capture_output=True, text=True
            )
            seconds.append(time.perf_counter() - start)
            peaks.append(int(re.search(r"peak memory: (\d+) MiB", run.stdout)[1]))
        output_bytes = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
        ceiling_s = _copy_seconds(arguments.source, output, Path(scratch))
    rows = [
        ["whole process, median s", f"{statistics.median(seconds):.1f}"],
        ["ceiling: the same bytes read and written, s", f"{ceiling_s:.2f}"],
        ["peak memory, MiB", f"{max(peaks)}"],
        ["source, MiB", f"{source_bytes / 2**20:.1f}"],
        ["output, MiB", f"{output_bytes / 2**20:.1f}"],
    ]
    print(text_table([f"conversion of {arguments.source.name}", ""], rows))
    facts = {"benchmark": "conversion", "model": arguments.source.name, **describe()}
    result = {
        "seconds": statistics.median(seconds),
        "ceiling_s": ceiling_s,
        "peak_mib": max(peaks),
        "source_bytes": source_bytes,
        "output_bytes": output_bytes,
    }
    print(json.dumps({**facts, **result}))


def _copy_seconds(source: Path, output: Path, scratch: Path) -> float:
    """Reads the source and writes as many bytes as the output has, to the disk."""
    start = time.perf_counter()
    for file in source.glob("*.safetensors"):
        file.read_bytes()
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    with open(scratch / "written", "wb") as file:
        file.write(os.urandom(1 << 20) * (size >> 20))
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
