import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaexq_jax.policy.shares import even_shares


@pytest.mark.parametrize(
    ("total", "at_least", "at_most", "shares"),
    [
        (9, [0, 0, 0], [9, 9, 9], [3, 3, 3]),
        (11, [0, 0, 0], [9, 9, 9], [4, 4, 3]),
        (10, [0, 0, 0], [1, 9, 9], [1, 5, 4]),
        (10, [8, 0, 0], [9, 9, 9], [8, 1, 1]),
        (10, [0, 0, 0], [1, 2, 3], [1, 2, 3]),
        (0, [0, 0], [4, 4], [0, 0]),
    ],
)
def test_examples(total, at_least, at_most, shares):
    assert even_shares(total, np.array(at_least), np.array(at_most)).tolist() == shares


@given(st.data())
def test_shares_keep_their_bounds_and_leave_nothing_that_could_be_given(data):
    bounds = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted)
    low, high = np.array(data.draw(st.lists(bounds, min_size=1, max_size=6))).T
    total = data.draw(st.integers(int(low.sum()), int(low.sum()) + 60))
    shares = even_shares(total, low, high)
    assert np.all((low <= shares) & (shares <= high))
    assert shares.sum() == min(total, high.sum())
    # Even: who has two more than another cannot give, or the other cannot take.
    for i in range(len(low)):
        for j in range(len(low)):
            assert shares[i] <= shares[j] + 1 or shares[i] == low[i] or shares[j] == high[j]


@pytest.mark.parametrize(("low", "high"), [([3, 3], [9, 9]), ([2, 0], [1, 9]), ([-1, 0], [9, 9])])
def test_impossible_bounds_are_refused(low, high):
    with pytest.raises(ValueError, match="cannot divide 5"):
        even_shares(5, np.array(low), np.array(high))
