"""``ModelConfig`` from the ``config.json`` of others: every mistake is an InputError."""

import contextlib

import pytest
from golden import weights as golden

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError

WRONG = (None, 0, -1, 1.5, float("nan"), "x", [], [1], {}, {"a": 1}, True)


def with_rope(**changes):
    config = golden.CONFIGS["yarn_mscale"]
    return {**config, "rope_scaling": {**config["rope_scaling"], **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "unknown architecture"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window attention is not served"),
        ({"hidden_size": None}, "hidden_size is missing; add it to config.json"),
        ({"hidden_size": "256"}, "hidden_size must be an integer, got '256'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be positive, got -1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
        ({"eos_token_id": ["x"]}, "eos_token_id must hold integers"),
        ({"num_local_experts": 3}, "num_experts and num_local_experts differ"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok 99 is more than num_experts"),
        ({"mlp_only_layers": [7]}, "mlp_only_layers names layer 7"),
        ({"decoder_sparse_step": 9}, "no layer has experts"),
        ({"rope_scaling": [1]}, "rope_parameters must be an object"),
    ],
)
def test_what_is_not_served_is_named(changes, message):
    with pytest.raises(InputError, match=f"^config: .*{message}"):
        ModelConfig.from_hf({**golden.CONFIGS["plain"], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_type": "spiral"}, "rope_type must be one of .*, got 'spiral'"),
        ({"original_max_position_embeddings": 0}, "must be positive, got 0"),
        ({"mscale": "1"}, "mscale must be a positive number, got '1'"),
        ({"truncate": []}, r"truncate must be true or false, got \[\]"),
    ],
)
def test_what_rope_does_not_take_is_named(changes, message):
    with pytest.raises(InputError, match=f"^config: .*{message}"):
        ModelConfig.from_hf(with_rope(**changes))


@pytest.mark.parametrize("key", golden.CONFIGS["plain"])
def test_no_value_gets_past_the_reader(key):
    for value in WRONG:
        with contextlib.suppress(InputError):
            hash(ModelConfig.from_hf({**golden.CONFIGS["plain"], key: value}))


@pytest.mark.parametrize("key", golden.CONFIGS["yarn_mscale"]["rope_scaling"])
def test_no_value_of_rope_gets_past_the_reader(key):
    for value in WRONG:
        with contextlib.suppress(InputError):
            hash(ModelConfig.from_hf(with_rope(**{key: value})))
