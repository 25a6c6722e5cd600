import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaexq_jax.errors import InputError
from dynaexq_jax.text import StopMatcher


def run(stops, pieces):
    matcher = StopMatcher(stops)
    shown = [matcher.feed(piece) for piece in pieces]
    return [*shown, matcher.flush()], matcher.hit


def test_text_before_the_stop_only():
    assert run(["END"], ["one ", "two E", "ND three", "four"]) == (
        ["one ", "two ", "", "", ""],
        "END",
    )


def test_a_tail_that_may_become_a_stop_is_held_back_and_flushed():
    assert run(["<end>"], ["a<", "en", "x", "<e"]) == (["a", "", "<enx", "", "<e"], None)


def test_without_stops_everything_passes():
    assert run([], ["a", "", "b"]) == (["a", "", "b", ""], None)


def test_the_stop_that_is_complete_first_wins_and_then_the_longest():
    assert run(["abcde", "bcd"], ["xabcde"]) == (["xa", ""], "bcd")
    assert run(["cd", "bcd"], ["abcd"]) == (["a", ""], "bcd")


def test_an_empty_stop_is_refused():
    with pytest.raises(InputError, match="stop string cannot be empty"):
        StopMatcher(["a", ""])


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_how_the_text_is_cut_does_not_matter(stops, pieces):
    text = "".join(pieces)
    end, hit = len(text), None
    for length in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:length].endswith(stop)]
        if hits:
            hit = max(hits, key=len)
            end = length - len(hit)
            break
    shown, got = run(stops, pieces)
    assert ("".join(shown), got) == (text[:end], hit)
