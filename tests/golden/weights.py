"""Small random Qwen3-MoE models that any test can rebuild, bit for bit, without torch.

`CONFIGS` holds config.json contents by name and `tensors` the weights that belong to one: each
tensor is drawn from a generator seeded with its own Hugging Face name, so that neither the order
nor the set of the others matters. `make_goldens.py` gives the same weights to transformers and
stores what it answers; `digest` tells a test that its weights are those of the golden file.

Names are those on the hub (one tensor per expert), spelled out here on purpose: nothing of the
package under test is imported.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file


def _config(**changes: Any) -> dict[str, Any]:
    """A config.json with `changes` over a small default; a value None removes the key."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "eos_token_id": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 160,
        "max_position_embeddings": 256,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 256,
    }
    removed = {key for key, value in changes.items() if value is None}
    return {k: v for k, v in {**config, **changes}.items() if k not in removed}


def _saved(rope: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The same in the spelling that transformers 5 saves: no `num_experts`, no `rope_theta`."""
    return _config(
        num_experts=None,
        num_local_experts=8,
        torch_dtype=None,
        dtype="bfloat16",
        rope_theta=None,
        rope_parameters={"rope_theta": 10000.0, **rope},
        **changes,
    )


CONFIGS: dict[str, dict[str, Any]] = {
    # Two query heads share a key head; a width that fills no tile of 128.
    "plain": _config(moe_intermediate_size=48),
    "unnormalized_tied": _config(
        norm_topk_prob=False, tie_word_embeddings=True, num_key_value_heads=4, num_hidden_layers=3
    ),
    "bias": _config(attention_bias=True, hidden_size=96, head_dim=32, num_key_value_heads=1),
    "sparse_step": _config(decoder_sparse_step=2, num_hidden_layers=4, rope_theta=1000000.0),
    "dense_first": _saved(
        {"rope_type": "default"},
        mlp_only_layers=[0],
        num_hidden_layers=3,
        tie_word_embeddings=True,
        norm_topk_prob=False,
    ),
    "yarn": _config(
        head_dim=32,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn_explicit": _saved(
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.3,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "truncate": False,
        },
        head_dim=32,
    ),
    "yarn_mscale": _config(
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
    ),
    "linear": _config(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama3": _saved(
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        head_dim=32,
    ),
}


def sparse_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """The layers of `config` that hold experts."""
    return tuple(
        layer
        for layer in range(config["num_hidden_layers"])
        if layer not in config["mlp_only_layers"]
        and (layer + 1) % config["decoder_sparse_step"] == 0
    )


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model by its name on the hub, matrices as [out, in]."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    experts = config.get("num_experts") or config["num_local_experts"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    sparse = sparse_layers(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.q_norm.weight"] = (head_dim,)
        shapes[f"{prefix}.self_attn.k_norm.weight"] = (head_dim,)
        for name, out, width in (
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (out, width)
            if config["attention_bias"]:
                shapes[f"{prefix}.self_attn.{name}.bias"] = (out,)
        if layer in sparse:
            shapes[f"{prefix}.mlp.gate.weight"] = (experts, hidden)
            blocks = [f"{prefix}.mlp.experts.{expert}" for expert in range(experts)]
            width = config["moe_intermediate_size"]
        else:
            blocks, width = [f"{prefix}.mlp"], config["intermediate_size"]
        for block in blocks:
            shapes[f"{block}.gate_proj.weight"] = (width, hidden)
            shapes[f"{block}.up_proj.weight"] = (width, hidden)
            shapes[f"{block}.down_proj.weight"] = (hidden, width)
    return shapes


def _mean_and_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Chosen so that logits have a spread of a few units and all experts get their share."""
    if "norm" in name:
        return 1.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if name == "model.embed_tokens.weight":
        return 0.0, 0.2
    gain = 2.0 if name.endswith(".mlp.gate.weight") or name == "lm_head.weight" else 1.0
    return 0.0, gain / shape[-1] ** 0.5


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """The weights of `config` as bfloat16, by their names on the hub."""
    result = {}
    for name, shape in _shapes(config).items():
        mean, std = _mean_and_std(name, shape)
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = mean + std * generator.standard_normal(shape)
        result[name] = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    return result


def digest(weights: dict[str, np.ndarray]) -> str:
    """sha256 over names and bytes in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(name.encode())
        sha.update(weights[name].tobytes())
    return sha.hexdigest()


def write_directory(config: dict[str, Any], weights: dict[str, np.ndarray], path: Path) -> Path:
    """Writes config.json and one model.safetensors into `path`, as a download from the hub has."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
