"""What a conversion will do, known before it starts: its identity and the bytes it needs."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, Final

from dynaexq_jax.checkpoint.header import FORMAT_VERSION
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import TOKENIZER_FILES, HfDirectory
from dynaexq_jax.models.names import dense_shapes_of_layer, dense_shapes_outer, has_8_bits
from pallas_kernels.layout import LAYOUT_ID, PAGES
from pallas_kernels.pages import ExpertFormat

_BYTES_PER_UNIT: Final = 32 * 1024
"""Metadata and rounding to disk blocks of one unit."""
OUTER_STEP: Final = "outer"


def layer_step(layer: int) -> str:
    """Name of the step that converts a layer."""
    return f"layer_{layer:03d}"


def describe_source(source: HfDirectory) -> dict[str, Any]:
    """Files of the model, for the header: the same wherever and whenever they were copied."""
    return {
        "files": {
            file.path.name: {"nbytes": file.nbytes, "header_sha256": file.header_sha256}
            for file in source.files
        },
        "config_sha256": _sha256(source.raw_config),
    }


def describe_job(
    source: HfDirectory, fmt: ExpertFormat, quantizer: dict[str, Any], dense_bits: int
) -> dict[str, Any]:
    """Source and options, flat: an unfinished conversion is resumed only if all are the same.

    ``quantizer`` is its description. Weights could change under the same header, so times of
    modification count here.
    """
    job: dict[str, Any] = {
        "format version": FORMAT_VERSION,
        "layout": LAYOUT_ID,
        "group size": fmt.group_size,
        "scale encoding": fmt.scale_encoding,
        "level table": fmt.table.to_json(),
        "quantizer": quantizer,
        "dense bits": dense_bits,
        "sha256 of config.json": _sha256(source.raw_config),
    }
    for file in source.files:
        name = file.path.name
        job[f"bytes of {name}"] = file.nbytes
        job[f"header sha256 of {name}"] = file.header_sha256
        job[f"modification time of {name}"] = file.path.stat().st_mtime_ns
    return json.loads(json.dumps(job))


def bytes_by_step(source: HfDirectory, fmt: ExpertFormat, dense_bits: int) -> dict[str, int]:
    """Bytes that each step writes."""
    config = source.config
    expert = PAGES * fmt.page_bytes + fmt.scale_bytes

    def dense(shapes: dict[str, tuple[int, ...]]) -> int:
        total = _BYTES_PER_UNIT
        for name, shape in shapes.items():
            if has_8_bits(name, dense_bits):
                total += math.prod(shape) + 4 * shape[0]
            else:
                total += source.tensors[name].nbytes
        return total

    steps = {OUTER_STEP: dense(dense_shapes_outer(config))}
    for layer in range(config.num_hidden_layers):
        steps[layer_step(layer)] = dense(dense_shapes_of_layer(config, layer))
        if config.is_sparse(layer):
            steps[layer_step(layer)] += config.num_experts * expert + 4 * _BYTES_PER_UNIT
    steps["other files"] = sum(
        path.stat().st_size for name in TOKENIZER_FILES if (path := source.path / name).is_file()
    )
    return steps


def check_free_space(folder: Path, needed: int) -> None:
    """Raises InputError if the file system of ``folder`` has not that many bytes left."""
    available = shutil.disk_usage(folder).free
    if available < needed:
        raise InputError(
            f"{folder}: the conversion needs {needed:,} bytes of disk, {available:,} are "
            "available; make room or choose an output on another disk"
        )


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
