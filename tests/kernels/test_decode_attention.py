"""Decode attention: every implementation against numpy, and the kernels' lowering for a GPU."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_attention import DecodeConfig, decode_attention
from pallas_kernels.decode_attention.shapes import DecodeShapes, default_config

BFLOAT16 = ml_dtypes.bfloat16
EPS = 1e-6

HAS_MOSAIC = jax.__version_info__ >= (0, 11)
needs_mosaic = pytest.mark.skipif(not HAS_MOSAIC, reason="the kernels need jax 0.11")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes, tuning and positions of one call."""

    context: int
    q_heads: int
    kv_heads: int
    head: int
    splits: int
    stages: int
    positions: tuple[int, ...]


CASES = {
    "idle slot, first and last position": Case(
        context=128, q_heads=6, kv_heads=2, head=64, splits=2, stages=1, positions=(-1, 0, 127)
    ),
    "new position on a split border, ragged": Case(
        context=256, q_heads=8, kv_heads=1, head=128, splits=3, stages=1, positions=(64, 200, 65)
    ),
    "more tiles than stages, no combine": Case(
        context=320, q_heads=8, kv_heads=1, head=128, splits=1, stages=2, positions=(300, -1)
    ),
    "16 heads of 256": Case(
        context=128, q_heads=16, kv_heads=1, head=256, splits=2, stages=1, positions=(127,)
    ),
}
LAYERS, LAYER = 2, 1


@contextlib.contextmanager
def runnable(implementation: str) -> Iterator[None]:
    """Interprets the kernels where there is no GPU that they are made for."""
    if implementation != "mosaic":
        yield
        return
    if not HAS_MOSAIC:
        pytest.skip("the kernels need jax 0.11")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mosaic.target import HOPPER, compute_capability

    if jax.default_backend() == "gpu" and compute_capability() == HOPPER:
        yield
        return
    with plgpu.force_gpu_interpret_mode():
        yield


def make_arguments(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch = len(case.positions)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(BFLOAT16)

    angles = rng.uniform(0, 2 * np.pi, (batch, case.head // 2)).astype(np.float32)
    cache = (LAYERS, batch, case.context, case.kv_heads, case.head)
    return {
        "qkv": normal(batch, (case.q_heads + 2 * case.kv_heads) * case.head),
        "q_norm": normal(LAYERS, case.head),
        "k_norm": normal(LAYERS, case.head),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "keys": normal(*cache),
        "values": normal(*cache),
        "positions": np.array(case.positions, np.int32),
    }


def reference(case: Case, arguments: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """y in float64 [B, Nq, D]; keys and values after the step."""
    keys, values = arguments["keys"].copy(), arguments["values"].copy()
    heads = arguments["qkv"].reshape(len(case.positions), -1, case.head)
    y = np.zeros((len(case.positions), case.q_heads, case.head))
    group = case.q_heads // case.kv_heads
    for slot, position in enumerate(case.positions):
        if position < 0:
            continue
        turn = arguments["cos"][slot], arguments["sin"][slot]
        q, k, v = np.split(heads[slot], [case.q_heads, case.q_heads + case.kv_heads])
        q = rotated(q, arguments["q_norm"][LAYER], *turn)
        keys[LAYER, slot, position] = rotated(k, arguments["k_norm"][LAYER], *turn)
        values[LAYER, slot, position] = v
        for head in range(case.q_heads):
            seen = np.s_[LAYER, slot, : position + 1, head // group]
            scores = keys[seen].astype(np.float64) @ q[head].astype(np.float64)
            weights = np.exp((scores - scores.max()) / np.sqrt(case.head))
            y[slot, head] = weights / weights.sum() @ values[seen].astype(np.float64)
    return y, keys, values


def rotated(x: np.ndarray, weight: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    x32 = x.astype(np.float32)
    scale = 1 / np.sqrt(np.mean(np.square(x32), axis=-1, keepdims=True) + np.float32(EPS))
    normed = (x32 * scale * weight.astype(np.float32)).astype(BFLOAT16).astype(np.float32)
    first, second = np.split(normed, 2, axis=-1)
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(BFLOAT16)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
def test_equals_the_reference(implementation: str, case: Case) -> None:
    arguments = make_arguments(case)
    expected, expected_keys, expected_values = reference(case, arguments)
    config = DecodeConfig(splits=case.splits, stages=case.stages)
    with runnable(implementation):
        attend = functools.partial(
            decode_attention,
            eps=EPS,
            layer=LAYER,
            config=config if implementation == "mosaic" else None,
            implementation=implementation,
        )
        y, keys, values = jax.jit(attend)(**arguments)
    assert y.dtype == jnp.bfloat16
    y = np.asarray(y, np.float64).reshape(expected.shape)
    assert np.isfinite(y).all()

    live = np.array(case.positions) >= 0
    error = np.linalg.norm(y[live] - expected[live]) / np.linalg.norm(expected[live])
    # y and the weights of the values are rounded to 8 bits: 2**-9 / sqrt(3) of each, rms
    assert error < 4e-3

    assert_rounded_alike(keys, expected_keys)
    np.testing.assert_array_equal(np.asarray(values), expected_values)
    written = np.argwhere((np.asarray(keys) != arguments["keys"]).any(axis=-1))
    assert {tuple(index[:3]) for index in written} == {
        (LAYER, slot, position) for slot, position in enumerate(case.positions) if position >= 0
    }


def assert_rounded_alike(actual: jax.Array, expected: np.ndarray) -> None:
    """Equal, but for the last bit of what float32 arithmetic in another order has rounded."""
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), expected.astype(np.float32), rtol=2**-7, atol=2**-7
    )
    assert (np.asarray(actual) != expected).mean() < 1e-3


def chained(layers: int) -> Callable:
    """A step of that many layers, each of which reads what the last one wrote."""

    def step(keys, values, qkv, q_norm, k_norm, cos, sin, positions):
        for layer in range(layers):
            y, keys, values = decode_attention(
                qkv,
                q_norm,
                k_norm,
                EPS,
                cos,
                sin,
                keys,
                values,
                positions,
                layer,
                implementation="mosaic",
            )
            qkv = jnp.concatenate([y, y[:, : qkv.shape[1] - y.shape[1]]], axis=1)
        return keys, values, y

    return step


@needs_mosaic
@pytest.mark.parametrize("batch", [1, 32])
def test_lowers_for_hopper_and_updates_the_cache_in_place(batch: int) -> None:
    from pallas_kernels.mosaic.target import assume_compute_capability

    layers, context, q_heads, kv_heads, head = 3, 1024, 32, 4, 128
    shape = jax.ShapeDtypeStruct
    cache = shape((layers, batch, context, kv_heads, head), jnp.bfloat16)
    norm = shape((layers, head), jnp.bfloat16)
    angle = shape((batch, head // 2), jnp.float32)
    qkv = shape((batch, (q_heads + 2 * kv_heads) * head), jnp.bfloat16)
    arguments = (cache, cache, qkv, norm, norm, angle, angle, shape((batch,), jnp.int32))
    with assume_compute_capability((9, 0)):
        step = jax.jit(chained(layers), donate_argnums=(0, 1))
        text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    # one function serves all layers; its kernel aliases both caches, donated arguments of the step
    assert len(re.findall(r"func private @decode_attention_mosaic\b", text)) == 1
    assert len(re.findall(r"call @decode_attention_mosaic\(", text)) == layers
    rows = f"tensor<{layers * batch * context}x{kv_heads * head}xbf16>"
    [aliases] = re.findall(r"output_operand_aliases = \[(.*?)\], result_layouts", text)
    assert re.findall(r"operand_index = (\d+)", aliases) == ["7", "8"]
    [(operands, results)] = re.findall(
        r"output_operand_aliases.*?\} : \((.*?)\) -> \(?(.*?)\)?\n", text
    )
    assert operands.split(", ")[7:9] == results.split(", ")[-2:] == [rows, rows]
    arguments_of_main = text.split("func public @main(")[1].split(") ->")[0]
    assert len(re.findall(r"tf.aliasing_output|jax.buffer_donor", arguments_of_main)) == 2
    # and nothing else touches them but reshapes
    touching = [line for line in text.splitlines() if rows in line and "stablehlo." in line]
    assert {re.findall(r"stablehlo\.(\w+)", line)[0] for line in touching} == {
        "reshape",
        "custom_call",
    }


@needs_mosaic
@pytest.mark.parametrize("head", [64, 256])
@pytest.mark.parametrize("group", [1, 16])
def test_other_heads_lower_for_hopper(head: int, group: int) -> None:
    from pallas_kernels.mosaic.target import assume_compute_capability

    case = Case(
        context=256,
        q_heads=2 * group,
        kv_heads=2,
        head=head,
        splits=1,
        stages=1,
        positions=(0, 0),
    )
    arguments = make_arguments(case)
    with assume_compute_capability((9, 0)):
        step = jax.jit(lambda a: decode_attention(**a, eps=EPS, layer=0, implementation="mosaic"))
        step.trace(arguments).lower(lowering_platforms=("cuda",))


def test_default_splits_fill_the_multiprocessors() -> None:
    def blocks(batch: int, context: int) -> int:
        shapes = DecodeShapes(
            layers=1, batch=batch, context=context, q_heads=32, kv_heads=4, head=128
        )
        return batch * 4 * default_config(shapes).splits

    assert blocks(1, 1024) == 64  # one tile each
    for batch in (1, 2, 3, 4, 5, 8, 12, 16, 20, 32, 64):
        assert 120 <= blocks(batch, 8192) <= 264


def test_wrong_arguments_name_the_remedy() -> None:
    case = CASES["16 heads of 256"]
    arguments = make_arguments(case)
    with pytest.raises(ValueError, match=r"sin must be \(1, 128\)"):
        decode_attention(**{**arguments, "sin": arguments["sin"][:, :4]}, eps=EPS, layer=0)
    with pytest.raises(ValueError, match="Nq is a multiple of 1"):
        decode_attention(**{**arguments, "qkv": arguments["qkv"][:, :-1]}, eps=EPS, layer=0)
    with pytest.raises(ValueError, match="implementation must be one of"):
        decode_attention(**arguments, eps=EPS, layer=0, implementation="triton")
    config = DecodeConfig(splits=1, stages=1)
    with pytest.raises(ValueError, match="config tunes the kernel"):
        decode_attention(**arguments, eps=EPS, layer=0, config=config, implementation="xla")
    with pytest.raises(ValueError, match="at least 1"):
        DecodeConfig(splits=0, stages=1)


@needs_mosaic
def test_a_kernel_that_cannot_run_says_why() -> None:
    from pallas_kernels.mosaic.target import assume_compute_capability

    arguments = make_arguments(CASES["16 heads of 256"])
    wide = {**arguments, "qkv": arguments["qkv"].astype(np.float32)}
    uneven = {name: arguments[name][:, :, :-1] for name in ("keys", "values")}

    def call(**changed: np.ndarray) -> None:
        decode_attention(**{**arguments, **changed}, eps=EPS, layer=0, implementation="mosaic")

    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="there is no GPU"):
            call()
    with assume_compute_capability((8, 6)), pytest.raises(ValueError, match=r"capability 9\.x"):
        call()
    with assume_compute_capability((9, 0)):
        with pytest.raises(ValueError, match="must be bfloat16, not float32"):
            call(**wide)
        with pytest.raises(ValueError, match="multiple of 64 positions, not 127"):
            call(**uneven)
        with pytest.raises(ValueError, match="use 3"):
            decode_attention(
                **arguments,
                eps=EPS,
                layer=0,
                config=DecodeConfig(splits=1, stages=4),
                implementation="mosaic",
            )
