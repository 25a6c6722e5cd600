"""Random damage to safetensors files: one InputError, or a conversion of what the bytes now mean.

Never another exception, never an output that is there but not whole.
"""

import random
import shutil

import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that the oracle reads)
import numpy as np
from checkpoint.stored import StoredExperts
from safetensors import SafetensorError
from safetensors.numpy import load_file

from convert import convert as run_convert
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.errors import InputError
from dynaexq_jax.models.names import expert_names

CASES = 160


def flip_bit(data, rng, low, high):
    position = rng.randrange(low, high)
    data[position] ^= 1 << rng.randrange(8)


def damage(data, rng):
    """Damages a file in place, in one of several ways; what was done."""
    header_end = 8 + int.from_bytes(data[:8], "little")
    kind = rng.choice(("length", "header", "header", "header", "splice", "data", "data", "cut"))
    if kind == "length":
        flip_bit(data, rng, 0, 8)
    elif kind == "header":
        flip_bit(data, rng, 8, header_end)
    elif kind == "splice":  # digits, braces and quotes do the most harm
        position = rng.randrange(8, header_end)
        data[position : position + rng.randrange(3)] = rng.choice((b"9", b"[", b"}", b'"', b"-1"))
    elif kind == "data":
        for _ in range(rng.choice((1, 1, 2, 4, 100))):
            flip_bit(data, rng, header_end, len(data))
    else:
        start = rng.randrange(len(data))
        del data[start : start + rng.randrange(1, 2000)]
    return kind


def oracle(path):
    """The tensors as the safetensors library reads them, or None where it refuses."""
    try:
        return load_file(path)
    except SafetensorError:
        return None


def assert_means(output, tensors):
    """A checkpoint of one layer holds these tensors: the dense ones as they are, and every expert
    with codes of which none could be nearer to its weight."""
    checkpoint = Checkpoint.open(output)
    for name, array in checkpoint.dense().items():
        np.testing.assert_array_equal(array, tensors.pop(name))
    stored = StoredExperts(checkpoint)
    values = checkpoint.format.table.values(8)
    for expert in range(checkpoint.experts):
        names = expert_names(0, expert)
        gate, up, down = (tensors.pop(n) for n in names.values())
        matrices = zip((np.concatenate([gate, up]), down), stored.expert(0, expert), strict=True)
        for weights, (codes, scale) in matrices:
            weights = weights.astype(np.float32)
            left = np.abs(weights - values[codes] * scale)
            clipped = np.abs(weights) > values.max() * scale
            half_step = max(checkpoint.format.table.residual_step) / 2
            assert np.all((left <= 1.001 * half_step * scale) | clipped)
            farthest = np.where(weights < 0, values.argmin(), values.argmax())
            np.testing.assert_array_equal(codes[clipped], farthest[clipped])
    assert not tensors


def message_of_refusal(source, output):
    """The InputError of a conversion, or None if it ends well; other exceptions pass."""
    try:
        run_convert(source, output, force=True, progress=False)
    except InputError as error:
        return str(error)
    return None


def test_random_damage(tmp_path, make_tiny_model):
    make_tiny_model(tmp_path / "hf", num_experts=2, num_hidden_layers=1)
    path = tmp_path / "hf" / "model.safetensors"
    whole = path.read_bytes()
    outcomes = {"refused": 0, "converted": 0}
    for case in range(CASES):
        data = bytearray(whole)
        kind = damage(data, random.Random(case))
        path.write_bytes(data)
        output = tmp_path / "out"
        message = message_of_refusal(tmp_path / "hf", output)
        if message is not None:
            assert "\n" not in message, f"case {case} ({kind})"
            assert not output.exists(), f"case {case} ({kind})"
            outcomes["refused"] += 1
        else:
            tensors = oracle(path)
            assert tensors is not None, f"case {case} ({kind}) was accepted"
            assert_means(output, tensors)
            outcomes["converted"] += 1
            shutil.rmtree(output)
    assert min(outcomes.values()) >= CASES // 8, outcomes
