"""A Hugging Face Qwen3-MoE directory: config and weights that are checked against each other."""

import dataclasses
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf.expected import check_tensors, fused_names
from dynaexq_jax.hf.safetensors_file import SafetensorsFile, Tensor
from dynaexq_jax.hf.shards import open_shards
from dynaexq_jax.json_file import read_json_object
from dynaexq_jax.models.names import dense_shapes, expert_names
from pallas_kernels.pages import Matrices

TOKENIZER_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What travels with the weights, where it exists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfDirectory:
    """An opened directory: every header was checked, no weight was loaded."""

    path: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    files: tuple[SafetensorsFile, ...]
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Checks config, index and all headers. Raises InputError for everything that is wrong."""
        path = Path(path)
        if not path.is_dir():
            raise InputError(
                f"{path}: no such directory; give a Hugging Face model directory "
                "(config.json and *.safetensors)"
            )
        raw = read_json_object(
            path / "config.json", "a Hugging Face model directory needs its config.json"
        )
        try:
            config = ModelConfig.from_hf(raw)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        files = open_shards(path)
        tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
        check_tensors(path, config, tensors)
        return cls(path=path, config=config, raw_config=raw, files=files, tensors=tensors)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor in its own dtype. Raises InputError if it holds NaN or infinity."""
        return self.tensors[name].read()

    def dense(self) -> dict[str, np.ndarray]:
        """Every tensor that is not an expert, by name; without the copy that a tied head has."""
        return {name: self.tensor(name) for name in dense_shapes(self.config)}

    def expert(self, layer: int, expert: int) -> Matrices:
        """gate_up [2F, H], gate first, and down [H, F] of one expert, in the dtype of the file."""
        fused = fused_names(layer)
        if fused.gate_up in self.tensors:
            return Matrices(*(self.tensors[name].read(expert) for name in fused))
        names = expert_names(layer, expert)
        gate, up, down = (self.tensor(names[n]) for n in ("gate_proj", "up_proj", "down_proj"))
        if gate.dtype != up.dtype:
            gate, up = gate.astype(np.float32), up.astype(np.float32)
        return Matrices(np.concatenate([gate, up]), down)

    @property
    def tokenizer_dir(self) -> Path:
        """Directory that holds the tokenizer's files."""
        return self.path
