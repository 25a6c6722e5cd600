"""Hugging Face directories: every real layout is read, every contradiction is one clear error."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.models.names import HEAD, dense_shapes, expert_names

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture
def model(tmp_path, make_tiny_model):
    """A directory that a test may damage, and its tensors."""
    path = tmp_path / "model"
    return path, make_tiny_model(path)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def raises(*parts):
    """An InputError of one line that has all parts."""

    def check(error):
        message = str(error)
        return "\n" not in message and all(part in message for part in parts)

    return pytest.raises(InputError, check=check)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("layout", [{}, {"shards": 3}, {"fused": True}])
def test_reads_every_tensor_of_every_layout(tmp_path, make_tiny_model, layout, dtype):
    written = make_tiny_model(tmp_path / "m", dtype=dtype, **layout)
    plain = make_tiny_model(tmp_path / "plain", dtype=dtype)
    source = HfDirectory.open(tmp_path / "m")
    dense = source.dense()
    assert set(dense) == set(dense_shapes(source.config))
    for name, array in dense.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, written[name])
    for layer in range(2):
        for expert in range(4):
            names = expert_names(layer, expert)
            gate_up, down = source.expert(layer, expert)
            assert gate_up.dtype == down.dtype == dtype
            gate, up = plain[names["gate_proj"]], plain[names["up_proj"]]
            np.testing.assert_array_equal(gate_up, np.concatenate([gate, up]))
            np.testing.assert_array_equal(down, plain[names["down_proj"]])


def test_gate_and_up_of_different_dtypes_become_float32(model, tiny_model):
    path, tensors = model
    names = expert_names(0, 0)
    tensors[names["gate_proj"]] = tensors[names["gate_proj"]].astype(np.float16)
    tiny_model.write_weights(path, tensors)
    gate_up = HfDirectory.open(path).expert(0, 0).gate_up
    assert gate_up.dtype == np.float32
    expected = [tensors[names[n]].astype(np.float32) for n in ("gate_proj", "up_proj")]
    np.testing.assert_array_equal(gate_up, np.concatenate(expected))


def test_reads_dense_layers_bias_and_untied_head(tmp_path, make_tiny_model):
    options = {"mlp_only_layers": [0], "attention_bias": True, "tie_word_embeddings": False}
    written = make_tiny_model(tmp_path / "m", **options)
    dense = HfDirectory.open(tmp_path / "m").dense()
    for name in (HEAD, "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias"):
        np.testing.assert_array_equal(dense[name], written[name])


def test_tied_head_may_repeat_the_embedding_but_not_differ(tmp_path, make_tiny_model, tiny_model):
    path = tmp_path / "m"
    tensors = make_tiny_model(path, head_of_tied=True)
    assert HEAD not in HfDirectory.open(path).dense()
    tensors[HEAD][3, 5] += 1
    tiny_model.write_weights(path, tensors)
    with raises(HEAD, "tie_word_embeddings", "false"):
        HfDirectory.open(path)


def test_untied_config_needs_its_head(model):
    path, _ = model
    edit_config(path, tie_word_embeddings=False)
    with raises(HEAD, "missing", "[64, 96]"):
        HfDirectory.open(path)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("num_hidden_layers", 3, 2),
        ("num_experts", 8, 4),
        ("hidden_size", 64, 96),
        ("vocab_size", 100, 64),
    ],
)
def test_config_contradicting_weights_names_both_values(model, key, value, found):
    path, _ = model
    edit_config(path, **{key: value})
    with raises(f"{key} {value}", f"have {found}", "config"):
        HfDirectory.open(path)


def test_fused_experts_contradicting_config(tmp_path, make_tiny_model):
    make_tiny_model(tmp_path / "m", fused=True)
    edit_config(tmp_path / "m", num_experts=5)
    with raises("num_experts 5", "have 4"):
        HfDirectory.open(tmp_path / "m")


def test_fused_experts_of_wrong_shape(tmp_path, make_tiny_model, tiny_model):
    tensors = make_tiny_model(tmp_path / "m", fused=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
    tiny_model.write_weights(tmp_path / "m", tensors)
    with raises(name, "[4, 96, 160]", "[4, 160, 96]"):
        HfDirectory.open(tmp_path / "m")


def test_unknown_architecture(model):
    path, _ = model
    edit_config(path, architectures=["LlamaForCausalLM"], model_type="llama")
    with raises("LlamaForCausalLM", "Qwen3MoeForCausalLM"):
        HfDirectory.open(path)


def test_wrong_shape_shows_both(model, tiny_model):
    path, tensors = model
    tensors[DOWN] = np.ascontiguousarray(tensors[DOWN].T)
    tiny_model.write_weights(path, tensors)
    with raises(DOWN, "[80, 96]", "[96, 80]"):
        HfDirectory.open(path)


@pytest.mark.parametrize("name", [DOWN, NORM])
def test_missing_key(model, tiny_model, name):
    path, tensors = model
    del tensors[name]
    tiny_model.write_weights(path, tensors)
    with raises(name, "missing"):
        HfDirectory.open(path)


def test_extra_key(model, tiny_model):
    path, tensors = model
    tiny_model.write_weights(path, tensors | {"model.layers.0.mlp.surprise": tensors[NORM]})
    with raises("model.layers.0.mlp.surprise", "1 tensors"):
        HfDirectory.open(path)


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_wrong_dtype(model, tiny_model, dtype):
    path, tensors = model
    tiny_model.write_weights(path, tensors | {NORM: np.zeros(96, dtype)})
    with raises(NORM, "dtype", "BF16"):
        HfDirectory.open(path)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_found_on_reading_and_counted(tmp_path, make_tiny_model, dtype, bad):
    tensors = make_tiny_model(tmp_path / "m", dtype=dtype)
    tensors[DOWN][4, 5:8] = bad
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    source = HfDirectory.open(tmp_path / "m")
    source.expert(1, 1)
    with raises(DOWN, "3 NaN or infinite values of 7680"):
        source.expert(1, 2)


def test_not_finite_in_fused_experts_names_the_expert(tmp_path, make_tiny_model, tiny_model):
    tensors = make_tiny_model(tmp_path / "m", fused=True)
    tensors["model.layers.1.mlp.experts.down_proj"][2, 0, 0] = np.nan
    tiny_model.write_weights(tmp_path / "m", tensors)
    source = HfDirectory.open(tmp_path / "m")
    source.expert(1, 1)
    with raises("model.layers.1.mlp.experts.down_proj[2]", "1 NaN"):
        source.expert(1, 2)


def test_file_that_shrinks_after_opening(model):
    path, _ = model
    source = HfDirectory.open(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(source.files[0].nbytes - 10)
    last = max(source.tensors.values(), key=lambda tensor: tensor.begin)
    with raises(last.name, "ends after"):
        source.tensor(last.name)


class TestFiles:
    def test_no_directory(self, tmp_path):
        with raises("nowhere", "no such directory"):
            HfDirectory.open(tmp_path / "nowhere")

    def test_no_config(self, model):
        (model[0] / "config.json").unlink()
        with raises("config.json", "cannot be read"):
            HfDirectory.open(model[0])

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "[" * 100000])
    def test_bad_config(self, model, text):
        (model[0] / "config.json").write_text(text)
        with raises("config.json"):
            HfDirectory.open(model[0])

    def test_no_weights(self, model):
        (model[0] / "model.safetensors").unlink()
        with raises("model.safetensors", "neither"):
            HfDirectory.open(model[0])

    def test_single_file_and_index(self, tmp_path, make_tiny_model):
        tensors = make_tiny_model(tmp_path / "m", shards=2)
        save_file(tensors, tmp_path / "m" / "model.safetensors")
        with raises("both", "remove"):
            HfDirectory.open(tmp_path / "m")

    def test_missing_shard(self, tmp_path, make_tiny_model):
        make_tiny_model(tmp_path / "m", shards=3)
        (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
        with raises("model-00002-of-00003.safetensors", "missing"):
            HfDirectory.open(tmp_path / "m")

    @pytest.mark.parametrize(
        ("edit", "parts"),
        [
            (lambda m: m.update({NORM: "../x.safetensors"}), ("../x.safetensors", NORM)),
            (lambda m: m.update({NORM: 7}), ("7", NORM)),
            (lambda m: m.update(ghost=next(iter(m.values()))), ("ghost", "lacks 1")),
            (lambda m: m.pop(NORM), (NORM, "does not put there")),
            (lambda m: m.clear(), ("weight_map",)),
        ],
    )
    def test_bad_index(self, tmp_path, make_tiny_model, edit, parts):
        make_tiny_model(tmp_path / "m", shards=3)
        path = tmp_path / "m" / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        path.write_text(json.dumps(index))
        with raises(*parts):
            HfDirectory.open(tmp_path / "m")

    def test_tensor_in_two_shards(self, tmp_path, make_tiny_model):
        tensors = make_tiny_model(tmp_path / "m", shards=3)
        path = tmp_path / "m" / "model-00001-of-00003.safetensors"
        names = sorted(tensors)
        save_file({name: tensors[name] for name in [*names[0::3], names[1]]}, path)
        with raises(path.name, names[1], "does not put there"):
            HfDirectory.open(tmp_path / "m")


def rewrite(path, change):
    """Rewrites the header of a safetensors file with ``change(header)``, data as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def set_entry(**values):
    return lambda header: header[NORM].update(values)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (set_entry(dtype="Q4"), "dtype 'Q4'"),
        (set_entry(dtype=["BF16"]), "dtype"),
        (set_entry(shape=96), "not a list of sizes"),
        (set_entry(shape=[-96]), "not a list of sizes"),
        (set_entry(shape=[True]), "not a list of sizes"),
        (set_entry(shape=[97]), "takes 194 bytes"),
        (set_entry(data_offsets=[0]), "not [begin, end]"),
        (set_entry(data_offsets=[0, 192]), "overlaps"),
        (set_entry(data_offsets=[1 << 70, (1 << 70) + 192]), "gap"),
        (set_entry(data_offsets=[192, 0]), "span -192"),
        (set_entry(extra=1), "must have"),
        (lambda h: h.update({NORM: 3}), "must have"),
        (lambda h: h.update(__metadata__={"a": 1}), "__metadata__"),
        (lambda h: h.update(__metadata__=[]), "__metadata__"),
        (lambda h: h.pop(EMBEDDING) and None, "gap"),
        (lambda h: [h], "not an object"),
    ],
)
def test_bad_header_entry(model, change, part):
    path = model[0] / "model.safetensors"
    rewrite(path, change)
    with raises("model.safetensors", part):
        HfDirectory.open(model[0])


def test_key_that_occurs_twice(model):
    path = model[0] / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    entry = f'"{NORM}":{json.dumps(json.loads(header)[NORM])},'.encode()
    header = b"{" + entry + header[1:]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with raises(NORM, "twice"):
        HfDirectory.open(model[0])


@pytest.mark.parametrize("size", [0, 3, 8, 20, 5000, -1, -1000])
def test_truncated_file(model, size):
    path = model[0] / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with raises("model.safetensors", "damaged"):
        HfDirectory.open(model[0])


def test_bytes_after_the_data(model):
    path = model[0] / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with raises("model.safetensors", "damaged"):
        HfDirectory.open(model[0])


@pytest.mark.parametrize("length", [1 << 63, 100_000_001, 0])
def test_absurd_header_length(model, length):
    path = model[0] / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with raises("model.safetensors", "damaged"):
        HfDirectory.open(model[0])
