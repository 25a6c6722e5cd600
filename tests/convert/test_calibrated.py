"""Calibrated conversion as a whole: what it calibrates on, what it keeps, how it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from calibrated_conversion import FILES, ROWS, TEXT, WINDOW, calibration, make_model, run

import convert.calibration.converter
from convert import convert as run_convert
from convert.calibration.states import HiddenStates
from convert.calibration.walk import Walk
from convert.cli import describe
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.cli import main
from dynaexq_jax.errors import InputError
from dynaexq_jax.models.names import expert_names
from dynaexq_jax.serving.perplexity import load_for_scoring
from dynaexq_jax.text.documents import read_windows
from dynaexq_jax.text.tokenizer import load_tokenizer

Converter = convert.calibration.converter.CalibratedConverter


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_tiny_model):
    """Three layers, the second without experts, so that rows are carried through every kind."""
    path = tmp_path_factory.mktemp("calibrated") / "hf"
    return make_model(make_tiny_model, path, num_hidden_layers=3, mlp_only_layers=[1])


@pytest.fixture(scope="module")
def converted(tmp_path_factory, model):
    """A conversion, with what its last layer left in the work folder."""
    output = tmp_path_factory.mktemp("calibrated") / "out"
    left = {}
    with pytest.MonkeyPatch.context() as patch:
        knowledge = Converter.knowledge

        def watch(self, records):
            walk = Walk(config=self.source.config, tokens=self.text.tokens, folder=self.folder)
            states = walk.states(self.source.config.num_hidden_layers)
            left.update(plan=walk.plan, states=states.read(0, states.rows), tokens=walk.tokens)
            left["files"] = sorted(path.name for path in self.folder.iterdir())
            return knowledge(self, records)

        patch.setattr(Converter, "knowledge", watch)
        quantizer, summary = run(model, output, patch)
    return output, quantizer, summary, left


def facts(path):
    """All that must be the same when a conversion is repeated."""
    header = Checkpoint.open(path).header
    arrays = {unit: record.arrays for unit, record in header.units.items()}
    return arrays, header.benefit, header.pinned, header.errors_by_level, header.quantizer


class TestWhatIsCalibratedOn:
    def test_rows_take_turns_over_the_files(self, model, converted):
        tokenizer = load_tokenizer(model)
        by_file = [read_windows(path, tokenizer, WINDOW, ROWS)[:, :-1] for path in FILES]
        tokens = converted[3]["tokens"]
        assert tokens.shape == (ROWS * len(FILES), WINDOW)
        np.testing.assert_array_equal(tokens, np.stack(by_file, axis=1).reshape(-1, WINDOW))

    @pytest.mark.parametrize("bits", [2, 4])
    def test_rows_pass_the_quantized_layers(self, converted, bits):
        """What comes out of the last layer is what the runtime makes of the checkpoint."""
        output, _, _, left = converted
        plan = left["plan"]
        served = load_for_scoring(output, precision=str(bits), window=WINDOW)
        rows = {2: [(0, 0)], 4: [(plan.text - 1, plan.text - 1), (plan.text, 0)]}[bits]
        norm = Checkpoint.open(output).dense()["model.norm.weight"].astype(np.float64)
        for row, of_text in rows:
            x = left["states"][row].astype(np.float64)
            x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-6) * norm
            hidden = served.engine.hidden(left["tokens"][of_text])
            np.testing.assert_allclose(np.asarray(hidden), x, rtol=1e-3, atol=1e-4)

    def test_quantizer_gets_weights_and_hessians_of_a_layer_at_a_time(self, model, converted):
        calls = converted[1].calls
        assert [weights.shape for weights, _ in calls] == [(4, 160, 96), (4, 96, 80)] * 2
        assert [hessians.shape for _, hessians in calls] == [(4, 96, 96), (4, 80, 80)] * 2
        for _, hessians in calls:
            np.testing.assert_allclose(hessians, hessians.transpose(0, 2, 1), rtol=1e-3, atol=1e-6)
            assert np.linalg.eigvalsh(hessians.astype(np.float64)).min() > -1e-4
            assert np.ptp(np.trace(hessians, axis1=1, axis2=2)) > 0

    def test_what_went_into_a_layer_is_removed(self, converted):
        assert converted[3]["files"] == ["layer_003"]


class TestHeader:
    def test_says_what_was_run(self, converted):
        header = Checkpoint.open(converted[0]).header
        assert header.quantizer["name"] == "fast"
        files = header.quantizer["calibration"]["files"]
        assert [file["name"] for file in files] == ["en.txt", "python.txt", "fr.txt"]
        assert all(file["rows"] == ROWS and len(file["sha256"]) == 64 for file in files)
        assert header.quantizer["calibration"]["window"] == WINDOW

    def test_has_the_benefit_of_every_step(self, converted):
        checkpoint = Checkpoint.open(converted[0])
        benefit = checkpoint.benefit
        assert benefit.shape == (2, 2, 4)  # layers with experts, steps, experts
        assert np.all(benefit[:, 0] > benefit[:, 1])
        assert np.all(benefit[:, 1] > 0)

    def test_is_what_the_policy_goes_by(self, converted):
        """One page: it goes to the expert whose step is worth most for the traffic there was."""
        output, _, _, left = converted
        served = load_for_scoring(output, precision="dynamic", window=WINDOW, pages=1)
        controller = served.engine.controller
        served.engine.score(np.append(left["tokens"][0], 0))
        controller.settle()
        value = controller.hotness.mean * Checkpoint.open(output).benefit[:, 0]
        promoted = np.zeros_like(controller.levels())
        promoted.flat[value.argmax()] = 1
        np.testing.assert_array_equal(controller.levels(), promoted)

    def test_without_higher_levels_has_the_benefit_of_the_steps_there_are(
        self, converted, tmp_path
    ):
        copy = tmp_path / "out"
        copy.mkdir()
        for part in converted[0].iterdir():
            if part.name != "level8":
                (copy / part.name).symlink_to(part)
        full = Checkpoint.open(converted[0]).benefit
        np.testing.assert_array_equal(Checkpoint.open(copy).benefit, full[:, :1])


class Stop(Exception):
    pass


def interrupt(model, output, monkeypatch, layer):
    """Leaves an unfinished conversion behind: ``layer`` raises in the middle."""
    with monkeypatch.context() as patch:
        experts = Converter._experts

        def stop(self, number, *arguments):
            result = experts(self, number, *arguments)
            if number == layer:
                raise Stop
            return result

        patch.setattr(Converter, "_experts", stop)
        with pytest.raises(Stop):
            run(model, output, patch)
    return output.with_name(f"{output.name}.partial")


class TestResume:
    def test_goes_on_where_it_was(self, tmp_path, model, converted, monkeypatch):
        folder = interrupt(model, tmp_path / "out", monkeypatch, 2)
        assert sorted(path.name for path in (folder / "hidden").iterdir()) == [
            "layer_002",
            "layer_003",
        ]
        quantizer, summary = run(model, tmp_path / "out", monkeypatch)
        assert summary.resumed_steps == 3  # outside of the layers, and two layers
        assert len(quantizer.calls) == 2
        assert facts(tmp_path / "out") == facts(converted[0])
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_begins_anew_without_its_hidden_states(self, tmp_path, model, converted, monkeypatch):
        folder = interrupt(model, tmp_path / "out", monkeypatch, 2)
        (folder / "hidden" / "layer_002").unlink()
        _, summary = run(model, tmp_path / "out", monkeypatch)
        assert summary.resumed_steps == 1
        assert facts(tmp_path / "out") == facts(converted[0])

    def test_begins_anew_when_an_earlier_layer_was_damaged(
        self, tmp_path, model, converted, monkeypatch
    ):
        folder = interrupt(model, tmp_path / "out", monkeypatch, 2)
        unit = folder / "checkpoint" / "level4" / "layer_000" / "down" / "c"
        data = next(path for path in unit.rglob("*") if path.is_file())
        data.write_bytes(data.read_bytes()[:-1] + b"?")
        _, summary = run(model, tmp_path / "out", monkeypatch)
        assert summary.resumed_steps == 1
        assert facts(tmp_path / "out") == facts(converted[0])

    def test_after_the_last_layer(self, tmp_path, model, converted, monkeypatch):
        with monkeypatch.context() as patch:

            def stop(self, records):
                raise Stop

            patch.setattr(Converter, "knowledge", stop)
            with pytest.raises(Stop):
                run(model, tmp_path / "out", patch)
        quantizer, summary = run(model, tmp_path / "out", monkeypatch)
        assert summary.resumed_steps == 4
        assert not quantizer.calls
        assert facts(tmp_path / "out") == facts(converted[0])

    def test_with_other_text_needs_force(self, tmp_path, model, monkeypatch):
        interrupt(model, tmp_path / "out", monkeypatch, 2)
        other = calibration(files=FILES[:2])
        with pytest.raises(InputError, match=r"quantizer was .*--force"):
            run(model, tmp_path / "out", monkeypatch, other)
        _, summary = run(model, tmp_path / "out", monkeypatch, other, force=True)
        assert summary.resumed_steps == 0

    def test_killed_at_random_times(self, tmp_path, model, converted):
        script = tmp_path / "run.py"
        script.write_text(
            "import sys, pytest\nfrom pathlib import Path\nfrom calibrated_conversion import run\n"
            "run(Path(sys.argv[1]), Path(sys.argv[2]), pytest.MonkeyPatch())\n"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        command = [sys.executable, str(script), str(model), str(tmp_path / "out")]
        done = tmp_path / "out.partial" / "done"
        killed = 0
        for layer, wait in ((0, 0.0), (1, 0.1), (2, 0.0)):
            process = subprocess.Popen(command, env=environment)
            while not (done / f"layer_{layer:03d}").exists() and process.poll() is None:
                time.sleep(0.002)
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        subprocess.run(command, env=environment, check=True)
        assert killed >= 2
        assert facts(tmp_path / "out") == facts(converted[0])


class TestBadInput:
    @pytest.fixture
    def small(self, tmp_path, make_tiny_model):
        return make_model(make_tiny_model, tmp_path / "hf")

    def refuses(self, small, message, **options):
        with pytest.raises(InputError, match=message):
            run_convert(
                small, small.with_name("out"), calibration=calibration(**options), progress=False
            )
        assert not list(small.parent.glob("out*"))

    def test_file_missing(self, small):
        self.refuses(small, r"cannot read text file nowhere\.txt", files=["nowhere.txt"])

    def test_file_too_short(self, small):
        short = small.with_name("short.txt")
        short.write_text("too short")
        self.refuses(small, r"short\.txt has \d+ tokens, one window of 24 needs 25", files=[short])

    def test_file_empty(self, small):
        empty = small.with_name("empty.txt")
        empty.write_text("")
        self.refuses(small, r"empty\.txt has 0 tokens", files=[*FILES, empty])

    def test_tokenizer_missing(self, small):
        (small / "tokenizer.json").unlink()
        self.refuses(small, r"no tokenizer in .*: tokenizer\.json is missing")

    def test_window_longer_than_the_model_reads(self, small):
        self.refuses(small, r"window of 300 is longer than the 256 positions", window=300)

    def test_tokens_that_the_model_does_not_know(self, tmp_path, make_tiny_model):
        make_tiny_model(tmp_path / "hf", tokenizer=True)
        self.refuses(tmp_path / "hf", r"gives token \d+, the model knows 64")

    @pytest.mark.parametrize("options", [{"rows": 0}, {"window": 0}, {"files": ()}])
    def test_options(self, options):
        with pytest.raises(InputError, match="calibration"):
            calibration(**options)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--method", "joint"], "--method joint needs text: give --calibration"),
            (["--method", "grid", "--calibration", TEXT / "en.txt"], "--calibration is for"),
            (["--calibration-rows", "3"], "--calibration-rows is for --method joint"),
            (["--calibration", TEXT / "en.txt", "--calibration-rows", "0"], "must be positive"),
        ],
    )
    def test_flags(self, small, capsys, flags, message):
        out = small.with_name("out")
        assert main(["convert", str(small), str(out), *map(str, flags)]) == 2
        assert message in capsys.readouterr().err
        assert not list(small.parent.glob("out*"))


def test_planted_super_expert_is_pinned(tmp_path, tiny_model, monkeypatch, capsys):
    path = tmp_path / "hf"
    tensors = tiny_model.make_tiny_model(
        path, tokenizer=True, vocab_size=8192, num_experts=16, num_experts_per_tok=4
    )
    name = expert_names(1, 6)["down_proj"]
    tensors[name] = (tensors[name].astype(np.float32) * 500).astype(ml_dtypes.bfloat16)
    tiny_model.write_weights(path, tensors)
    _, summary = run(path, tmp_path / "out", monkeypatch)
    assert summary.super_experts == ((1, 6),)
    assert "super experts, pinned: 6 of layer 1" in describe(summary)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.pinned == ((1, 6),)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pinned experts"] == [[1, 6]]


def test_disk_that_is_full_leaves_work_to_resume(tmp_path, model, converted, monkeypatch):
    with monkeypatch.context() as patch:
        write = HiddenStates.write

        def full(self, start, states):
            if self._path.name == "layer_003":
                raise OSError(28, "No space left on device")
            write(self, start, states)

        patch.setattr(HiddenStates, "write", full)
        with pytest.raises(InputError, match=r"hidden: cannot be written \(No space left.*repeat"):
            run(model, tmp_path / "out", patch)
    _, summary = run(model, tmp_path / "out", monkeypatch)
    assert summary.resumed_steps == 3
    assert facts(tmp_path / "out") == facts(converted[0])
