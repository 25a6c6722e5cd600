"""Writes small Qwen3-MoE directories as the hub lays them out, with seeded random weights."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.names import HEAD, dense_shapes, expert_names, layer_prefix

NANO = Path(__file__).parents[1] / "examples" / "nano-moe"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 8189,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 112,
    "max_position_embeddings": 256,
    "mlp_only_layers": [],
    "moe_intermediate_size": 80,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 64,
}
"""Neither columns nor rows of the experts fill the layout's chunks and tiles."""


def make_tiny_model(
    path: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    fused: bool = False,
    head_of_tied: bool = False,
    tokenizer: bool = False,
    dtype: type = ml_dtypes.bfloat16,
    **config_overrides: object,
) -> dict[str, np.ndarray]:
    """Writes a model; returns its tensors as they were written.

    ``fused`` stacks the experts of a layer, ``head_of_tied`` stores the head of a tied model too.
    Give ``vocab_size=8192`` with ``tokenizer``, which copies the tokenizer of the shipped model.
    """
    raw = CONFIG | config_overrides
    config = ModelConfig.from_hf(raw)
    rng = np.random.default_rng(seed)

    def random(shape: tuple[int, ...]) -> np.ndarray:
        return (0.05 * rng.standard_normal(shape)).astype(dtype)

    tensors = {
        name: (1 + random(shape)).astype(dtype) if "norm" in name else random(shape)
        for name, shape in dense_shapes(config).items()
    }
    if head_of_tied:
        tensors[HEAD] = tensors["model.embed_tokens.weight"].copy()
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    for layer in config.sparse_layers:
        gate, up = random((experts, width, hidden)), random((experts, width, hidden))
        down = random((experts, hidden, width))
        if fused:
            prefix = f"{layer_prefix(layer)}mlp.experts."
            tensors[f"{prefix}gate_up_proj"] = np.concatenate([gate, up], axis=1)
            tensors[f"{prefix}down_proj"] = down
            continue
        for expert in range(experts):
            names = expert_names(layer, expert)
            tensors[names["gate_proj"]] = gate[expert]
            tensors[names["up_proj"]] = up[expert]
            tensors[names["down_proj"]] = down[expert]
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(raw, indent=1))
    write_weights(path, tensors, shards)
    if tokenizer:
        for file in NANO.glob("*token*.json"):
            shutil.copy(file, path)
    return tensors


def write_weights(path: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Writes tensors to one file, or spreads them over shards with an index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    (path / "model.safetensors.index.json").write_text(
        json.dumps(index | {"weight_map": weight_map})
    )
