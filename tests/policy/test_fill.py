import numpy as np
import pytest

from dynaexq_jax.policy.fill import Steps, fill


def one_by_one(steps, pool_pages):
    """By a loop over all steps in order."""
    places = sorted(
        np.ndindex(steps.rank.shape),
        key=lambda at: (-steps.rank[at], not steps.held[at], at[1], at[0], at[2]),
    )
    taken = np.zeros(steps.rank.shape, np.bool_)
    for place in places:
        cost = steps.pages[place[1]]
        if cost <= pool_pages and (steps.rank[place] > 0 or steps.held[place]):
            taken[place] = True
            pool_pages -= cost
    return taken


@pytest.mark.parametrize("pages", [(1,), (2,), (1, 2), (1, 1, 3), (2, 5)])
@pytest.mark.parametrize("different_ranks", [1, 3, 20, 10**6])
def test_steps_are_taken_in_order_while_they_fit(pages, different_ranks):
    rng = np.random.default_rng(different_ranks)
    shape = (5, len(pages), 12)
    for free in (-40, 0, 0, 1, 3, 40, 10**4):  # a full pool is the usual one
        rank = rng.integers(0, different_ranks, shape, endpoint=True) / different_ranks
        rank[rng.random(shape) < 0.1] = np.inf
        rank = np.minimum.accumulate(rank, axis=1)
        held = np.arange(len(pages))[:, None] < rng.choice(len(pages) + 1, (5, 1, 12))
        rank[held] *= 1.3
        steps = Steps(rank, held, np.array(pages))
        pool_pages = max(0, int((held.sum(axis=(0, 2)) * pages).sum()) + free)
        np.testing.assert_array_equal(fill(steps, pool_pages), one_by_one(steps, pool_pages))


def test_an_empty_pool_takes_nothing():
    steps = Steps(np.full((2, 1, 3), np.inf), np.zeros((2, 1, 3), np.bool_), np.array([1]))
    assert not fill(steps, 0).any()
