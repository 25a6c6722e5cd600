"""Serves Qwen3-MoE models on one GPU, with expert precision that follows the traffic.

import dynaexq_jax as dx
llm = dx.load("nano-converted", hbm_budget="16MiB")
print(llm.generate("def main(", max_tokens=32))
"""

from typing import TYPE_CHECKING, Any

from dynaexq_jax.errors import InputError

if TYPE_CHECKING:
    from dynaexq_jax.engine.sampling import SamplingParams
    from dynaexq_jax.serving.llm import LLM, Piece
    from dynaexq_jax.serving.llm import load as load

__all__ = ["LLM", "InputError", "Piece", "SamplingParams", "load"]

_HOME_OF = {
    "LLM": "dynaexq_jax.serving.llm",
    "Piece": "dynaexq_jax.serving.llm",
    "SamplingParams": "dynaexq_jax.engine.sampling",
    "load": "dynaexq_jax.serving.llm",
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that parts stay free of JAX."""
    import importlib

    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
