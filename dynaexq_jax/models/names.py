"""Hugging Face tensor names and shapes of Qwen3-MoE: the one list that readers and models share.

Matrices keep the orientation of the hub, [outputs, inputs].
"""

from collections.abc import Mapping
from typing import Final

from dynaexq_jax.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

DENSE_BITS: Final = (16, 8)
"""What a converted checkpoint may hold dense matrices at; 16 stands for the source's own dtype."""
_MATRICES_AT_8_BITS: Final = (
    HEAD,
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def dense_shapes_outer(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors outside the layers: embedding, final norm and, when not tied, the head."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        FINAL_NORM: (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def dense_shapes_of_layer(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer that are not experts: attention, norms, router or dense MLP."""
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
    }
    if config.attention_bias:
        shapes |= {
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
            "self_attn.o_proj.bias": (hidden,),
        }
    if config.is_sparse(layer):
        shapes["mlp.gate.weight"] = (config.num_experts, hidden)
    else:
        shapes |= {
            "mlp.gate_proj.weight": (config.intermediate_size, hidden),
            "mlp.up_proj.weight": (config.intermediate_size, hidden),
            "mlp.down_proj.weight": (hidden, config.intermediate_size),
        }
    return {layer_prefix(layer) + name: shape for name, shape in shapes.items()}


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that is not an expert, by name."""
    shapes = dense_shapes_outer(config)
    for layer in range(config.num_hidden_layers):
        shapes |= dense_shapes_of_layer(config, layer)
    return shapes


def has_8_bits(name: str, dense_bits: int) -> bool:
    """Whether a tensor that is not an expert's is int8, with a scale for each row beside it.

    At 8 dense bits every matrix is, but the embedding and the routers.
    """
    return dense_bits == 8 and name.endswith(_MATRICES_AT_8_BITS)


def scale_name(name: str) -> str:
    """Name of the scales, float32 [N], of a matrix [N, K] at 8 bits."""
    return f"{name}_scale"


def with_scales(
    shapes: Mapping[str, tuple[int, ...]], dense_bits: int
) -> dict[str, tuple[int, ...]]:
    """``shapes`` and those of the scales that belong to them."""
    scales = {
        scale_name(name): shape[:1]
        for name, shape in shapes.items()
        if has_8_bits(name, dense_bits)
    }
    return {**shapes, **scales}


def expert_names(layer: int, expert: int) -> dict[str, str]:
    """Names of one expert's gate and up [F, H] and down [H, F]."""
    prefix = f"{layer_prefix(layer)}mlp.experts.{expert}."
    return {part: f"{prefix}{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")}
