"""Models and options that are refused."""

import subprocess
import sys

import pytest

from convert import convert as run_convert
from dynaexq_jax.errors import InputError


def test_absurd_weight(tmp_path, tiny_model):
    tensors = tiny_model.make_tiny_model(tmp_path / "hf")
    tensors["model.layers.0.mlp.experts.2.down_proj.weight"][0, 0] = -1e35
    tiny_model.write_weights(tmp_path / "hf", tensors)
    with pytest.raises(InputError, match=r"layer 0, expert 2.*magnitude 1e\+35"):
        run_convert(tmp_path / "hf", tmp_path / "out", progress=False)


@pytest.mark.parametrize("width", [4, 84])
def test_expert_width_that_no_page_holds(tmp_path, make_tiny_model, width):
    make_tiny_model(tmp_path / "hf", moe_intermediate_size=width)
    message = rf"config\.json: moe_intermediate_size is {width}, .* a multiple of 8; .*unquantized"
    with pytest.raises(InputError, match=message):
        run_convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_that_cannot_be_read(tmp_path, make_tiny_model):
    make_tiny_model(tmp_path / "hf", tokenizer=True, vocab_size=8192)
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read the tokenizer in .*; copy its files again"):
        run_convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "options", [{"group_size": 48}, {"scale_encoding": "fp4"}, {"dense_bits": 4}]
)
def test_unknown_option(tmp_path, tiny_hf_dir, options):
    with pytest.raises(InputError, match="must be one of"):
        run_convert(tiny_hf_dir, tmp_path / "out", progress=False, **options)


def test_command_line_prints_one_line_for_bad_input(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "convert", str(tmp_path / "nowhere"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dynaexq: error: ")
    assert done.stderr.count("\n") == 1
