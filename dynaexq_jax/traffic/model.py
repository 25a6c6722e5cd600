"""The model that a file of traffic belongs to, as far as routing is concerned."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from dynaexq_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedModel:
    """Sizes that a router mass [layers, experts] depends on. Two models may share them."""

    layers: int
    """Layers with experts."""
    experts: int
    """Of a layer."""
    experts_per_token: int
    hidden_size: int

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Those of a model's configuration."""
        return cls(
            layers=len(config.sparse_layers),
            experts=config.num_experts,
            experts_per_token=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads what ``dataclasses.asdict`` gives. Raises ValueError."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or data.keys() != names:
            raise ValueError(f"a model has {sorted(names)}, got {data!r}")
        if any(type(size) is not int or size < 1 for size in data.values()):
            raise ValueError(f"sizes of a model must be positive integers, got {data!r}")
        return cls(**data)

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of {self.experts} experts, {self.experts_per_token} a token, "
            f"hidden size {self.hidden_size}"
        )
