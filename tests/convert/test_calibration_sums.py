"""What is summed over the tokens of each expert, against numpy one token at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert.calibration import experts as sums
from convert.calibration.benefit import PRIOR, LayerErrors, benefit_of
from convert.calibration.block import Block
from convert.calibration.hessians import SHRINK, shrunk_to_mean
from convert.calibration.rows import PROBE_ROWS, RowPlan
from convert.calibration.states import HiddenStates
from convert.calibration.super_experts import find_super_experts
from convert.quantize import GridQuantizer
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.models.names import dense_shapes_of_layer
from pallas_kernels.levels import DEFAULT_TABLE, LEVEL_BITS
from pallas_kernels.pages import ExpertFormat, Matrices

ROWS, PADDING, WINDOW, GROUP = 3, 2, 7, 32


def silu(x):
    return x / (1 + np.exp(-x))


class Layer:
    """A layer of a small model, hidden states, and what the experts are given, by numpy."""

    def __init__(self, path):
        source = HfDirectory.open(path)
        config = source.config
        dense = {n: source.tensor(n) for n in dense_shapes_of_layer(config, 0)}
        self.block = Block.load(config, 0, dense)
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((ROWS + PADDING, WINDOW, config.hidden_size), np.float32)
        flat = self.x[:ROWS].reshape(-1, config.hidden_size).astype(np.float64)
        norm = dense["model.layers.0.post_attention_layernorm.weight"].astype(np.float64)
        mean = np.square(flat).mean(axis=1, keepdims=True)
        self.y = flat / np.sqrt(mean + config.rms_norm_eps) * norm
        logits = self.y @ dense["model.layers.0.mlp.gate.weight"].astype(np.float64).T
        self.ids = np.argsort(-logits, axis=1)[:, : config.num_experts_per_tok]
        chosen = np.exp(np.take_along_axis(logits, self.ids, 1))
        self.weights = chosen / chosen.sum(axis=1, keepdims=True)
        fmt = ExpertFormat(
            hidden=config.hidden_size,
            width=config.moe_intermediate_size,
            group_size=GROUP,
            scale_encoding="bf16",
            table=DEFAULT_TABLE,
        )
        self.plain = [
            Matrices(*(m.astype(np.float32) for m in source.expert(0, e)))
            for e in range(config.num_experts)
        ]
        self.quantized = [Matrices(*(GridQuantizer()(m, fmt) for m in e)) for e in self.plain]
        self.experts = config.num_experts

    def stacked(self):
        return Matrices(
            *(
                sums.QuantizedMatrices(
                    *(jnp.asarray(np.stack(part)) for part in zip(*of, strict=True))
                )
                for of in zip(*self.quantized, strict=True)
            )
        )

    def decoded(self, expert, bits):
        found = []
        for codes, scales in self.quantized[expert]:
            scale = np.repeat(scales.T, GROUP, axis=1)[:, : codes.shape[1]]
            found.append(DEFAULT_TABLE.values(bits)[codes >> (8 - bits)].astype(float) * scale)
        return Matrices(*found)

    def assignments(self):
        """(token, input, expert, router weight)."""
        for token, (ids, weights) in enumerate(zip(self.ids, self.weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                yield token, self.y[token], expert, weight


def activations(x, gate_up):
    gate, up = np.split(gate_up.astype(np.float64) @ x, 2)
    return silu(gate) * up


@pytest.fixture(scope="module")
def layer(tmp_path_factory, make_tiny_model):
    path = tmp_path_factory.mktemp("sums") / "hf"
    make_tiny_model(path, num_experts=6, num_experts_per_tok=3, num_hidden_layers=1)
    return Layer(path)


def test_inputs(layer):
    found = sums.InputSums.zeros(layer.experts, layer.y.shape[1])
    for part in np.split(layer.x, 5):  # in several calls; the last two are padding
        count = min(1, ROWS - int(found.tokens.sum()) // (3 * WINDOW))
        found = sums.add_inputs(layer.block, jnp.asarray(part), count, found)
    hessian = np.zeros(found.hessian.shape)
    totals = np.zeros((3, layer.experts))
    for _, x, expert, weight in layer.assignments():
        hessian[expert] += weight**2 * np.outer(x, x)
        totals[:, expert] += weight**2, weight, 1
    np.testing.assert_allclose(found.hessian, hessian, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.stack(found[1:]), totals, rtol=1e-5)


@pytest.mark.parametrize("bits", LEVEL_BITS)
def test_activations_and_outputs(layer, bits):
    values = sums.values_of_levels(DEFAULT_TABLE)[LEVEL_BITS.index(bits)]
    given = layer.stacked()
    width = layer.plain[0].down.shape[1]
    hessian = sums.add_activations(
        layer.block,
        jnp.asarray(layer.x),
        ROWS,
        given.gate_up,
        values,
        GROUP,
        jnp.zeros((layer.experts, width, width)),
    )
    x, largest = sums.run_experts(
        layer.block,
        jnp.asarray(layer.x),
        ROWS,
        given,
        values,
        GROUP,
        jnp.zeros(layer.experts),
    )
    wanted, peak = np.zeros(hessian.shape), np.zeros(layer.experts)
    outputs = layer.x[:ROWS].reshape(layer.y.shape).astype(np.float64)
    weights = [layer.decoded(expert, bits) for expert in range(layer.experts)]
    for token, y, expert, weight in layer.assignments():
        a = activations(y, weights[expert].gate_up)
        wanted[expert] += weight**2 * np.outer(a, a)
        output = weights[expert].down @ a
        outputs[token] += weight * output
        peak[expert] = max(peak[expert], np.abs(output).max())
    np.testing.assert_allclose(hessian, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(x)[:ROWS].reshape(outputs.shape), outputs, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(np.asarray(x)[ROWS:], layer.x[ROWS:])
    np.testing.assert_allclose(largest, peak, rtol=1e-4)


def test_errors(layer):
    found = sums.add_errors(
        layer.block,
        jnp.asarray(layer.x),
        ROWS,
        Matrices(*(jnp.asarray(np.stack(part)) for part in zip(*layer.plain, strict=True))),
        layer.stacked(),
        sums.values_of_levels(DEFAULT_TABLE),
        GROUP,
        sums.ErrorSums.zeros(layer.experts),
    )
    errors, mass = np.zeros((3, layer.experts)), np.zeros(layer.experts)
    for _, x, expert, weight in layer.assignments():
        plain = layer.plain[expert]
        exact = plain.down @ activations(x, plain.gate_up)
        for level, bits in enumerate(LEVEL_BITS):
            gate_up, down = layer.decoded(expert, bits)
            difference = down @ activations(x, gate_up) - exact
            errors[level, expert] += np.square(weight * difference).sum()
        mass[expert] += weight
    np.testing.assert_allclose(found.errors, errors, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(found.mass, mass, rtol=1e-5)
    assert np.all(errors[0] >= errors[1])


def test_hessians_of_rare_experts_lean_on_the_mean():
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((3, 4, 4)).astype(np.float32)
    sums_ = factors @ factors.transpose(0, 2, 1)
    sums_[2] = 0
    squared = np.array([10.0, 1e-3, 0.0], np.float32)
    found = np.asarray(shrunk_to_mean(jnp.asarray(sums_), jnp.asarray(squared)))
    mean = sums_.sum(axis=0) / squared.sum()
    prior = SHRINK * squared.mean()
    np.testing.assert_allclose(found[2], mean, rtol=1e-5)
    np.testing.assert_allclose(found[0], (sums_[0] + prior * mean) / (10 + prior), rtol=1e-5)
    assert np.all(np.linalg.eigvalsh(found.astype(np.float64)) > -1e-6)


class TestBenefit:
    ERRORS = LayerErrors(np.array([[8.0, 2.0], [2.0, 1.0], [0.5, 2.0]]), np.array([4.0, 1.0]), 10)

    def test_of_all_experts_is_what_the_layer_costs(self):
        """Hotness as in the calibration text: the lowest step is worth the divergence."""
        benefit = benefit_of(self.ERRORS, 0.3)
        hotness = self.ERRORS.mass / self.ERRORS.tokens
        assert (benefit[0] * hotness).sum() == pytest.approx(0.3, rel=PRIOR)

    def test_is_by_mass_and_never_negative(self):
        benefit = benefit_of(self.ERRORS, 1.0)
        assert benefit.shape == (2, 2)
        assert np.all(benefit > 0)
        saved, mean, prior = 6 / 7 * 10, 7 / 5 / 7 * 10, PRIOR * 2.5
        assert benefit[0, 0] == pytest.approx((saved + prior * mean) / (4 + prior))
        # at 8 bits the second expert got worse: it gets a little of the layer's mean
        assert benefit[1, 1] == pytest.approx(prior * (1.5 / 5 / 7 * 10) / (1 + prior))

    def test_where_nothing_is_saved_or_an_expert_saw_nothing(self):
        nothing = LayerErrors(np.ones((3, 2)), np.array([4.0, 0.0]), 10)
        np.testing.assert_array_equal(benefit_of(nothing, 1.0), np.zeros((2, 2)))
        unseen = LayerErrors(np.array([[8.0, 0], [2, 0], [1, 0]]), np.array([4.0, 0.0]), 10)
        np.testing.assert_allclose(benefit_of(unseen, 1.0)[0, 1], 1.5 / 6 * 10)


class TestSuperExperts:
    def usual(self):
        return np.exp(0.3 * np.random.default_rng(0).standard_normal((12, 64)))

    def test_none_in_a_usual_model(self):
        assert find_super_experts(self.usual()) == []
        assert find_super_experts(np.zeros((2, 4))) == []

    def test_those_far_above_all_others(self):
        largest = self.usual()
        largest[1, 7], largest[2, 3], largest[5, 0] = 900.0, 1000.0, 80.0
        assert find_super_experts(largest) == [(1, 7), (2, 3)]  # 80 is not a tenth of the largest

    def test_in_a_small_model(self):
        largest = np.ones((2, 4))
        largest[1, 2] = 50.0
        assert find_super_experts(largest) == [(1, 2)]


@pytest.mark.parametrize("text", [1, 2, 7, 100])
def test_rows_of_each_layer_are_all_of_them_once(text):
    plan = RowPlan(text=text)
    assert plan.probes == min(text, PROBE_ROWS)
    for index in range(3):
        covered = [row for run in plan.all_runs(index) for row in range(run.start, run.stop)]
        assert covered == list(range(plan.rows(index + 1)))
    measured = [row for run in plan.measured_runs() for row in range(run.start, run.stop)]
    assert 0 < len(measured) == len(set(measured)) <= text
    assert max(measured) < text


def test_states_are_what_was_written(tmp_path):
    states = HiddenStates(tmp_path / "states", rows=5, window=3, hidden=2)
    assert not states.is_whole()
    states.create()
    assert states.is_whole()
    rows = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    states.write(2, rows)
    np.testing.assert_array_equal(states.read(2, 4), rows)
    np.testing.assert_array_equal(states.read(4, 5), np.zeros((1, 3, 2)))
    (tmp_path / "states").write_bytes(b"less")
    assert not states.is_whole()
