"""Reading a converted checkpoint: levels one by one, and every kind of damage."""

import json
import random
import shutil

import numpy as np
import pytest

from convert import convert as run_convert
from dynaexq_jax.checkpoint import Checkpoint, is_converted
from dynaexq_jax.checkpoint.header import _checksum
from dynaexq_jax.checkpoint.units import load_unit, save_unit
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from pallas_kernels.layout import LAYOUT_ID
from pallas_kernels.pages import Matrices

FLIPS = 150


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, tiny_hf_dir):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(tiny_hf_dir, path.with_name("hf"))
    (path.with_name("hf") / "added_tokens.json").write_text('{"made": "up"}')
    run_convert(path.with_name("hf"), path, scale_encoding="log8", progress=False)
    return path


@pytest.fixture
def path(tmp_path, pristine):
    """A copy that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "checkpoint")


def read_all(path):
    """Everything that a checkpoint holds, as one list of arrays and bytes."""
    checkpoint = Checkpoint.open(path)
    scales = checkpoint.scales()
    return [
        *checkpoint.dense().items(),
        *(array for matrix in scales for array in matrix),
        *(page for bits in (2, 4, 8) for page in checkpoint.level(bits)),
        *(file.read_bytes() for file in sorted(checkpoint.tokenizer_dir.iterdir())),
        checkpoint.header,
    ]


def test_shapes_and_types(path):
    checkpoint = Checkpoint.open(path)
    scales = checkpoint.scales()
    assert checkpoint.layers == (0, 1)
    assert scales.gate_up.codes.shape == (2, 4, 3, 4, 64)
    assert scales.down.codes.shape == (2, 4, 2, 4, 64)
    assert scales.down.codes.dtype == np.uint8
    assert scales.down.base.shape == (2, 4)
    for bits, count in ((2, 1), (4, 1), (8, 2)):
        level = checkpoint.level(bits)
        assert len(level) == count
        for page in level:
            assert page.gate_up.shape == (2, 4, 3, 2, 256)
            assert page.down.shape == (2, 4, 2, 2, 256)
            assert page.down.dtype == np.uint32
            assert page.down.flags.c_contiguous


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_missing_level_matters_only_when_it_is_asked_for(path, bits):
    shutil.rmtree(path / f"level{bits}")
    checkpoint = Checkpoint.open(path)
    checkpoint.dense()
    checkpoint.scales()
    for other in {2, 4, 8} - {bits}:
        assert isinstance(checkpoint.level(other)[0], Matrices)
    with pytest.raises(InputError, match=rf"level{bits}/layer_000: .*missing.*convert"):
        checkpoint.level(bits)


@pytest.mark.parametrize(("missing", "available"), [(8, (2, 4)), (4, (2,))])
def test_available_bits_need_all_levels_below(path, missing, available):
    assert Checkpoint.open(path).available_bits == (2, 4, 8)
    shutil.rmtree(path / f"level{missing}")
    assert Checkpoint.open(path).available_bits == available


def test_the_lowest_level_is_needed_by_all(path):
    shutil.rmtree(path / "level2")
    with pytest.raises(InputError, match="level2 is missing, which every expert needs; copy"):
        _ = Checkpoint.open(path).available_bits


def test_dense_records_are_those_of_the_arrays(path):
    checkpoint = Checkpoint.open(path)
    records = {name: (r.shape, r.dtype) for name, r in checkpoint.dense_records().items()}
    assert records == {n: (a.shape, a.dtype.name) for n, a in checkpoint.dense().items()}


@pytest.mark.parametrize("part", ["dense/outer", "dense/layer_001", "scales/layer_001"])
def test_missing_part(path, part):
    shutil.rmtree(path / part)
    checkpoint = Checkpoint.open(path)
    with pytest.raises(InputError, match=rf"{part}: .*missing"):
        read_all(checkpoint.path)


def rewrite_header(path, *, without=(), **changes):
    """Changes the header and gives it a checksum that fits."""
    file = path / "dynaexq.json"
    body = json.loads(file.read_text()) | changes
    for key in ("checksum", *without):
        body.pop(key)
    file.write_text(json.dumps(body | {"checksum": _checksum(body)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"format_version is 2, this version reads 1; convert"),
        (
            {"layout_id": "quad-chunk128-v1"},
            rf"layout_id is 'quad-chunk128-v1', this version reads '{LAYOUT_ID}'; convert",
        ),
        ({"dense_bits": 4}, r"dense_bits must be one of \(16, 8\), got 4"),
        ({"group_size": 48}, r"group size must be one of .* got 48"),
        ({"scale_encoding": "fp4"}, r"scale encoding must be one of .* got 'fp4'"),
        ({"layers": [1]}, r"layers are \[1\], its config asks for \[0, 1\]"),
        ({"units": {}}, r"units are \[\]"),
        ({"units": []}, r"not a valid header"),
        ({"table": {"base": [1, 2]}}, r"level table has fields"),
        ({"errors_by_level": {}}, r"levels of errors"),
        ({"benefit": [[1.0]]}, r"benefit has shape \(1, 1\), its config asks for \(2, 2, 4\)"),
        ({"benefit": [[[-1.0] * 4] * 2] * 2}, r"benefit must be finite and not negative"),
        ({"benefit": [[[1.0], [1.0, 2.0]]]}, r"not a valid header"),
        ({"pinned": [[0, 99]]}, r"pinned expert 99 of layer 0 does not exist"),
        ({"pinned": [[5, 0]]}, r"pinned expert 0 of layer 5 does not exist"),
        ({"config": {"model_type": "llama"}}, r"unknown architecture"),
        ({"tokenizer_files": {"a": 1}}, r"not a valid header"),
    ],
)
def test_header_of_another_kind(path, changes, message):
    rewrite_header(path, **changes)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(path)


def test_header_of_an_expert_width_that_no_page_holds(path):
    config = Checkpoint.open(path).header.config
    rewrite_header(path, config=config | {"moe_intermediate_size": 84})
    with pytest.raises(InputError, match=r"expert width must be a multiple of 8, got 84"):
        Checkpoint.open(path)


def test_header_from_before_dense_bits_means_16(path):
    rewrite_header(path, without=["dense_bits"])
    assert Checkpoint.open(path).header.dense_bits == 16


def test_header_from_before_benefits_goes_by_errors(path):
    rewrite_header(path, without=["benefit"])
    checkpoint = Checkpoint.open(path)
    assert checkpoint.header.benefit is None
    errors = np.array([checkpoint.header.errors_by_level[bits] for bits in ("2", "4", "8")])
    np.testing.assert_array_equal(checkpoint.benefit, (errors[:-1] - errors[1:]).T)


def test_benefit_by_expert(path):
    benefit = np.random.default_rng(0).random((2, 2, 4))
    rewrite_header(path, benefit=benefit.tolist())
    np.testing.assert_array_equal(Checkpoint.open(path).benefit, benefit)


def test_matrices_at_8_bits_come_with_their_scales(tmp_path, tiny_hf_dir):
    run_convert(tiny_hf_dir, tmp_path / "out", dense_bits=8, progress=False)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.header.dense_bits == 8
    query = "model.layers.1.self_attn.q_proj.weight"
    records, arrays = checkpoint.dense_records(), checkpoint.dense()
    for name, shape, dtype in (
        (query, (64, 96), "int8"),
        (f"{query}_scale", (64,), "float32"),
        ("model.layers.1.mlp.gate.weight", (4, 96), "bfloat16"),
        ("model.embed_tokens.weight", (64, 96), "bfloat16"),
    ):
        assert (records[name].shape, records[name].dtype) == (shape, dtype)
        assert (arrays[name].shape, arrays[name].dtype.name) == (shape, dtype)


def test_pinned_experts_are_named_by_layer_and_found_by_row(tmp_path, make_tiny_model):
    make_tiny_model(tmp_path / "hf", mlp_only_layers=[0])
    run_convert(tmp_path / "hf", tmp_path / "out", progress=False)
    rewrite_header(tmp_path / "out", pinned=[[1, 3]])
    assert Checkpoint.open(tmp_path / "out").pinned == ((0, 3),)


def test_edited_header(path):
    file = path / "dynaexq.json"
    text = file.read_text()
    file.write_text(text.replace('"pinned": []', '"pinned": [[0, 1]]'))
    assert file.read_text() != text
    with pytest.raises(InputError, match=r"checksum.*damaged or was edited"):
        Checkpoint.open(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff"])
def test_header_that_is_not_json(path, content):
    (path / "dynaexq.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=r"dynaexq\.json: .*(not valid JSON|not an object)"):
        Checkpoint.open(path)


def test_not_a_checkpoint(tmp_path, tiny_hf_dir, path):
    assert is_converted(path)
    assert not is_converted(tiny_hf_dir)
    with pytest.raises(InputError, match=r"no dynaexq\.json.*dynaexq convert"):
        Checkpoint.open(tiny_hf_dir)
    with pytest.raises(InputError, match="no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json"):
        HfDirectory.open(path)


def files_by_kind(path):
    """Files, grouped by what they are: one kind is one name below one kind of unit."""
    kinds = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            parts = file.relative_to(path).parts
            kinds.setdefault((parts[0], file.name), []).append(file)
    return list(kinds.values())


def test_flipped_bits(path, pristine):
    """Each kind of file, many offsets: an error that names the file, or nothing has changed."""
    expected = read_all(pristine)
    rng = random.Random(0)
    kinds = files_by_kind(path)
    assert len(kinds) > 20
    for _ in range(-(-FLIPS // len(kinds))):
        for files in kinds:
            file = rng.choice(files)
            whole = file.read_bytes()
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            try:
                found = read_all(path)
            except InputError as error:
                named = str(error).startswith(str(file))
            else:
                named = file.name == "dynaexq.json" and json.loads(data) == json.loads(whole)
                np.testing.assert_equal(found, expected)
            assert named, file
            file.write_bytes(whole)


@pytest.mark.parametrize("cut", [0, 0.5, -1])
def test_truncated_files(path, cut):
    """Of each kind of file one, empty, halved or one byte short."""
    for files in files_by_kind(path):
        whole = files[0].read_bytes()
        length = int(len(whole) * cut) if cut >= 0 else len(whole) - 1
        files[0].write_bytes(whole[:length])
        if files[0].name == "dynaexq.json" and cut == -1:
            read_all(path)  # a final newline less
        else:
            with pytest.raises(InputError, match=files[0].name):
                read_all(path)
        files[0].write_bytes(whole)


def test_missing_files(path):
    for files in files_by_kind(path):
        aside = files[0].rename(path.parent / "aside")
        with pytest.raises(InputError, match=files[0].name):
            read_all(path)
        aside.rename(files[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint32", "uint8"])
def test_arrays_round_trip(tmp_path, dtype):
    """Bits, not values: NaN payloads and negative zeros included."""
    bits = np.random.default_rng(0).integers(0, 256, (3, 5, 8), np.uint8)
    array = bits.view(np.dtype(dtype)) if dtype != "bfloat16" else bits.view("u2").view(dtype)
    record = save_unit(tmp_path, "unit", {"a.b/c": array, "x": array[:1]})
    loaded = load_unit(tmp_path, "unit", record)
    assert set(loaded) == {"a.b/c", "x"}
    assert loaded["x"].dtype == array.dtype
    np.testing.assert_array_equal(loaded["x"].view(np.uint8), array[:1].view(np.uint8))
