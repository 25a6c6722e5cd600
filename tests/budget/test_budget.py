"""The planner's arithmetic, on made-up models: no file, no device."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dynaexq_jax import budget
from dynaexq_jax.budget import Demand, plan_budget, plan_fixed
from dynaexq_jax.errors import InputError
from dynaexq_jax.serving.config import ServeConfig
from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.pages import ExpertFormat

LEVELS = ((2,), (2, 4), (2, 4, 8))


def make_demand(**changes):
    fmt = {
        "hidden": 64,
        "width": 32,
        "group_size": 32,
        "scale_encoding": "bf16",
        "table": DEFAULT_TABLE,
    }
    fmt |= {name: changes.pop(name) for name in list(changes) if name in fmt}
    sizes = {
        "layers": 2,
        "experts": 8,
        "available_bits": (2, 4, 8),
        "dense_bytes": 10_000,
        "state_bytes": 5_000,
        "staging_bytes": lambda experts: 4 * experts.format.page_bytes + 100,
    }
    return Demand(format=ExpertFormat(**fmt), **(sizes | changes))


def no_temporaries(base_bits, pool_pages):
    return 0


@st.composite
def staging(draw):
    """Bytes on their way, of more pages for a larger pool."""
    least, most, share = draw(st.integers(0, 3)), draw(st.integers(3, 40)), draw(st.integers(1, 9))
    return lambda experts: (
        experts.format.page_bytes * min(most, max(least, experts.pool_pages // share)) + least
    )


@st.composite
def demands(draw):
    return make_demand(
        hidden=32 * draw(st.integers(1, 8)),
        width=32 * draw(st.integers(1, 8)),
        scale_encoding=draw(st.sampled_from(["bf16", "log8"])),
        layers=draw(st.integers(1, 5)),
        experts=draw(st.integers(1, 40)),
        available_bits=draw(st.sampled_from(LEVELS)),
        dense_bytes=draw(st.integers(0, 10**7)),
        state_bytes=draw(st.integers(0, 10**7)),
        staging_bytes=draw(staging()),
    )


@st.composite
def programs(draw):
    """Temporaries as a compiler gives them: a little more with a pool, more for a wider base."""
    fixed = draw(st.integers(0, 10**6))
    with_pool = draw(st.integers(0, 10**4))
    of_page = draw(st.integers(0, 3))
    return lambda bits, pages: fixed + 16 * bits + (with_pool + of_page * pages if pages else 0)


def least_and_most(demand, temporaries):
    """Bytes of the smallest plan and of the largest that can be of any use."""
    lowest = demand.available_bits[0]
    top = demand.available_bits[-1]
    sizes = [plan_fixed(demand, base_bits=lowest, pool_pages=0, temporary_bytes=temporaries)]
    sizes += [
        plan_fixed(
            demand,
            base_bits=bits,
            pool_pages=demand.promotable_pages(bits),
            temporary_bytes=temporaries,
        )
        for bits in {lowest, top}
    ]
    return sizes[0].total_bytes, max(plan.total_bytes for plan in sizes)


@given(demands(), programs(), st.data())
def test_a_plan_spends_the_budget_and_no_more(demand, temporaries, data):
    least, most = least_and_most(demand, temporaries)
    given_bytes = data.draw(st.integers(least, most + 1000))
    plan = plan_budget(demand, given_bytes, temporary_bytes=temporaries)
    assert plan.total_bytes <= given_bytes
    assert plan.total_bytes == sum(plan.rows.values())
    assert all(size >= 0 for size in plan.rows.values())
    assert plan.margin_bytes == (plan.total_bytes - plan.margin_bytes) // 100

    cap = demand.promotable_pages(plan.base_bits)
    assert plan.promotable_pages == cap
    assert 0 <= plan.pool_pages <= cap
    if plan.pool_pages < cap:  # one more page would not fit
        more = plan_fixed(
            demand,
            base_bits=plan.base_bits,
            pool_pages=plan.pool_pages + 1,
            temporary_bytes=lambda bits, pages: max(plan.temporary_bytes, temporaries(bits, pages)),
        )
        assert more.total_bytes > given_bytes


@given(demands(), programs(), st.data())
def test_the_highest_base_that_fits_is_chosen(demand, temporaries, data):
    least, most = least_and_most(demand, temporaries)
    given_bytes = data.draw(st.integers(least, most + 1000))
    plan = plan_budget(demand, given_bytes, temporary_bytes=temporaries)
    fitting = [
        bits
        for bits in demand.available_bits
        if plan_fixed(demand, base_bits=bits, pool_pages=0, temporary_bytes=temporaries).total_bytes
        <= given_bytes
    ]
    assert plan.base_bits == fitting[-1]


@given(demands(), programs(), st.sampled_from([None, 2, 4, 8]), st.integers(1, 10**6))
def test_the_smallest_budget_that_works_is_named(demand, temporaries, base, short):
    assume(base is None or base in demand.available_bits)

    def plan(size):
        return plan_budget(demand, size, base_bits=base, temporary_bytes=temporaries)

    bits = base or demand.available_bits[0]
    smallest = plan_fixed(
        demand, base_bits=bits, pool_pages=0, temporary_bytes=temporaries
    ).total_bytes
    assert plan(smallest).total_bytes == smallest
    for missing in {1, min(short, smallest - 1)}:
        with pytest.raises(InputError, match=rf"at {bits} bits .*\({smallest} bytes\); raise"):
            plan(smallest - missing)


@given(demands(), st.data())
@example(make_demand(), None)
def test_a_plan_s_own_bytes_give_the_same_plan(demand, data):
    """No byte is lost to rounding: what a plan needs is enough for it."""
    lowest = demand.available_bits[0]
    cap = demand.promotable_pages(lowest)
    for pages in range(1, cap + 1) if data is None else [data.draw(st.integers(0, cap))]:
        wanted = plan_fixed(
            demand, base_bits=lowest, pool_pages=pages, temporary_bytes=no_temporaries
        )
        got = plan_budget(
            demand, wanted.total_bytes, base_bits=lowest, temporary_bytes=no_temporaries
        )
        assert got.rows == wanted.rows
        assert got.pool_pages == pages


def test_array_rows_are_the_bytes_of_the_format():
    demand = make_demand(scale_encoding="log8")
    fmt, experts = demand.format, demand.layers * demand.experts
    plan = plan_fixed(demand, base_bits=2, pool_pages=7, temporary_bytes=lambda *_: 321)
    assert plan.rows == {
        "dense weights": 10_000,
        "expert base": experts * fmt.page_bytes,
        "expert scales": experts * fmt.scale_bytes,
        "page pool": 7 * fmt.page_bytes,
        "page table": 3 * experts * 4,
        "cache and batch": 5_000,
        "staging": 4 * fmt.page_bytes + 100,
        "temporaries": 321,
        "margin": plan.margin_bytes,
    }


@pytest.mark.parametrize(
    ("available", "base", "most"),
    [((2, 4, 8), 2, 48), ((2, 4, 8), 4, 32), ((2, 4, 8), 8, 0), ((2, 4), 2, 16), ((2, 4), 4, 0)],
)
def test_pages_are_capped_at_what_can_be_promoted(available, base, most):
    demand = make_demand(available_bits=available)
    plan = plan_budget(demand, 10**9, base_bits=base, temporary_bytes=no_temporaries)
    assert (plan.pool_pages, plan.promotable_pages) == (most, most)
    assert (plan.staging_bytes > 0) == (most > 0)
    assert plan_fixed(demand, base_bits=base, pool_pages=most).pool_pages == most
    for pages in (-1, most + 1):
        with pytest.raises(InputError, match=rf"--pages must be in 0\.\.{most} .* got {pages}"):
            plan_fixed(demand, base_bits=base, pool_pages=pages)


def test_pages_are_capped_where_offsets_would_overflow(monkeypatch):
    demand = make_demand(hidden=256, width=64)
    words = 2 * 4 * 256  # gate_up page: [B = 2, 2C = 4, 256]
    monkeypatch.setattr(budget, "MAX_ARRAY_ELEMENTS", 5 * words + 3)
    plan = plan_budget(demand, 10**9, base_bits=2, temporary_bytes=no_temporaries)
    assert plan.pool_pages == 5
    assert plan.promotable_pages == 48


def test_a_missing_level_is_never_chosen_and_refused_by_name():
    demand = make_demand(available_bits=(2, 4))
    assert plan_budget(demand, 10**9, temporary_bytes=no_temporaries).base_bits == 4
    for plan in (
        lambda: plan_budget(demand, 10**9, base_bits=8, temporary_bytes=no_temporaries),
        lambda: plan_fixed(demand, base_bits=8, pool_pages=0),
    ):
        with pytest.raises(
            InputError, match=r"base of 8 bits needs a level .* it holds 2, 4 bits; choose"
        ):
            plan()


def test_programs_are_analysed_only_for_bases_that_may_fit():
    demand = make_demand()
    analysed = []

    def temporaries(bits, pages):
        analysed.append(bits)
        return 0

    size = plan_fixed(demand, base_bits=4, pool_pages=3).total_bytes
    assert plan_budget(demand, size, temporary_bytes=temporaries).pool_pages == 3
    assert analysed == [4]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("0", "at least 1 byte, got '0'"),
        ("0GiB", "at least 1 byte, got '0GiB'"),
        (0, "hbm_budget must be positive, got 0"),
        (-5, "hbm_budget must be positive, got -5"),
        ("-5GiB", "cannot read '-5GiB' as an amount of memory"),
        ("much", "cannot read 'much'"),
        ("3 TiB", "cannot read '3 TiB'"),
        ("", "cannot read ''"),
        (1.5e9, "whole bytes, got 1500000000.0"),
    ],
)
def test_budgets_that_are_none(size, message):
    with pytest.raises(InputError, match=message):
        ServeConfig(hbm_budget=size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("24GiB", 24 * 2**30), ("1.5 GB", 1_500_000_000), ("700mb", 700_000_000), (123, 123)],
)
def test_budgets_in_units(size, expected):
    assert ServeConfig(hbm_budget=size).budget_bytes == expected


def test_without_a_budget_temporaries_are_not_known():
    plan = plan_fixed(make_demand(), base_bits=2, pool_pages=7)
    assert plan.temporary_bytes is None
    assert "temporaries" not in plan.rows
    assert sum(plan.rows.values()) == plan.total_bytes
