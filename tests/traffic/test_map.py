"""Calibrated maps: what is chosen, what is written is what is read, and what is refused."""

import json

import numpy as np
import pytest

from dynaexq_jax.errors import InputError
from dynaexq_jax.policy import Hotness, StaticMixed, replay
from dynaexq_jax.residency import Residency
from dynaexq_jax.traffic import Ladder, RoutedModel, calibrated_map, read_map, write_map

MODEL = RoutedModel(layers=3, experts=5, experts_per_token=2, hidden_size=64)
LADDER = Ladder(base_bits=2, max_bits=8, pool_pages=10)
HOTNESS = np.random.default_rng(0).random((3, 5)) ** 4
BENEFIT = np.random.default_rng(1).random((3, 2, 5)) * [[1.0], [0.1]]


def some_map(**changes):
    options = {"tokens": 640, "benefit": BENEFIT, "pinned": ((2, 4),), **changes}
    return calibrated_map(MODEL, options.pop("ladder", LADDER), HOTNESS, **options)


def test_the_map_is_what_static_mixed_holds():
    found = some_map()
    residency = Residency(layers=3, experts=5, base_bits=2, pool_pages=10)
    steps = replay(
        StaticMixed(hotness=HOTNESS),
        [(HOTNESS[:, ::-1], 64)] * 3,
        residency=residency,
        hotness=Hotness.cold(3, 5),
        benefit=BENEFIT,
        max_transitions=10,
        pinned=((2, 4),),
    )
    for _ in steps:
        np.testing.assert_array_equal(residency.levels(), found.levels)
    assert residency.free_pages == 0
    assert found.levels[2, 4] == 2
    assert 0 <= found.gap < 0.05
    assert found.value <= found.bound * (1 + 1e-12)


def test_a_ladder_of_one_kind_of_step_is_solved_exactly():
    only_4_bits = Ladder(base_bits=2, max_bits=4, pool_pages=6)
    assert some_map(ladder=only_4_bits, pinned=()).gap == pytest.approx(0, abs=1e-12)
    nothing = some_map(ladder=Ladder(base_bits=2, max_bits=8, pool_pages=0), pinned=())
    assert (nothing.value, nothing.bound, nothing.gap) == (0, 0, 0)
    assert not nothing.levels.any()


def test_every_bit_comes_back(tmp_path):
    path, found = tmp_path / "map.json", some_map()
    write_map(path, found)
    got = read_map(path, MODEL)
    assert got.hotness.tobytes() == found.hotness.tobytes()
    np.testing.assert_array_equal(got.levels, found.levels)
    for name in ("model", "ladder", "tokens", "value", "bound"):
        assert getattr(got, name) == getattr(found, name)
    assert json.loads(path.read_text())["gap"] == found.gap


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a map; make it again with: dynaexq calibrate-map"),
        ({"version": 2}, "version is 2, this program reads 1"),
        ({"hotness": [[1.0]]}, r"hotness has shape \(1, 1\), its model 3 layers of 5 experts"),
        ({"hotness": [[-1.0] * 5] * 3}, "hotness must be finite and not negative"),
        ({"levels": None}, "is not a valid map"),
        ({"bound": "high"}, "is not a valid map"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, message):
    path = tmp_path / "map.json"
    write_map(path, some_map())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_map(path, MODEL)


def test_a_map_of_another_model_is_refused(tmp_path):
    path = tmp_path / "map.json"
    write_map(path, some_map())
    other = RoutedModel(layers=3, experts=6, experts_per_token=2, hidden_size=64)
    with pytest.raises(InputError, match="was made for a model with 3 layers of 5 experts"):
        read_map(path, other)
