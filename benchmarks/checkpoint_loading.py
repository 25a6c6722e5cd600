"""Loading a converted checkpoint of the 30B shape from disk: GB/s to host memory, time to a token.

    python benchmarks/checkpoint_loading.py --layers 8 --budget 24GiB --out OUT

Writes a random checkpoint in the converted format (``write_checkpoint``; 8 of 48 layers are about
6.5 GB, all of them 33 GB), puts it out of the page cache, and reads it as serving does: every file
is verified. The ceiling is reading the same files without looking at them. Then an engine is
built from it, and one sequence decoded. The checkpoint is removed at the end. The last line is
JSON.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import full_size
import ml_dtypes
import numpy as np
from environment import describe
from random_source import BENEFIT, RandomSource

from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.checkpoint.header import Header
from dynaexq_jax.checkpoint.units import (
    DENSE_OUTER,
    HF_FOLDER,
    Arrays,
    UnitRecord,
    dense_unit,
    level_unit,
    save_unit,
    scales_unit,
)
from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.models.names import dense_shapes_of_layer, dense_shapes_outer
from dynaexq_jax.report.table import text_table
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import build_engine
from pallas_kernels.levels import LEVEL_BITS
from pallas_kernels.pages import Matrices

THREADS = 8
PIECE = 2**23


def main() -> None:
    """Writes, reads, serves; prints a table, then JSON."""
    options = _parse()
    serve = ServeConfig(hbm_budget=options.budget, context=options.context)
    prepare_device(serve.budget_bytes)
    folder = options.out / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    write_checkpoint(folder, options.layers, small=options.small)
    rows = [_rate("written", _bytes(folder), time.perf_counter() - start)]
    try:
        _evict(folder)
        start = time.perf_counter()
        _parallel(_read_through, _files(folder))
        rows.append(_rate("ceiling: files read", _bytes(folder), time.perf_counter() - start))
        rows += _read_parts(folder)
        _evict(folder)
        start = time.perf_counter()
        engine, plan = build_engine(Checkpoint.open(folder), serve)
        rows.append(_rate("engine built", _bytes(folder), time.perf_counter() - start))
        start = time.perf_counter()
        engine.add(np.arange(1, 9), max_tokens=8)
        tokens = [event.token for event in engine.run()]
        rows.append({"what": f"first {len(tokens)} tokens", "s": time.perf_counter() - start})
    finally:
        shutil.rmtree(folder)
    cells = [
        [row["what"], *(f"{row[k]:.2f}" if k in row else "" for k in ("gb", "s", "gb_s"))]
        for row in rows
    ]
    print(text_table(["", "GB", "s", "GB/s"], cells))
    facts = {"benchmark": "checkpoint_loading", **describe(), "layers": options.layers}
    result = {**facts, "base_bits": plan.base_bits, "pool_pages": plan.pool_pages, "rows": rows}
    (options.out / "checkpoint_loading.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def write_checkpoint(folder: Path, layers: int, *, small: bool = False) -> None:
    """A converted checkpoint of random numbers, without a tokenizer, in a new ``folder``."""
    changes = full_size.SMALL if small else {}
    raw = {**full_size.QWEN3_30B, **changes, "num_hidden_layers": layers}
    config = full_size.config(layers, small=small)
    shares = full_size.popularity("random", layers, config.num_experts)
    source = RandomSource.make(config, {"0": shares})
    (folder / HF_FOLDER).mkdir(parents=True)
    units: dict[str, UnitRecord] = {}

    def save(unit: str, arrays: Arrays) -> None:
        units[unit] = save_unit(folder, unit, arrays)

    def save_layers(unit_of: Callable[[int], str], of_layer: Callable[[int], Arrays]) -> None:
        _parallel(lambda layer: save(unit_of(layer), of_layer(layer)), range(layers))

    save(DENSE_OUTER, _random_tensors(dense_shapes_outer(config)))
    save_layers(dense_unit, lambda layer: _random_tensors(dense_shapes_of_layer(config, layer)))
    scales = source.scales()._asdict()
    arrays = {name: of_matrix.codes for name, of_matrix in scales.items()}
    if source.format.scale_encoding == "log8":
        arrays |= {f"{name}_base": of_matrix.base for name, of_matrix in scales.items()}
    save_layers(scales_unit, lambda layer: {name: a[layer] for name, a in arrays.items()})
    for bits in LEVEL_BITS:
        pages = source.level(bits)
        save_layers(
            lambda layer, bits=bits: level_unit(bits, layer),
            lambda layer, pages=pages: {
                n: np.stack([getattr(page, n)[layer] for page in pages], axis=1)
                for n in Matrices._fields
            },
        )
    errors = np.cumsum([0.2, *(-np.array(BENEFIT))])
    Header(
        table=source.format.table,
        group_size=source.format.group_size,
        scale_encoding=source.format.scale_encoding,
        quantizer={"name": "random"},
        dense_bits=16,
        errors_by_level={
            str(bits): [float(error)] * layers
            for bits, error in zip(LEVEL_BITS, errors, strict=True)
        },
        benefit=None,
        pinned=[],
        config=raw,
        source={},
        layers=list(config.sparse_layers),
        units=units,
        tokenizer_files={},
        versions={},
    ).write(folder)


def _random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    rng = np.random.Generator(np.random.SFC64(len(shapes)))

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in name:
            return np.ones(shape, ml_dtypes.bfloat16)
        spread = np.float32((12 / shape[-1]) ** 0.5)
        return ((rng.random(shape, np.float32) - np.float32(0.5)) * spread).astype(
            ml_dtypes.bfloat16
        )

    return {name: one(name, shape) for name, shape in shapes.items()}


def _read_parts(folder: Path) -> list[dict[str, Any]]:
    """Every part of the checkpoint, as loading reads it, verified."""
    checkpoint = Checkpoint.open(folder)
    parts = {
        "dense": checkpoint.dense,
        "scales": checkpoint.scales,
        **{f"level{bits}": lambda bits=bits: checkpoint.level(bits) for bits in LEVEL_BITS},
    }
    rows = []
    for name, read in parts.items():
        _evict(folder)
        start = time.perf_counter()
        read()
        rows.append(_rate(name, _bytes(folder / name), time.perf_counter() - start))
    return rows


def _rate(what: str, nbytes: int, seconds: float) -> dict[str, Any]:
    return {"what": what, "gb": nbytes / 1e9, "s": seconds, "gb_s": nbytes / 1e9 / seconds}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _evict(folder: Path) -> None:
    """Writes files to the disk and drops them from the page cache, where the system can."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read_through(path: Path) -> None:
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _parallel(function: Callable[[Any], object], items: Iterable[Any]) -> None:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(function, items))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--budget", default="24GiB", metavar="B")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--small", action="store_true", help="a tiny model, to check on a CPU")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    main()
