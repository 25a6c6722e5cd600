"""The header of a converted checkpoint, ``dynaexq.json``: everything about it but its arrays."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from dynaexq_jax.checkpoint.files import FileRecord, FileRecords
from dynaexq_jax.checkpoint.units import UnitRecord, all_units
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.json_file import read_json_object
from dynaexq_jax.models.names import DENSE_BITS
from pallas_kernels.layout import LAYOUT_ID
from pallas_kernels.levels import LEVEL_BITS, LevelTable
from pallas_kernels.pages import ExpertFormat
from pallas_kernels.scales import ScaleEncoding

HEADER_NAME: Final = "dynaexq.json"
FORMAT_VERSION: Final = 1
_REMEDY: Final = "copy the checkpoint again or convert the model again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """Contents of ``dynaexq.json``; the fields are its keys."""

    table: LevelTable
    group_size: int
    scale_encoding: ScaleEncoding
    quantizer: dict[str, Any]
    """Name and settings of what chose the codes."""
    dense_bits: int
    """Of the matrices that are no expert's; 16 stands for the source's own dtype."""
    errors_by_level: dict[str, list[float]]
    """By bits "2", "4", "8": relative squared error of each sparse layer's expert weights."""
    benefit: list[list[list[float]]] | None
    """[L, S, E]: nats a token that a step of the ladder is worth to an expert, for a unit of
    hotness; None where the conversion ran no text."""
    pinned: list[list[int]]
    """[number of the layer, expert] pairs that are never demoted."""
    config: dict[str, Any]
    """The model's Hugging Face ``config.json``, as it was."""
    source: dict[str, Any]
    """Files of the model that was converted."""
    layers: list[int]
    """Numbers of the sparse layers: axis L of the expert arrays."""
    units: dict[str, UnitRecord]
    tokenizer_files: FileRecords
    """Files of the ``hf`` folder."""
    versions: dict[str, str]
    """Tools that wrote the checkpoint."""

    def write(self, folder: Path) -> None:
        """Writes the header. Raises OSError."""
        body = dataclasses.asdict(self)
        body = {"format_version": FORMAT_VERSION, "layout_id": LAYOUT_ID, **body}
        body["checksum"] = _checksum(body)
        (folder / HEADER_NAME).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Header":
        """Reads and checks a header. Raises InputError for everything that is wrong."""
        path = folder / HEADER_NAME
        body = read_json_object(path, _REMEDY)
        for key, known in (("format_version", FORMAT_VERSION), ("layout_id", LAYOUT_ID)):
            if body.get(key) != known:
                raise InputError(
                    f"{path}: {key} is {body.get(key)!r}, this version reads {known!r}; "
                    "convert the model again with this version, or use the one that wrote it"
                )
        checksum = body.pop("checksum", None)
        if checksum != _checksum(body):
            raise InputError(
                f"{path}: its checksum is {_checksum(body)[:16]}..., it says {checksum!r:.20}; "
                f"the header is damaged or was edited, {_REMEDY}"
            )
        body.setdefault("dense_bits", 16)  # checkpoints from before there was a choice
        body.setdefault("benefit", None)  # and from before it was measured
        try:
            fields: dict[str, Any] = {f.name: body[f.name] for f in dataclasses.fields(cls)}
            fields["table"] = LevelTable.from_json(body["table"])
            fields["units"] = {n: UnitRecord.from_json(r) for n, r in body["units"].items()}
            fields["tokenizer_files"] = {
                name: FileRecord.from_json(record)
                for name, record in body["tokenizer_files"].items()
            }
            header = cls(**fields)
            header._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: not a valid header ({error}); {_REMEDY}") from error
        return header

    def _check(self) -> None:
        """Raises ValueError where the parts contradict each other."""
        self.expert_format()
        config = self.model_config()
        if self.dense_bits not in DENSE_BITS:
            raise ValueError(f"dense_bits must be one of {DENSE_BITS}, got {self.dense_bits!r}")
        for name, found, wanted in (
            ("layers", self.layers, list(config.sparse_layers)),
            ("units", sorted(self.units), sorted(all_units(config))),
            ("levels of errors", list(self.errors_by_level), [str(bits) for bits in LEVEL_BITS]),
        ):
            if found != wanted:
                raise ValueError(f"{name} are {found}, its config asks for {wanted}")
        if self.benefit is not None:
            shape = (len(self.layers), len(LEVEL_BITS) - 1, config.num_experts)
            benefit = np.asarray(self.benefit, np.float64)
            if benefit.shape != shape:
                raise ValueError(f"benefit has shape {benefit.shape}, its config asks for {shape}")
            if not (benefit.min() >= 0 and benefit.max() < np.inf):
                raise ValueError("benefit must be finite and not negative")
        for layer, expert in self.pinned:
            if layer not in self.layers or not 0 <= expert < config.num_experts:
                raise ValueError(f"pinned expert {expert} of layer {layer} does not exist")

    def model_config(self) -> ModelConfig:
        """The model's config. Raises InputError."""
        return ModelConfig.from_hf(self.config)

    def expert_format(self) -> ExpertFormat:
        """Format of the packed experts. Raises ValueError."""
        config = self.model_config()
        return ExpertFormat(
            hidden=config.hidden_size,
            width=config.moe_intermediate_size,
            group_size=self.group_size,
            scale_encoding=self.scale_encoding,
            table=self.table,
        )


def _checksum(body: dict[str, Any]) -> str:
    """sha256 of a header without its checksum, in canonical JSON."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
