"""``dynaexq inspect``: what a model directory holds."""

import argparse
import json
from pathlib import Path
from typing import Any

from dynaexq_jax.checkpoint import Checkpoint, is_converted
from dynaexq_jax.cli.options import add_json, add_model
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.hf import HfDirectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_model(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the description; reads headers, no weights."""
    path: Path = arguments.model
    facts = _converted(path) if is_converted(path) else _hugging_face(path)
    if arguments.json:
        print(json.dumps(facts))
    else:
        _print(facts)
    return 0


def _converted(path: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(path)
    header, fmt = checkpoint.header, checkpoint.format
    experts = len(checkpoint.layers) * checkpoint.experts
    return {
        "kind": "converted checkpoint",
        "model": _model(checkpoint.config),
        "levels": {
            "bits": list(checkpoint.available_bits),
            "mean squared error": {
                bits: round(sum(errors) / len(errors), 8)
                for bits, errors in header.errors_by_level.items()
            },
        },
        "format": {
            "group size": fmt.group_size,
            "scale encoding": fmt.scale_encoding,
            "quantizer": header.quantizer,
            "dense bits": header.dense_bits,
            "level table": fmt.table.to_json(),
        },
        "bytes": {
            "page of an expert": fmt.page_bytes,
            "scales of an expert": fmt.scale_bytes,
            "all experts at 2 bits": experts * (fmt.page_bytes + fmt.scale_bytes),
        },
        "pinned experts": header.pinned,
        "versions": header.versions,
    }


def _hugging_face(path: Path) -> dict[str, Any]:
    source = HfDirectory.open(path)
    return {
        "kind": "Hugging Face model directory",
        "model": _model(source.config),
        "bytes": {
            "weights": sum(file.path.stat().st_size for file in source.files),
            "files": len(source.files),
        },
    }


def _model(config: ModelConfig) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "layers with experts": len(config.sparse_layers),
        "experts of a layer": config.num_experts,
        "experts of a token": config.num_experts_per_tok,
        "hidden size": config.hidden_size,
        "expert width": config.moe_intermediate_size,
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key-value, "
        f"size {config.head_dim}",
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "rope": config.rope.rope_type,
    }


def _print(facts: dict[str, Any]) -> None:
    for section, content in facts.items():
        if isinstance(content, dict):
            print(f"{section}:")
            for name, value in content.items():
                print(f"  {name:20} {_readable(value)}")
        else:
            print(f"{section}: {_readable(content)}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_readable, value)) + "]"
    return f"{value:,}" if isinstance(value, int) else str(value)
