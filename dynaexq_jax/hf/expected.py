"""Checks the tensors of a model against its config: each wanted once, each of the right shape."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf.safetensors_file import Tensor
from dynaexq_jax.models.names import EMBEDDING, HEAD, dense_shapes, expert_names, layer_prefix
from pallas_kernels.pages import Matrices

_LAYER: Final = re.compile(r"model\.layers\.(\d{1,9})\.")
_EXPERT: Final = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(\d{1,9})\.")
_COMPARE_BYTES: Final = 1 << 24


def fused_names(layer: int) -> Matrices:
    """Names of a layer's experts where they are stored as [E, 2F, H] and [E, H, F]."""
    prefix = f"{layer_prefix(layer)}mlp.experts."
    return Matrices(f"{prefix}gate_up_proj", f"{prefix}down_proj")


def check_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError where weights and config contradict each other, a tensor is missing, not
    known or of a wrong shape, or a tied head differs from the embedding."""
    _check_counts(path, config, tensors)
    wanted = dense_shapes(config)
    for layer in config.sparse_layers:
        wanted |= _expert_shapes(config, layer, tensors)
    for name in wanted:
        if name not in tensors:
            raise InputError(
                f"{path}: tensor {name} is missing; it must have shape {list(wanted[name])}, "
                "use a complete copy of the model"
            )
        if tensors[name].shape != wanted[name]:
            raise InputError(
                f"{tensors[name].path}: {name} has shape {list(tensors[name].shape)}, "
                f"config.json asks for {list(wanted[name])}; use the config of these weights"
            )
    extra = sorted(set(tensors) - set(wanted))
    if config.tie_word_embeddings and HEAD in extra:
        _check_tied_head(tensors)
        extra.remove(HEAD)
    if extra:
        raise InputError(
            f"{tensors[extra[0]].path}: {len(extra)} tensors do not belong to a Qwen3-MoE model "
            f"with this config.json, first {extra[0]}; use the config of these weights"
        )


def _expert_shapes(
    config: ModelConfig, layer: int, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's experts in the layout in which they are stored."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    fused = fused_names(layer)
    if fused.gate_up in tensors:
        return {
            fused.gate_up: (config.num_experts, 2 * width, hidden),
            fused.down: (config.num_experts, hidden, width),
        }
    return {
        name: (hidden, width) if part == "down_proj" else (width, hidden)
        for expert in range(config.num_experts)
        for part, name in expert_names(layer, expert).items()
    }


def _check_counts(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """The sizes that a wrong config.json contradicts first, so that the error can name them."""
    found = {"num_hidden_layers": 1 + max(_numbers(_LAYER, tensors), default=-1)}
    fused = [fused_names(layer).gate_up for layer in config.sparse_layers]
    stacked = [tensors[name].shape[0] for name in fused if name in tensors and tensors[name].shape]
    experts = max([*(1 + n for n in _numbers(_EXPERT, tensors)), *stacked], default=0)
    if experts:
        found["num_experts"] = experts
    if EMBEDDING in tensors and len(tensors[EMBEDDING].shape) == 2:
        found["vocab_size"], found["hidden_size"] = tensors[EMBEDDING].shape
    for name, value in found.items():
        if value != getattr(config, name):
            raise InputError(
                f"{path}: config.json says {name} {getattr(config, name)}, the weights have "
                f"{value}; use the config of these weights"
            )


def _numbers(pattern: re.Pattern[str], tensors: Mapping[str, Tensor]) -> set[int]:
    return {int(match[1]) for name in tensors if (match := pattern.match(name))}


def _check_tied_head(tensors: Mapping[str, Tensor]) -> None:
    """A tied model may carry its head as a second copy of the embedding, but no other head."""
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same or not _same_bytes(head, embedding):
        raise InputError(
            f"{head.path}: config.json says tie_word_embeddings true, but {HEAD} differs from "
            f"{EMBEDDING}; set tie_word_embeddings to false to use this head"
        )


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    for start in range(0, a.nbytes, _COMPARE_BYTES):
        count = min(_COMPARE_BYTES, a.nbytes - start)
        parts = [np.fromfile(t.path, np.uint8, count, offset=t.begin + start) for t in (a, b)]
        if not np.array_equal(parts[0], parts[1]):
            return False
    return True
