"""``generation_kwargs`` read."""

import pytest

from dynaexq_jax import InputError, SamplingParams
from dynaexq_jax.tasks.generation import Generation


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Generation()),
        ({"until": "\n"}, Generation(stop=("\n",))),
        ({"until": ["a", "", "b"], "max_gen_toks": "7"}, Generation(stop=("a", "b"), max_tokens=7)),
        ({"max_tokens": 5, "max_new_tokens": 6}, Generation(max_tokens=6)),
        ({"do_sample": False, "temperature": 0.7}, Generation()),
        ({"temperature": 0.7}, Generation(sampling=SamplingParams(temperature=0.7))),
        ({"do_sample": True}, Generation(sampling=SamplingParams(temperature=1.0))),
        ({"do_sample": True, "temperature": 0.0, "top_k": None}, Generation()),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 3},
            Generation(sampling=SamplingParams(temperature=0.6, top_p=0.95, top_k=20, seed=3)),
        ),
    ],
)
def test_options(options, expected):
    assert Generation.of(options) == expected


def test_what_the_engine_does_not_have_is_refused():
    with pytest.raises(InputError, match=r"the task wants num_beams=4, which .* leave it out"):
        Generation.of({"until": ["a"], "num_beams": 4})
    with pytest.raises(InputError, match="top_p must be in"):
        Generation.of({"do_sample": True, "top_p": 0.0})
