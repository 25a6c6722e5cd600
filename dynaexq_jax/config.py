"""Model configuration, read from a Hugging Face ``config.json`` in its old and new spellings."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from dynaexq_jax.errors import InputError

ARCHITECTURE = "Qwen3MoeForCausalLM"
MODEL_TYPE = "qwen3_moe"
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and its long-context variants.

    ``factor`` stretches the context that the model was trained on,
    ``original_max_position_embeddings`` tokens. ``beta_*``, ``truncate`` and ``attention_factor``
    are YaRN's (Peng et al., arXiv 2309.00071), ``*_freq_factor`` are those of Llama 3.1.
    """

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Qwen3-MoE model; hashable, so static under jit."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the dense layers' MLP."""
    moe_intermediate_size: int
    """Width of one expert."""
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    attention_bias: bool
    tie_word_embeddings: bool
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim moe_intermediate_size num_experts num_experts_per_tok decoder_sparse_step "
            "max_position_embeddings"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise InputError(f"config: {name} must be positive, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"config: head_dim must be even for RoPE, got {self.head_dim}")
        if outside := [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]:
            raise InputError(
                f"config: mlp_only_layers names layer {outside[0]}, but the layers are "
                f"0..{self.num_hidden_layers - 1}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} is more than "
                f"num_experts {self.num_experts}"
            )
        if not self.sparse_layers:
            raise InputError(
                f"config: no layer has experts (decoder_sparse_step {self.decoder_sparse_step}, "
                f"mlp_only_layers {list(self.mlp_only_layers)}, {self.num_hidden_layers} layers); "
                "a model without experts has nothing to convert"
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that hold experts: axis L of every expert array, in this order."""
        return tuple(filter(self.is_sparse, range(self.num_hidden_layers)))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Self:
        """Reads the contents of a ``config.json``. Raises InputError for what is not served."""
        architectures = raw.get("architectures") or []
        if raw.get("model_type") != MODEL_TYPE or architectures not in ([], [ARCHITECTURE]):
            raise InputError(
                f"config: unknown architecture {architectures} (model_type "
                f"{raw.get('model_type')!r}); this version serves {ARCHITECTURE} "
                f"(model_type {MODEL_TYPE!r})"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise InputError(f"config: hidden_act must be 'silu', got {raw['hidden_act']!r}")
        if raw.get("use_sliding_window"):
            raise InputError(
                "config: use_sliding_window is true; sliding-window attention is not served, "
                "set it to false to use full attention"
            )
        read = _Reader(raw)
        heads = read.integer("num_attention_heads")
        hidden = read.integer("hidden_size")
        max_positions = read.integer("max_position_embeddings", 32768)
        return cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden,
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.integer("num_key_value_heads", heads),
            head_dim=read.integer("head_dim", hidden // max(heads, 1)),
            intermediate_size=read.integer("intermediate_size", 0),
            moe_intermediate_size=read.integer("moe_intermediate_size"),
            num_experts=read.experts(),
            num_experts_per_tok=read.integer("num_experts_per_tok"),
            norm_topk_prob=read.boolean("norm_topk_prob"),
            decoder_sparse_step=read.integer("decoder_sparse_step", 1),
            mlp_only_layers=read.integers("mlp_only_layers"),
            attention_bias=read.boolean("attention_bias"),
            tie_word_embeddings=read.boolean("tie_word_embeddings"),
            rms_norm_eps=read.number(raw, "rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            rope=read.rope(max_positions),
            eos_token_ids=read.integers("eos_token_id"),
        )


class _Reader:
    """Typed look-ups that name the key in their errors."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._raw.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"config: {key} is missing; add it to config.json")
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"config: {key} must be an integer, got {value!r}")
        return value

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self._raw.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"config: {key} must be true or false, got {value!r}")
        return value

    def number(self, source: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = source.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"config: {key} is missing; add it to config.json")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InputError(f"config: {key} must be a positive number, got {value!r}")
        return float(value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self._raw.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise InputError(f"config: {key} must hold integers, got {value!r}")
        return tuple(values)

    def experts(self) -> int:
        keys = [key for key in ("num_experts", "num_local_experts") if key in self._raw]
        given = {key: self.integer(key) for key in keys or ["num_experts"]}
        if len(set(given.values())) > 1:
            raise InputError(f"config: num_experts and num_local_experts differ: {given}")
        return next(iter(given.values()))

    def rope(self, max_positions: int) -> RopeConfig:
        scaling = self._raw.get("rope_scaling") or self._raw.get("rope_parameters") or {}
        if not isinstance(scaling, Mapping):
            raise InputError(f"config: rope_parameters must be an object, got {scaling!r}")
        theta = self.number(scaling, "rope_theta", self.number(self._raw, "rope_theta", 10000.0))
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise InputError(f"config: rope_type must be one of {ROPE_TYPES}, got {rope_type!r}")
        read = _Reader(scaling)
        original = read.integer("original_max_position_embeddings", max_positions)
        if original < 1:
            raise InputError(
                f"config: original_max_position_embeddings must be positive, got {original}"
            )
        if rope_type == "default":
            return RopeConfig(theta=theta, original_max_position_embeddings=original)
        factor = self.number(scaling, "factor", max_positions / original)
        attention_factor = 1.0
        if rope_type == "yarn":
            attention_factor = self.number(
                scaling, "attention_factor", self.yarn_attention_factor(scaling, factor)
            )
        return RopeConfig(
            theta=theta,
            rope_type=rope_type,
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=attention_factor,
            beta_fast=self.number(scaling, "beta_fast", 32.0),
            beta_slow=self.number(scaling, "beta_slow", 1.0),
            truncate=read.boolean("truncate", True),
            low_freq_factor=self.number(scaling, "low_freq_factor", 1.0),
            high_freq_factor=self.number(scaling, "high_freq_factor", 4.0),
        )

    def yarn_attention_factor(self, scaling: Mapping[str, Any], factor: float) -> float:
        """Temperature of YaRN's attention (arXiv 2309.00071, eq. 22), or a ratio of two such."""

        def temperature(mscale: float) -> float:
            return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            mscale = self.number(scaling, "mscale")
            return temperature(mscale) / temperature(self.number(scaling, "mscale_all_dim"))
        return temperature(1.0)
