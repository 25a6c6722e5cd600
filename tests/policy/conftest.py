import numpy as np
import pytest

from dynaexq_jax.policy import PolicyInput

PAGES_OF_LEVEL = {2: (0, 1, 3), 4: (0, 0, 2), 8: (0, 0, 0)}


@pytest.fixture
def make_input():
    """Builds a PolicyInput: everything at the base and long settled, unless told otherwise."""

    def make(hotness, pool_pages, *, base_bits=2, **changes):
        hotness = np.asarray(hotness, np.float64)
        pages_of_level = PAGES_OF_LEVEL[base_bits]
        base_level = sum(pages == 0 for pages in pages_of_level) - 1
        return PolicyInput(
            **{
                "hotness": hotness,
                "levels": np.full(hotness.shape, base_level, np.int32),
                "age": np.full(hotness.shape, 100, np.int32),
                "pool_pages": pool_pages,
                "pages_of_level": pages_of_level,
                "benefit": np.array([0.1, 0.01]),
                "max_transitions": 10**6,
                **changes,
            }
        )

    return make
