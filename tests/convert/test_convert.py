"""The conversion as a whole: what arrives in the checkpoint, and what bad input leaves behind."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from checkpoint.stored import StoredExperts

import convert.pipeline
import convert.plan
import convert.workdir
from convert import convert as run_convert
from convert.dense import quantize_rows
from convert.encode import encode_expert
from convert.quantize import GridQuantizer
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from pallas_kernels.layout import LAYOUT_ID
from pallas_kernels.levels import LEVEL_BITS
from pallas_kernels.pages import Matrices

AT_8_BITS = tuple(
    f"{name}.weight"
    for name in (
        "lm_head",
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
)


def converted(source, output, **options):
    summary = run_convert(source, output, progress=False, **options)
    return Checkpoint.open(output), summary


def hashes(checkpoint):
    """sha256 of every array."""
    return {
        (unit, name): record.sha256
        for unit, units in checkpoint.header.units.items()
        for name, record in units.arrays.items()
    }


def assert_holds(checkpoint, source):
    """The checkpoint holds what its source means: dense arrays by its header, experts encoded."""
    wanted = source.dense()
    if checkpoint.header.dense_bits == 8:
        for name in [name for name in wanted if name.endswith(AT_8_BITS)]:
            wanted[name], wanted[f"{name}_scale"] = quantize_rows(wanted[name])
    dense = checkpoint.dense()
    assert set(dense) == set(wanted)
    for name, array in wanted.items():
        assert dense[name].dtype == array.dtype
        np.testing.assert_array_equal(dense[name], array)
    pages = [page for bits in LEVEL_BITS for page in checkpoint.level(bits)]
    scales = checkpoint.scales()
    for row, layer in enumerate(checkpoint.layers):
        for expert in range(checkpoint.experts):
            weights = Matrices(*(w.astype(np.float32) for w in source.expert(layer, expert)))
            encoded = encode_expert(weights, checkpoint.format, GridQuantizer())
            for name, matrix in encoded._asdict().items():
                found = np.stack([getattr(page, name)[row, expert] for page in pages])
                np.testing.assert_array_equal(found, matrix.pages)
                of_all = getattr(scales, name)
                np.testing.assert_array_equal(of_all.codes[row, expert], matrix.scales.codes)
                if matrix.scales.base is not None:
                    np.testing.assert_array_equal(of_all.base[row, expert], matrix.scales.base)


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


class TestOutput:
    def test_that_exists_is_kept(self, tmp_path, tiny_hf_dir):
        checkpoint, _ = converted(tiny_hf_dir, tmp_path / "out")
        before = (tmp_path / "out" / "dynaexq.json").read_bytes()
        with pytest.raises(InputError, match=r"out: output exists.*--force"):
            run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
        assert (checkpoint.path / "dynaexq.json").read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_that_exists_is_replaced_with_force(self, tmp_path, tiny_hf_dir):
        converted(tiny_hf_dir, tmp_path / "out")
        checkpoint, _ = converted(tiny_hf_dir, tmp_path / "out", group_size=64, force=True)
        assert checkpoint.format.group_size == 64
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_that_exists_survives_a_failure_under_force(self, tmp_path, tiny_model, tiny_hf_dir):
        before, _ = converted(tiny_hf_dir, tmp_path / "out")
        tensors = tiny_model.make_tiny_model(tmp_path / "bad")
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = np.nan
        tiny_model.write_weights(tmp_path / "bad", tensors)
        with pytest.raises(InputError, match="NaN"):
            run_convert(tmp_path / "bad", tmp_path / "out", force=True, progress=False)
        assert_holds(Checkpoint.open(tmp_path / "out"), HfDirectory.open(tiny_hf_dir))
        assert hashes(Checkpoint.open(tmp_path / "out")) == hashes(before)

    def test_force_does_not_replace_what_is_no_checkpoint(self, tmp_path, tiny_hf_dir):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("precious")
        with pytest.raises(InputError, match="not a converted checkpoint"):
            run_convert(tiny_hf_dir, tmp_path / "out", force=True, progress=False)
        assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"

    def test_foreign_partial_folder_is_kept(self, tmp_path, tiny_hf_dir):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
        with pytest.raises(InputError, match=r"thesis\.txt"):
            run_convert(tiny_hf_dir, tmp_path / "out", force=True, progress=False)
        assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"
        assert len(list((tmp_path / "out.partial").iterdir())) == 1

    def test_whose_parent_is_a_file(self, tmp_path, tiny_hf_dir):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be written"):
            run_convert(tiny_hf_dir, tmp_path / "file" / "out", progress=False)

    def test_whose_parents_are_missing(self, tmp_path, tiny_hf_dir):
        assert converted(tiny_hf_dir, tmp_path / "a" / "b" / "out")[0].experts == 4

    def test_appears_whole_by_one_rename(self, tmp_path, tiny_hf_dir, monkeypatch):
        publish, before = convert.workdir.WorkDir.publish, []

        def watch(work):
            assert not (tmp_path / "out").exists()
            assert Checkpoint.open(work.checkpoint).dense()
            before.append(work.checkpoint.stat().st_ino)
            publish(work)

        monkeypatch.setattr(convert.workdir.WorkDir, "publish", watch)
        converted(tiny_hf_dir, tmp_path / "out")
        assert before == [(tmp_path / "out").stat().st_ino]

    def test_two_at_once(self, tmp_path, tiny_hf_dir):
        with (
            convert.workdir.WorkDir(tmp_path / "out", force=False),
            pytest.raises(InputError, match="another process"),
        ):
            run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
        assert converted(tiny_hf_dir, tmp_path / "out")[0].experts == 4


class TestSpace:
    def test_is_checked_before_anything_is_written(self, tmp_path, tiny_hf_dir, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(convert.plan.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match=r"needs [\d,]+ bytes of disk, 1,000 are available"):
            run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("dense_bits", [16, 8])
    def test_asked_for_suffices_and_is_not_much_more(
        self, tmp_path, tiny_hf_dir, monkeypatch, dense_bits
    ):
        needed = []
        monkeypatch.setattr(
            convert.pipeline, "check_free_space", lambda _, nbytes: needed.append(nbytes)
        )
        _, summary = converted(tiny_hf_dir, tmp_path / "out", dense_bits=dense_bits)
        assert summary.nbytes <= needed[0] <= summary.nbytes + 2**20

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), None])
    def test_that_ends_meanwhile_leaves_work_to_resume(
        self, tmp_path, tiny_hf_dir, monkeypatch, error
    ):
        """The disk fills up at the third unit of the second layer, by Orbax's error or by ours."""
        error = error or ValueError(
            "RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"
        )
        save_unit = convert.layers.save_unit

        def full(root, unit, arrays):
            if unit == "level8/layer_001":
                raise error
            return save_unit(root, unit, arrays)

        with monkeypatch.context() as patch:
            patch.setattr(convert.layers, "save_unit", full)
            with pytest.raises(InputError, match=r"level8/layer_001.*No space left.*repeat"):
                run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()
        checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out")
        assert summary.resumed_steps == 2
        assert_holds(checkpoint, HfDirectory.open(tiny_hf_dir))
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def interrupt_after_first_layer(source, output, monkeypatch, **options):
    """Leaves an unfinished conversion behind: the second layer raises."""
    original = convert.pipeline.LayerConverter.convert

    def stop(self, layer, advance):
        if layer == 1:
            raise KeyboardInterrupt
        return original(self, layer, advance)

    with monkeypatch.context() as patch:
        patch.setattr(convert.pipeline.LayerConverter, "convert", stop)
        with pytest.raises(KeyboardInterrupt):
            run_convert(source, output, progress=False, **options)


class TestResume:
    def test_skips_what_is_finished(self, tmp_path, tiny_hf_dir, monkeypatch):
        expected, _ = converted(tiny_hf_dir, tmp_path / "whole")
        interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch)
        checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out")
        assert summary.resumed_steps == 2
        assert hashes(checkpoint) == hashes(expected)

    def test_redoes_what_was_damaged_meanwhile(self, tmp_path, tiny_hf_dir, monkeypatch):
        expected, _ = converted(tiny_hf_dir, tmp_path / "whole")
        interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch)
        unit = tmp_path / "out.partial" / "checkpoint" / "level4" / "layer_000"
        data = next(path for path in (unit / "down" / "c").rglob("*") if path.is_file())
        data.write_bytes(data.read_bytes()[:-1] + b"?")
        checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out")
        assert summary.resumed_steps == 1
        assert hashes(checkpoint) == hashes(expected)

    def test_of_other_options_needs_force(self, tmp_path, tiny_hf_dir, monkeypatch):
        interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch)
        with pytest.raises(InputError, match=r"group size was 32, is 64.*--force"):
            run_convert(tiny_hf_dir, tmp_path / "out", group_size=64, progress=False)
        checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out", group_size=64, force=True)
        assert summary.resumed_steps == 0
        assert checkpoint.format.group_size == 64

    def test_of_other_dense_bits_needs_force(self, tmp_path, tiny_hf_dir, monkeypatch):
        interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch, dense_bits=8)
        with pytest.raises(InputError, match=r"dense bits was 8, is 16.*--force"):
            run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
        checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out", dense_bits=8)
        assert summary.resumed_steps == 2
        assert_holds(checkpoint, HfDirectory.open(tiny_hf_dir))

    def test_of_another_source_needs_force(self, tmp_path, make_tiny_model, monkeypatch):
        """Also of one that differs in nothing but its weights."""
        for seed in (0, 1):
            make_tiny_model(tmp_path / f"hf{seed}", seed=seed)
        interrupt_after_first_layer(tmp_path / "hf0", tmp_path / "out", monkeypatch)
        with pytest.raises(InputError, match=r"modification time of model\.safetensors was"):
            run_convert(tmp_path / "hf1", tmp_path / "out", progress=False)
        checkpoint, _ = converted(tmp_path / "hf1", tmp_path / "out", force=True)
        assert_holds(checkpoint, HfDirectory.open(tmp_path / "hf1"))

    def test_after_a_kill_between_the_two_renames(self, tmp_path, tiny_hf_dir, monkeypatch):
        """The old checkpoint was moved aside, the new one was not yet in its place."""
        converted(tiny_hf_dir, tmp_path / "out", group_size=64)
        (tmp_path / "out").rename(tmp_path / "old")
        interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch)
        (tmp_path / "old").rename(tmp_path / "out.partial" / "replaced")
        checkpoint, _ = converted(tiny_hf_dir, tmp_path / "out")
        assert checkpoint.format.group_size == 32
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_failure_before_the_first_step_leaves_nothing(self, tmp_path, tiny_model):
        tensors = tiny_model.make_tiny_model(tmp_path / "hf")
        tensors["model.embed_tokens.weight"][0, 0] = np.inf
        tiny_model.write_weights(tmp_path / "hf", tensors)
        with pytest.raises(InputError, match=r"embed_tokens.*1 NaN or inf"):
            run_convert(tmp_path / "hf", tmp_path / "out", progress=False)
        assert [p.name for p in tmp_path.iterdir()] == ["hf"]


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
    assert done.stderr.startswith("convert: error: ")
    assert done.stderr.count("\n") == 1
