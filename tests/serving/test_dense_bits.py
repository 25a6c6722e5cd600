"""A checkpoint with dense matrices at 8 bits: what it takes on the device, and what it costs."""

import math

import pytest
from serving import nano
from serving.conftest import SHAPES

import dynaexq_jax as dx
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.serving.perplexity import load_for_scoring, score_text
from dynaexq_jax.trees import tree_bytes

WINDOW = 256


@pytest.fixture(scope="module")
def converted_8(tmp_path_factory):
    return nano.converted_nano(tmp_path_factory, dense_bits=8)


def test_the_plan_counts_bytes_and_scales(converted, converted_8):
    rows = [dx.load(path, base_bits=2, **SHAPES) for path in (converted, converted_8)]
    planned = [llm.plan.rows["dense weights"] for llm in rows]
    assert planned == [tree_bytes(llm.engine.params) for llm in rows]
    matrices = [
        array.shape
        for name, array in Checkpoint.open(converted).dense_records().items()
        if "_proj" in name
    ]
    assert planned[0] - planned[1] == sum(n * k - 4 * n for n, k in matrices)
    assert rows[1].generate("def main(", max_tokens=8)


@pytest.fixture(scope="module")
def scored(converted, converted_8):
    """Both at 8 bits, loaded once for all texts."""
    return [
        load_for_scoring(path, precision="8", window=WINDOW) for path in (converted, converted_8)
    ]


@pytest.mark.parametrize("name", ["python", "fr"])
def test_perplexity_is_that_of_16_bits(scored, name):
    """Within what 8 bits may cost the experts, 0.3 %.

    The steps of a row are 2 max|w| / 254: an error of about 0.7 % of the weights, half of that of
    the experts' 8 bits, and in fewer weights.
    """
    losses = [
        score_text(served, nano.TEXT / f"{name}.txt", window=WINDOW, max_windows=8).nll
        for served in scored
    ]
    assert losses[0] != losses[1]
    assert abs(math.expm1(losses[1] - losses[0])) < 0.003
