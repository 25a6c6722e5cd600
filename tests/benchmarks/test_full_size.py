"""Random weights that route by domain, at a small shape, through a real engine."""

import json

import full_size
import jax
import numpy as np
import pytest
from random_source import RandomSource

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import build_engine
from pallas_kernels.layout import untile_scales
from pallas_kernels.scales import decode_scales

LAYERS, EXPERTS, VOCABULARY = 4, 32, 1024
CONFIG = ModelConfig.from_hf(
    full_size.QWEN3_30B
    | {
        "hidden_size": 256,
        "moe_intermediate_size": 32,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
)
DOMAINS = 4
SHARES = full_size.popularity_by_domain("zipf", LAYERS, EXPERTS, DOMAINS)


@pytest.mark.parametrize(
    ("dense_bits", "scales"), [(16, (32, "log8")), (8, (32, "log8")), (16, (64, "bf16"))]
)
def test_traffic_of_a_domain_routes_by_its_shares_and_stays(dense_bits, scales):
    fmt = full_size.expert_format(CONFIG, *scales)
    source = RandomSource.make(CONFIG, SHARES, dense_bits=dense_bits, format=fmt)
    serve = ServeConfig(base_bits=4, pages=0, batch=4, context=96, chunk=64)
    engine, _ = build_engine(source, serve)
    rng = np.random.default_rng(0)
    of_domain = []
    for domain in range(DOMAINS):
        before = np.asarray(engine.state.stats.mass)
        for _ in range(4):
            prompt = domain + DOMAINS * rng.integers(0, VOCABULARY // DOMAINS, 64)
            engine.add(prompt.tolist(), max_tokens=24)
        tokens = {event.token for event in engine.run()}
        assert len(tokens) > 8
        assert {token % DOMAINS for token in tokens} == {domain}
        mass = np.asarray(engine.state.stats.mass) - before
        of_domain.append(mass / mass.sum(axis=1, keepdims=True))
    for mass, share in zip(of_domain, source.shares, strict=True):
        # a quarter of the experts: as much of the mass as of the shares, in every layer
        popular = np.argsort(-share, axis=1)[:, : EXPERTS // 4]
        measured = np.take_along_axis(mass, popular, axis=1).sum(axis=1)
        asked = np.take_along_axis(share, popular, axis=1).sum(axis=1)
        assert (measured > asked - 0.1).all()
        assert measured.mean() == pytest.approx(asked.mean(), abs=0.1)
        ranks = [np.argsort(np.argsort(x, axis=1), axis=1) for x in (mass, share)]
        assert np.corrcoef(*(rank.ravel() for rank in ranks))[0, 1] > 0.6
    # and domains differ: what is popular in one is not in the next
    popular = np.argsort(-source.shares[0], axis=1)[:, : EXPERTS // 4]
    assert np.take_along_axis(of_domain[1], popular, axis=1).sum(axis=1).mean() < 0.4


@pytest.mark.parametrize("make", [full_size._random_codes, full_size._random_weight])
def test_a_weight_takes_little_more_than_its_own_bytes_to_make(make):
    memory = make.lower(jax.random.key(0), "qkv", (4, 512, 256)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 8


def test_one_domain_is_a_bias_in_one_channel():
    share = full_size.popularity("zipf", LAYERS, EXPERTS)
    dense = full_size.random_dense(CONFIG, share[None])
    assert (np.asarray(dense.embedding[:, 0]) == full_size.CONSTANT).all()
    assert not np.asarray(dense.o[:, 0]).any()
    assert np.asarray(dense.o[:, 1]).all()
    assert (np.asarray(dense.final_norm) == 1).all()
    np.testing.assert_allclose(
        np.asarray(dense.router[:, :, 0], np.float32) * full_size.CONSTANT,
        np.log(share * EXPERTS),
        rtol=2**-8,
        atol=2**-8,
    )
    experts = full_size.random_experts(CONFIG, base_bits=2, group_size=64, scale_encoding="bf16")
    scales = np.asarray(experts.scales.down.codes[:, :, 0], np.float32)
    assert not scales[..., 0].any()
    assert scales[..., 1:].all()


@pytest.mark.parametrize("scales", [(32, "log8"), (64, "bf16")])
def test_a_source_s_arrays_are_those_of_its_format(scales):
    fmt = full_size.expert_format(CONFIG, *scales)
    source = RandomSource.make(CONFIG, SHARES, format=fmt)
    made = full_size.random_experts(
        CONFIG, base_bits=8, group_size=fmt.group_size, scale_encoding=fmt.scale_encoding
    )
    pages = [page for bits in (2, 4, 8) for page in source.level(bits)]
    assert len(pages) == len(made.base) == 4
    for page, like in zip(pages, made.base, strict=True):
        for array, wanted in zip(page, like, strict=True):
            assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
            assert not np.array_equal(array[0], array[1])
    assert not np.array_equal(pages[0].down, pages[1].down)
    for array, wanted in zip(source.scales(), made.scales, strict=True):
        for part, like in zip(array, wanted, strict=True):
            assert (part is None) == (like is None)
            assert part is None or (part.shape, part.dtype) == (like.shape, like.dtype)
    least = full_size.least_code(fmt.scale_encoding)
    reserved = source.scales().down.codes[:, :, 0]
    assert (reserved[..., :DOMAINS] == least).all()
    assert (reserved[..., DOMAINS:] != least).all()
    again = RandomSource.make(CONFIG, SHARES).level(4)
    np.testing.assert_array_equal(pages[1].gate_up, again[0].gate_up)


def test_recorded_shares_keep_their_experts_in_all_domains(tmp_path):
    recorded = np.random.default_rng(0).dirichlet(np.full(8, 0.3), size=(3, 2))
    file = tmp_path / "routing.json"
    names = ("x", "y", "z")
    by_name = {name: share.tolist() for name, share in zip(names, recorded, strict=True)}
    file.write_text(json.dumps(by_name))
    found = full_size.popularity_by_domain(str(file), 4, 16)
    assert tuple(found) == names
    mean = full_size.popularity(str(file), 4, 16)
    for share in found.values():
        np.testing.assert_allclose(share.sum(axis=1), 1)
    np.testing.assert_allclose(np.mean(list(found.values()), axis=0), mean)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("[1]", "holds a list"),
        ('{"a": [[1, "x"]]}', "could not convert"),
        ('{"a": [[1, 2]], "b": [[1, 2, 3]]}', r"shapes \[\(1, 2\), \(1, 3\)\]"),
        ('{"a": {"b": 1}}', "not 'dict'"),
        ('{"a": [[1, 2]], "b": 3}', r"shapes \[\(1, 2\), \(\)\]"),
        ('{"a": 3}', r"shapes \[\(\)\]"),
        ("{}", r"shapes \[\]"),
    ],
)
def test_bad_routing_files_are_refused(tmp_path, text, message):
    file = tmp_path / "routing.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=f"routing.json.*{message}"):
        full_size.popularity_by_domain(str(file), 4, 16)


def test_too_many_domains_are_refused():
    shares = {str(i): SHARES["0"] for i in range(65)}
    with pytest.raises(ValueError, match="1 to 64 domains, got 65"):
        RandomSource.make(CONFIG, shares)
    with pytest.raises(ValueError, match=r"shares must be \(1, 4, 32\), got \(1, 4, 16\)"):
        RandomSource.make(CONFIG, {"a": SHARES["0"][:, :16]})


@pytest.mark.parametrize(("group_size", "encoding"), [(64, "bf16"), (32, "log8")])
def test_scales_of_every_encoding_lie_in_their_range(group_size, encoding):
    experts = full_size.random_experts(
        CONFIG, base_bits=2, group_size=group_size, scale_encoding=encoding
    )
    assert experts.format.group_size == group_size
    for name in ("gate_up", "down"):
        stored = getattr(experts.scales, name)
        codes = untile_scales(stored.codes)
        scales = np.asarray(decode_scales(stored._replace(codes=codes)))
        if name == "down":
            assert scales[..., 0].max() <= full_size.EXPERT_SCALES[1] / 250
            scales = scales[..., 1:]
        least, largest = full_size.EXPERT_SCALES
        assert scales.min() == pytest.approx(least, rel=0.03)
        assert scales.max() == pytest.approx(largest, rel=0.03)
