import collections

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dynaexq_jax.residency import PoolExhausted, Residency, pages_of_levels

BASES = (2, 4, 8)
PAGES_ABOVE = {2: (0, 1, 3), 4: (0, 0, 2), 8: (0, 0, 0)}


def make(base_bits=2, *, layers=2, experts=3, pool_pages=5):
    return Residency(layers=layers, experts=experts, base_bits=base_bits, pool_pages=pool_pages)


def rungs(residency, reservation):
    return np.unravel_index(reservation.cells, residency.table.shape)[0].tolist()


class Model:
    """What the table must be, kept the slow way: the pages of each expert, in their order."""

    def __init__(self, residency):
        self.residency = residency
        self.table = np.full_like(residency.table, -1)
        above = PAGES_ABOVE[residency.base_bits]
        held = np.arange(above[-1] + 1)
        self.level_of_held = np.searchsorted(above, held, side="right") - 1
        """The highest level that so many pages are enough for."""

    def held(self, layer, expert):
        return np.count_nonzero(self.table[:, layer, expert] >= 0)

    def promote(self, layer, expert, level, *, commit):
        before = self.residency.table.copy()
        reservation = self.residency.reserve(layer, expert, level)
        np.testing.assert_array_equal(self.residency.table, before)
        self.check()
        if commit:
            self.commit(reservation)
        return reservation

    def commit(self, reservation):
        self.residency.commit(reservation)
        above = PAGES_ABOVE[self.residency.base_bits]
        pages = reservation.pages.tolist()
        for layer, expert, level in zip(*reservation[:3], strict=True):
            first = self.held(layer, expert)
            self.table[first : above[level], layer, expert] = pages[: above[level] - first]
            del pages[: above[level] - first]
        assert not pages

    def demote(self, layer, expert, level):
        self.residency.demote(layer, expert, level)
        self.table[PAGES_ABOVE[self.residency.base_bits][level] :, layer, expert] = -1

    def check(self):
        residency = self.residency
        residency.check_integrity()
        assert (
            residency.free_pages + residency.used_pages + residency.reserved_pages
            == residency.pool_pages
        )
        table = residency.table
        assert np.array_equal(table, self.table)
        held = np.count_nonzero(self.table >= 0, axis=0)
        assert np.array_equal(residency.levels(), self.level_of_held[held])
        owned = table[table >= 0].tolist()
        owned += [page for item in residency.open_reservations for page in item.pages]
        assert len(set(owned)) == len(owned)


class ResidencyMachine(RuleBasedStateMachine):
    @initialize(
        base_bits=st.sampled_from(BASES),
        layers=st.integers(1, 3),
        experts=st.integers(1, 4),
        pool_pages=st.integers(0, 12),
    )
    def start(self, **config):
        self.residency = Residency(**config)
        self.model = Model(self.residency)

    def draw_expert(self, data):
        _, layers, experts = self.residency.table.shape
        return data.draw(st.integers(0, layers - 1)), data.draw(st.integers(0, experts - 1))

    @rule(data=st.data(), level=st.integers(0, 2), commit=st.booleans())
    def reserve(self, data, level, commit):
        layer, expert = self.draw_expert(data)
        is_open = any(
            (layer, expert) in zip(r.layers, r.experts, strict=True)
            for r in self.residency.open_reservations
        )
        if is_open or level <= self.residency.levels()[layer, expert]:
            with pytest.raises(ValueError, match=f"expert {expert} of layer {layer}"):
                self.residency.reserve(layer, expert, level)
            return
        have = self.model.held(layer, expert)
        if PAGES_ABOVE[self.residency.base_bits][level] - have > self.residency.free_pages:
            with pytest.raises(PoolExhausted):
                self.residency.reserve(layer, expert, level)
        else:
            self.model.promote(layer, expert, level, commit=commit)

    @precondition(lambda self: self.residency.open_reservations)
    @rule(data=st.data(), commit=st.booleans())
    def settle(self, data, commit):
        reservation = data.draw(st.sampled_from(self.residency.open_reservations))
        if commit:
            self.model.commit(reservation)
        else:
            self.residency.cancel(reservation)
        with pytest.raises(ValueError, match="not open"):
            self.residency.commit(reservation)

    @rule(data=st.data(), level=st.integers(0, 2))
    def demote(self, data, level):
        layer, expert = self.draw_expert(data)
        is_open = any(
            (layer, expert) in zip(r.layers, r.experts, strict=True)
            for r in self.residency.open_reservations
        )
        current = self.residency.levels()[layer, expert]
        if is_open or not self.residency.base_level <= level < current:
            with pytest.raises(ValueError, match=f"expert {expert} of layer {layer}"):
                self.residency.demote(layer, expert, level)
        else:
            self.model.demote(layer, expert, level)

    @invariant()
    def holds(self):
        if hasattr(self, "model"):
            self.model.check()


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("base_bits", "calls"), [(2, 100_000), (4, 10_000), (8, 1_000)])
def test_random_transitions_keep_the_invariants(base_bits, calls):
    rng = np.random.default_rng(base_bits)
    layers, experts, pool_pages = 4, 8, 37
    model = Model(make(base_bits, layers=layers, experts=experts, pool_pages=pool_pages))
    residency, done = model.residency, collections.Counter()
    places = zip(*(rng.integers(n, size=calls).tolist() for n in (layers, experts, 3)), strict=True)
    kinds = rng.choice(
        ["reserve", "commit", "cancel", "demote"], calls, p=(0.4, 0.3, 0.1, 0.2)
    ).tolist()
    for kind, (layer, expert, level) in zip(kinds, places, strict=True):
        try:
            if kind == "reserve":
                residency.reserve(layer, expert, level)
            elif kind == "demote":
                model.demote(layer, expert, level)
            elif residency.open_reservations:
                reservation = residency.open_reservations[
                    rng.integers(len(residency.open_reservations))
                ]
                model.commit(reservation) if kind == "commit" else residency.cancel(reservation)
            else:
                continue
            done[kind] += 1
        except PoolExhausted:
            done["exhausted"] += 1
        except ValueError:
            done["refused"] += 1
        model.check()
    if base_bits == 8:  # nothing above the base: every transition is refused
        assert set(done) == {"refused"}
    else:
        assert min(done[k] for k in ("reserve", "commit", "cancel", "demote", "exhausted")) > 100


def test_lower_pages_come_first_and_a_level_counts_when_all_its_pages_are_held():
    residency = make()
    reservation = residency.reserve(1, 2, 2)
    assert (rungs(residency, reservation), reservation.pages.tolist()) == ([0, 1, 2], [0, 1, 2])
    assert residency.levels()[1, 2] == 0
    residency.commit(reservation)
    assert residency.table[:, 1, 2].tolist() == [0, 1, 2]
    assert residency.levels()[1, 2] == 2
    residency.demote(1, 2, 1)
    assert residency.table[:, 1, 2].tolist() == [0, -1, -1]
    assert residency.reserve(0, 0, 2).pages.tolist() == [1, 2, 3]


@pytest.mark.parametrize("base_bits", [2, 4])
def test_many_at_once_are_as_one_after_another(base_bits):
    rng = np.random.default_rng(base_bits)
    at_once, in_turn = (make(base_bits, layers=3, experts=8, pool_pages=31) for _ in range(2))
    moved = 0
    for _ in range(300):
        levels, up = at_once.levels(), rng.random() < 0.5
        wanted = rng.integers(at_once.base_level, 3, levels.shape)
        places = np.argwhere(wanted > levels if up else wanted < levels)[: rng.integers(6)]
        layers, experts = rng.permutation(places).T
        target = wanted[layers, experts]
        changes = list(zip(layers.tolist(), experts.tolist(), target.tolist(), strict=True))
        if not up:
            at_once.demote(layers, experts, target)
            for change in changes:
                in_turn.demote(*change)
        else:
            try:
                reservation = at_once.reserve(layers, experts, target)
            except PoolExhausted:
                continue
            for one in [in_turn.reserve(*change) for change in changes]:
                in_turn.commit(one)
            (at_once.commit if rng.random() < 0.9 or not changes else at_once.cancel)(reservation)
            if not np.array_equal(at_once.levels(), in_turn.levels()):  # cancelled
                in_turn.demote(layers[::-1], experts[::-1], levels[layers, experts][::-1])
        moved += len(changes)
        np.testing.assert_array_equal(at_once.table, in_turn.table)
        np.testing.assert_array_equal(at_once.planned_levels(), at_once.levels())
        at_once.check_integrity()
    assert moved > 200


def test_base_4_is_promoted_by_both_pages_of_its_one_step():
    residency = make(4)
    assert residency.levels().tolist() == [[1] * 3] * 2
    assert rungs(residency, residency.reserve(0, 0, 2)) == [0, 1]


def test_base_8_has_no_rungs():
    residency = make(8, pool_pages=0)
    assert residency.table.shape == (0, 2, 3)
    assert residency.levels().tolist() == [[2] * 3] * 2
    residency.check_integrity()


def test_pages_of_levels():
    assert {base: pages_of_levels(base) for base in BASES} == PAGES_ABOVE


def test_the_callers_views_cannot_change_the_table():
    residency = make()
    with pytest.raises(ValueError, match="read-only"):
        residency.table[0, 0, 0] = 1
    residency.levels()[:] = 2
    assert residency.levels().max() == 0


def test_exhausted_pool_changes_nothing():
    residency = make(pool_pages=2)
    with pytest.raises(
        PoolExhausted, match=r"expert 0 of layer 0: 3 pages are needed, 2 of 2 are free"
    ):
        residency.reserve(0, 0, 2)
    assert residency.free_pages == 2
    residency.check_integrity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"pool_pages": -1}, "pool_pages must be at least 0, got -1"),
        ({"base_bits": 3}, "bits must be one of"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_broken_preconditions_are_refused():
    residency = make()
    with pytest.raises(ValueError, match="there are 2 layers of 3 experts"):
        residency.reserve(0, 3, 1)
    with pytest.raises(ValueError, match="there are 2 layers of 3 experts"):
        residency.demote(-1, 0, 0)
    with pytest.raises(ValueError, match="up to 2, got 3"):
        residency.reserve(0, 0, 3)
    with pytest.raises(ValueError, match=r"named twice: \[1, 1\]"):
        residency.reserve(np.array([0, 0]), np.array([1, 1]), np.array([1, 2]))
    with pytest.raises(ValueError, match="expert 2 of layer 1 can be promoted to a level above 0"):
        residency.reserve(np.array([0, 1]), np.array([0, 2]), np.array([1, 0]))
    assert residency.free_pages == residency.pool_pages
    reservation = residency.reserve(0, 0, 1)
    with pytest.raises(ValueError, match="open reservation"):
        residency.reserve(0, 0, 2)
    residency.commit(reservation)
    later = residency.reserve(0, 0, 2)
    with pytest.raises(ValueError, match="open reservation"):
        residency.demote(0, 0, 0)
    residency.cancel(later)
    residency.check_integrity()


@pytest.mark.parametrize("damage", ["hole", "two owners", "lost page", "wrong level"])
def test_integrity_check_finds_damage(damage):
    residency = make()
    residency.commit(residency.reserve(0, 0, 2))
    residency.commit(residency.reserve(0, 1, 1))
    residency.check_integrity()
    if damage == "hole":
        residency._table[:2, 0, 0] = residency._table[[1, 0], 0, 0]
        residency._free.append(int(residency._table[0, 0, 0]))
        residency._table[0, 0, 0] = -1
    elif damage == "two owners":
        residency._table[0, 0, 1] = residency._table[0, 0, 0]
    elif damage == "lost page":
        residency._free.pop()
    else:
        residency._levels[0, 1] = 0
    with pytest.raises(AssertionError):
        residency.check_integrity()
