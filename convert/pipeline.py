"""The conversion as a whole: step by step, each step durable before the next one starts."""

import contextlib
import dataclasses
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from tqdm import tqdm

from convert.calibration import CalibratedConverter, CalibrationConfig, read_calibration
from convert.dense import dense_arrays
from convert.joint import JointQuantizer
from convert.layers import Converter, LayerConverter, Record, save_units
from convert.plan import (
    OUTER_STEP,
    bytes_by_step,
    check_free_space,
    describe_job,
    describe_source,
    layer_step,
)
from convert.quantize import GridQuantizer
from convert.workdir import WorkDir, reporting_write_errors
from dynaexq_jax.checkpoint import is_converted
from dynaexq_jax.checkpoint.files import record_files
from dynaexq_jax.checkpoint.header import Header
from dynaexq_jax.checkpoint.units import DENSE_OUTER, HF_FOLDER, UnitRecord
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import TOKENIZER_FILES, HfDirectory
from dynaexq_jax.models.names import DENSE_BITS, dense_shapes_outer
from dynaexq_jax.text.tokenizer import load_tokenizer
from pallas_kernels.levels import DEFAULT_TABLE, LEVEL_BITS
from pallas_kernels.pages import GATE_UP_ROWS, ExpertFormat
from pallas_kernels.scales import GROUP_SIZES, SCALE_ENCODINGS, ScaleEncoding

DEFAULT_GROUP_SIZE: Final = 32
DEFAULT_SCALE_ENCODING: Final = "log8"
"""The bytes of 64 and bf16, less error at every level: ``docs/results/quantizer.md``."""
DEFAULT_DENSE_BITS: Final = 16
_TOOLS: Final = ("jax", "numpy", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion did."""

    output: Path
    seconds: float
    """Of this run, reading and writing included."""
    nbytes: int
    """Of all files of the output."""
    errors_by_bits: dict[int, float]
    """Relative squared error of the expert weights, mean over the layers."""
    peak_rss_bytes: int
    """Of this process so far."""
    resumed_steps: int
    """Steps that an earlier, unfinished run had done."""
    super_experts: tuple[tuple[int, int], ...]
    """(number of the layer, expert) of those that are pinned."""


def convert(
    source: str | Path,
    output: str | Path,
    *,
    group_size: int = DEFAULT_GROUP_SIZE,
    scale_encoding: ScaleEncoding = DEFAULT_SCALE_ENCODING,
    dense_bits: int = DEFAULT_DENSE_BITS,
    calibration: CalibrationConfig | None = None,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Converts a Hugging Face directory to a checkpoint; ``output`` appears only when whole.

    With ``calibration`` the experts are quantized for the text that reaches them, on JAX's default
    device; without, data-free, on the CPU. Works in ``output`` + ".partial" and resumes what a
    killed run left there. ``force`` replaces an output that exists, at the end, and drops
    unfinished work of other options. Raises InputError.
    """
    started = time.monotonic()
    for name, value, known in (
        ("group size", group_size, GROUP_SIZES),
        ("scale encoding", scale_encoding, SCALE_ENCODINGS),
        ("dense bits", dense_bits, DENSE_BITS),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {known}, got {value!r}")
    if is_converted(source):
        raise InputError(
            f"{source}: is a converted checkpoint; give the Hugging Face directory that it was "
            "converted from"
        )
    model = HfDirectory.open(source)
    if (model.tokenizer_dir / "tokenizer.json").exists():
        load_tokenizer(model.tokenizer_dir)  # one that cannot be read is reported now
    width = model.config.moe_intermediate_size
    if width % GATE_UP_ROWS:
        raise InputError(
            f"{model.path / 'config.json'}: moe_intermediate_size is {width}, a converted "
            f"checkpoint needs a multiple of {GATE_UP_ROWS}; this model can only be served as it "
            "is, unquantized"
        )
    fmt = ExpertFormat(
        hidden=model.config.hidden_size,
        width=width,
        group_size=group_size,
        scale_encoding=scale_encoding,
        table=DEFAULT_TABLE,
    )
    job = _Job(source=model, fmt=fmt, dense_bits=dense_bits)
    output = Path(output)
    make = _data_free(job) if calibration is None else _calibrated(job, calibration)
    with WorkDir(output.absolute(), force=force) as work, _device(calibration):
        converter = make(work)
        work.start(describe_job(model, fmt, converter.describe_quantizer(), dense_bits))
        records, resumed = _run_steps(work, job, converter, progress)
        with reporting_write_errors(work.checkpoint):
            _copy_other_files(model, work.checkpoint / HF_FOLDER)
            header = _header(job, converter, records, work.checkpoint)
            header.write(work.checkpoint)
        work.publish()
    return Summary(
        output=output,
        seconds=time.monotonic() - started,
        nbytes=sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
        errors_by_bits={
            bits: float(np.mean(header.errors_by_level[str(bits)])) for bits in LEVEL_BITS
        },
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        resumed_steps=resumed,
        super_experts=tuple((layer, expert) for layer, expert in header.pinned),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """What every part of a conversion needs to know."""

    source: HfDirectory
    fmt: ExpertFormat
    dense_bits: int


def _data_free(job: _Job) -> Callable[[WorkDir], Converter]:
    return lambda work: LayerConverter(
        source=job.source,
        fmt=job.fmt,
        quantizer=GridQuantizer(),
        dense_bits=job.dense_bits,
        output=work.checkpoint,
    )


def _calibrated(job: _Job, calibration: CalibrationConfig) -> Callable[[WorkDir], Converter]:
    """Reads the text now: what is wrong with it is reported before there is a work folder."""
    text = read_calibration(calibration, job.source)
    return lambda work: CalibratedConverter(
        source=job.source,
        fmt=job.fmt,
        quantizer=JointQuantizer(),
        dense_bits=job.dense_bits,
        output=work.checkpoint,
        text=text,
        folder=work.hidden,
    )


def _device(calibration: CalibrationConfig | None) -> AbstractContextManager[Any]:
    """Without text on the CPU wherever we are: the same arrays on every machine."""
    if calibration is not None:
        return contextlib.nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def _run_steps(
    work: WorkDir, job: _Job, converter: Converter, progress: bool
) -> tuple[dict[str, Record], int]:
    """Records of all steps, by name, and how many an earlier run had done."""
    model = job.source
    planned = bytes_by_step(model, job.fmt, job.dense_bits)
    records = {step: record for step in planned if (record := work.finished(step)) is not None}
    layers = range(model.config.num_hidden_layers)
    todo = converter.todo([layer for layer in layers if layer_step(layer) not in records])
    for layer in todo:
        records.pop(layer_step(layer), None)
    resumed = len(records)
    needed = sum(nbytes for step, nbytes in planned.items() if step not in records)
    check_free_space(work.checkpoint, needed + converter.extra_bytes())
    if OUTER_STEP not in records:
        outer = dense_arrays(model, dense_shapes_outer(model.config), job.dense_bits)
        record = {"units": save_units(work.checkpoint, {DENSE_OUTER: outer}), "errors": None}
        work.finish(OUTER_STEP, record)
        records[OUTER_STEP] = record
    experts = model.config.num_experts * sum(map(model.config.is_sparse, todo))
    with tqdm(total=experts, unit="expert", desc="converting", disable=not progress) as bar:
        for layer in todo:
            record = converter.convert(layer, bar.update)
            work.finish(layer_step(layer), record)
            converter.finished(layer)
            records[layer_step(layer)] = record
    return records, resumed


def _copy_other_files(model: HfDirectory, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)


def _header(
    job: _Job, converter: Converter, records: dict[str, Record], checkpoint: Path
) -> Header:
    model, fmt = job.source, job.fmt
    layers = list(model.config.sparse_layers)
    knowledge = converter.knowledge([records[layer_step(layer)] for layer in layers])
    errors = [records[layer_step(layer)]["errors"] for layer in layers]
    return Header(
        table=fmt.table,
        group_size=fmt.group_size,
        scale_encoding=fmt.scale_encoding,
        quantizer=converter.describe_quantizer(),
        dense_bits=job.dense_bits,
        errors_by_level={str(b): [e[i] for e in errors] for i, b in enumerate(LEVEL_BITS)},
        benefit=knowledge.benefit,
        pinned=[list(pair) for pair in knowledge.pinned],
        config=model.raw_config,
        source=describe_source(model),
        layers=layers,
        units={
            unit: UnitRecord.from_json(data)
            for record in records.values()
            for unit, data in record["units"].items()
        },
        tokenizer_files=record_files(checkpoint / HF_FOLDER),
        versions={name: metadata.version(name) for name in _TOOLS},
    )
