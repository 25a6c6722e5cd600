"""What arrives in the checkpoint."""

import json
import subprocess
import sys

import numpy as np
import pytest
from checkpoint.conversion import assert_holds, converted, hashes
from checkpoint.stored import StoredExperts

from convert.quantize import GridQuantizer
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.hf import HfDirectory
from pallas_kernels.layout import LAYOUT_ID
from pallas_kernels.levels import LEVEL_BITS


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({}, {}),
        ({"shards": 3, "fused": True}, {"scale_encoding": "bf16"}),
        ({"mlp_only_layers": [0], "attention_bias": True}, {"group_size": 64}),
        ({"tie_word_embeddings": False, "dtype": np.float32}, {"group_size": 128}),
        ({"head_of_tied": True, "dtype": np.float16}, {"group_size": 16}),
        ({"mlp_only_layers": [0], "tie_word_embeddings": False}, {"dense_bits": 8}),
        ({"attention_bias": True, "dtype": np.float32}, {"dense_bits": 8}),
    ],
)
def test_checkpoint_holds_the_model(tmp_path, make_tiny_model, layout, options):
    make_tiny_model(tmp_path / "hf", **layout)
    checkpoint, summary = converted(tmp_path / "hf", tmp_path / "out", **options)
    source = HfDirectory.open(tmp_path / "hf")
    assert_holds(checkpoint, source)
    assert checkpoint.config == source.config
    assert checkpoint.format.group_size == options.get("group_size", 32)
    assert checkpoint.format.scale_encoding == options.get("scale_encoding", "log8")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out"]
    assert summary.nbytes == sum(
        p.stat().st_size for p in checkpoint.path.rglob("*") if p.is_file()
    )
    assert summary.resumed_steps == 0


def test_errors_in_the_header_are_those_of_the_weights(tmp_path, make_tiny_model):
    """Independently: pages and scales as read back, against the weights."""
    make_tiny_model(tmp_path / "hf")
    checkpoint, summary = converted(tmp_path / "hf", tmp_path / "out")
    source = HfDirectory.open(tmp_path / "hf")
    stored = StoredExperts(checkpoint)
    found = np.zeros((3, 2))
    for row, layer in enumerate(checkpoint.layers):
        errors, energy = np.zeros(3), 0.0
        for expert in range(checkpoint.experts):
            matrices = zip(source.expert(layer, expert), stored.expert(row, expert), strict=True)
            for matrix, (codes, scale) in matrices:
                weights = matrix.astype(np.float64)
                energy += np.sum(weights**2)
                for level, bits in enumerate(LEVEL_BITS):
                    values = checkpoint.format.table.values(bits)[codes >> (8 - bits)] * scale
                    errors[level] += np.sum((weights - values) ** 2)
        found[:, row] = errors / energy
    recorded = [checkpoint.header.errors_by_level[str(bits)] for bits in LEVEL_BITS]
    np.testing.assert_allclose(found, recorded, rtol=1e-4)
    np.testing.assert_allclose(list(summary.errors_by_bits.values()), found.mean(axis=1), rtol=1e-4)


def test_same_input_gives_the_same_arrays(tmp_path, make_tiny_model):
    """Also from another layout on disk, and in another process with one thread less."""
    make_tiny_model(tmp_path / "hf")
    make_tiny_model(tmp_path / "fused", shards=2, fused=True)
    first, _ = converted(tmp_path / "hf", tmp_path / "a")
    second, _ = converted(tmp_path / "hf", tmp_path / "b")
    fused, _ = converted(tmp_path / "fused", tmp_path / "c")
    command = [sys.executable, "-m", "convert", str(tmp_path / "hf"), str(tmp_path / "d")]
    done = subprocess.run(["taskset", "-c", "0", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 bits" in done.stdout
    assert "peak memory" in done.stdout
    expected = hashes(first)
    assert hashes(second) == hashes(fused) == hashes(Checkpoint.open(tmp_path / "d")) == expected


def test_other_files_travel(tmp_path, make_tiny_model):
    make_tiny_model(tmp_path / "hf", tokenizer=True, vocab_size=8192)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "hf" / "pytorch_model.bin").write_text("stays behind")
    checkpoint, _ = converted(tmp_path / "hf", tmp_path / "out")
    names = sorted(path.name for path in checkpoint.tokenizer_dir.iterdir())
    assert names == [
        "chat_template.jinja",
        "config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        original = (tmp_path / "hf" / name).read_bytes()
        assert (checkpoint.tokenizer_dir / name).read_bytes() == original


def test_header(tmp_path, tiny_hf_dir):
    converted(tiny_hf_dir, tmp_path / "out")
    header = json.loads((tmp_path / "out" / "dynaexq.json").read_text())
    assert header["format_version"] == 1
    assert header["layout_id"] == LAYOUT_ID
    assert header["quantizer"] == GridQuantizer().describe()
    assert header["dense_bits"] == 16
    assert header["config"] == json.loads((tiny_hf_dir / "config.json").read_text())
    assert header["layers"] == [0, 1]
    assert header["pinned"] == []
    source = header["source"]["files"]["model.safetensors"]
    assert source["nbytes"] == (tiny_hf_dir / "model.safetensors").stat().st_size
    pages = header["units"]["level8/layer_001"]["arrays"]["gate_up"]
    assert pages["dtype"] == "uint32"
    assert pages["shape"] == [4, 2, 3, 2, 256]  # 160 rows: 3 tiles of 64
