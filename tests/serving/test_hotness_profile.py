"""A restart that begins warm: hotness of one model saved, and the next loaded with it."""

import numpy as np
import pytest
from serving.conftest import SHAPES
from serving.nano import TEXT

import dynaexq_jax as dx
from dynaexq_jax import InputError
from dynaexq_jax.traffic import RoutedModel, read_profile, write_profile

PAGES = 24
OPTIONS = {"base_bits": 2, "pages": PAGES, "interval": 2, **SHAPES}
PROMPT = (TEXT / "python.txt").read_text(encoding="utf-8")[:400]


@pytest.fixture(scope="module")
def cold(converted):
    """Has seen Python."""
    llm = dx.load(converted, **OPTIONS)
    llm.generate(PROMPT, max_tokens=24)
    llm.engine.controller.settle()
    return llm


@pytest.fixture(scope="module")
def profile(cold, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "python.json"
    cold.save_hotness(path)
    return path


def test_the_next_one_begins_with_the_experts_that_were_hot(converted, cold, profile):
    llm = dx.load(converted, hotness_profile=profile, **OPTIONS)
    assert llm.engine.steps == 0
    levels = llm.residency()
    assert np.take((0, 1, 3), levels).sum() == PAGES
    hotness = cold.engine.controller.hotness
    for layer in range(3):
        held = levels[layer] > 0
        assert hotness.mean[layer, held].min() > hotness.mean[layer, ~held].max()
    np.testing.assert_array_equal(llm.engine.controller.hotness.mean, hotness.mean)
    assert llm.engine.controller.counters.pages == PAGES

    # what comes later is blended with it
    llm.generate("Il était une fois", max_tokens=8)
    llm.engine.controller.settle()
    after = llm.engine.controller.hotness.mean
    assert not np.array_equal(after, hotness.mean)
    assert np.all(after[hotness.mean > 0] > 0)


def test_a_file_that_is_not_there_yet_starts_cold(converted, tmp_path):
    path = tmp_path / "new.json"
    llm = dx.load(converted, hotness_profile=path, **OPTIONS)
    assert not llm.residency().any()
    assert not path.exists()  # written only when asked
    llm.save_hotness(str(path))
    assert read_profile(path, RoutedModel.of(llm.config)).tokens == 0


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("hf_dir", {}, "unquantized experts have one precision; convert the model, or leave"),
        ("converted", {"base_bits": 8}, "every expert stays at 8 bits, for the pool has no pages"),
    ],
)
def test_where_nothing_is_promoted_there_is_no_hotness(
    request, profile, model, options, message, monkeypatch
):
    for place in ("ExpertBank.allocate", "plain_experts"):
        monkeypatch.setattr(f"dynaexq_jax.serving.loading.{place}", None)
    path = request.getfixturevalue(model)
    with pytest.raises(InputError, match=f"hotness_profile {profile}: {message}"):
        dx.load(path, hotness_profile=profile, **options, **SHAPES)


def test_saving_needs_pages(llm, tmp_path):
    with pytest.raises(InputError, match="loaded without pages above its base; load it with"):
        llm.save_hotness(tmp_path / "none.json")


def test_bad_profiles_are_refused_before_anything_is_planned(
    converted, cold, profile, tmp_path, monkeypatch
):
    monkeypatch.setattr("dynaexq_jax.serving.loading.Planner", None)
    model = RoutedModel(layers=48, experts=128, experts_per_token=8, hidden_size=2048)
    other = tmp_path / "other.json"
    hotness = cold.engine.controller.hotness
    write_profile(other, model, type(hotness).cold(48, 128))
    with pytest.raises(InputError, match=r"48 layers of 128 experts.*this one has 3 layers of 32"):
        dx.load(converted, hotness_profile=other, **OPTIONS)
    for path in (tmp_path, tmp_path / "no" / "hot.json"):
        with pytest.raises(InputError, match=r"hotness_profile .*: give a file in a directory"):
            dx.load(converted, hotness_profile=path, **OPTIONS)
