"""Hotness profiles: what is written is what is read, and what is refused."""

import json
import os

import numpy as np
import pytest

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.policy import Hotness
from dynaexq_jax.traffic import RoutedModel, read_profile, write_profile

MODEL = RoutedModel(layers=3, experts=5, experts_per_token=2, hidden_size=64)


def some_hotness(tokens=7):
    mean = np.random.default_rng(0).random((3, 5)) ** 9
    mean[0, 0], mean[1, 1] = 0.0, 5e-324
    return Hotness(mean=mean, tokens=tokens, memory=70)


@pytest.mark.parametrize("tokens", [0, 7])
def test_every_bit_comes_back(tmp_path, tokens):
    path = tmp_path / "hot.json"
    write_profile(path, MODEL, some_hotness(tokens))
    got = read_profile(path, MODEL)
    assert got.mean.tobytes() == some_hotness().mean.tobytes()
    assert (got.tokens, got.memory) == (tokens, 70)
    assert json.loads(path.read_text())["model"] == {
        "layers": 3,
        "experts": 5,
        "experts_per_token": 2,
        "hidden_size": 64,
    }


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "hot.json"
    write_profile(path, MODEL, some_hotness(False))
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(InputError, match=r"hot\.json: cannot be written \(No space left"):
            write_profile(path, MODEL, some_hotness())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["hot.json"]
    write_profile(path, MODEL, some_hotness())
    assert read_profile(path, MODEL).tokens
    assert os.listdir(tmp_path) == ["hot.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "hotness"}, "is not a hotness profile; give another file, or delete"),
        ({"version": 2}, "version is 2, this program reads 1"),
        ({"model": {"layers": 3}}, "not a valid hotness profile .*a model has"),
        ({"model": None}, "not a valid hotness profile"),
        ({"mean": [[1.0] * 5] * 2}, r"mean has shape \(2, 5\), its model 3 layers of 5"),
        ({"mean": [[1.0] * 5, [1.0] * 4, [1.0] * 5]}, "not a valid hotness profile"),
        ({"mean": [[-1.0] * 5] * 3}, "mean must be finite and not negative"),
        ({"mean": [[float("nan")] * 5] * 3}, "mean must be finite and not negative"),
        ({"tokens": 71}, r"tokens must be in 0\.\.70, the memory, got 71"),
        ({"tokens": float("inf")}, "not a valid hotness profile .cannot convert float infinity"),
        ({"memory": None}, "not a valid hotness profile"),
    ],
)
def test_damaged_files_are_refused(tmp_path, changes, message):
    path = tmp_path / "hot.json"
    write_profile(path, MODEL, some_hotness())
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message) as error:
        read_profile(path, MODEL)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_files_that_hold_something_else_are_refused(tmp_path):
    path = tmp_path / "hot.json"
    for content, message in ((b"{", "not valid JSON"), (b"[]", "holds a list, not an object")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{message}.*delete this one to start cold"):
            read_profile(path, MODEL)


@pytest.mark.parametrize("name", ["layers", "experts", "experts_per_token", "hidden_size"])
def test_a_profile_of_another_model_names_both(tmp_path, name):
    path = tmp_path / "hot.json"
    write_profile(path, MODEL, some_hotness())
    sizes = vars(MODEL) | {name: 7}
    with pytest.raises(InputError) as error:
        read_profile(path, RoutedModel(**sizes))
    message = str(error.value)
    assert "3 layers of 5 experts, 2 a token, hidden size 64; this one has " in message
    assert "7" in message.split("this one has ")[1]
    assert message.endswith("give another file, or delete this one to start cold")


def test_a_model_s_sizes_are_those_of_its_experts(tiny_hf_dir):
    config = ModelConfig.from_hf(json.loads((tiny_hf_dir / "config.json").read_text()))
    assert RoutedModel.of(config) == RoutedModel(
        layers=len(config.sparse_layers),
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        hidden_size=config.hidden_size,
    )
