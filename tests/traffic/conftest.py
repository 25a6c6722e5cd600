"""Traces of random traffic."""

import numpy as np
import pytest

from dynaexq_jax.traffic import RoutedModel, TraceHeader, TraceWriter

LAYERS, EXPERTS = 3, 8


@pytest.fixture
def header():
    """A header, with changes."""

    def make(**changes):
        return TraceHeader(
            **{
                "model": RoutedModel(
                    layers=LAYERS, experts=EXPERTS, experts_per_token=2, hidden_size=64
                ),
                "bits": (2, 4, 8),
                "benefit": np.random.default_rng(1).random((LAYERS, 2)) * [0.1, 0.01],
                "pinned": ((1, 7),),
                "base_bits": 2,
                "pool_pages": 9,
                "interval": 4,
                "max_transitions": 5,
                **changes,
            }
        )

    return make


@pytest.fixture
def traffic():
    """Intervals (mass float32 [L, E], tokens) that change their topic in the middle."""
    rng = np.random.default_rng(0)
    shares = [rng.dirichlet(np.full(EXPERTS, 0.3), LAYERS) for _ in range(2)]
    intervals = []
    for share in shares:
        for tokens in rng.integers(1, 40, 11).tolist():
            counts = np.stack([rng.multinomial(2 * tokens, row) for row in share])
            intervals.append((counts.astype(np.float32) / 2, tokens))
    return intervals


@pytest.fixture
def recorded(tmp_path, header, traffic):
    """The trace file of ``traffic``."""
    path = tmp_path / "routing.trace"
    writer = TraceWriter(path, header())
    for interval in traffic:
        writer.add(*interval)
    return path
