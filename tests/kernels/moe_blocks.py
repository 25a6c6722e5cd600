"""Random MoE blocks whose choice of experts is clear, and what they compute, in float64."""

import jax.numpy as jnp
import numpy as np

EPS = 1e-6
HIDDEN, WIDTH = 256, 64
LAYER, NORM_LAYER = 1, 2  # of 2 layers with experts and 4 in all
GAP = 1e-2
"""Least distance of the logits between which a token's experts end."""


def random_weights(experts, hidden=HIDDEN, seed=0):
    """Norm [4, H] and router [2, E, H], bfloat16; logits have a spread of about 2."""
    rng = np.random.default_rng(seed)
    norm = jnp.asarray(1 + rng.normal(size=(4, hidden)) / 4, jnp.bfloat16)
    router = rng.normal(size=(2, experts, hidden)) * 2 / np.sqrt(hidden)
    return norm, jnp.asarray(router, jnp.bfloat16)


def decided(draw, tokens, norm, router, top_k):
    """Those of many drawn tokens whose choice of experts is clearest."""
    x = draw(np.random.default_rng(3), (8 * tokens, norm.shape[1]))
    ranked = np.sort(logits_of(normed(x, norm), router), axis=1)[:, ::-1]
    if top_k < ranked.shape[1]:
        gap = ranked[:, top_k - 1] - ranked[:, top_k]
        x = x[np.sort(np.argsort(-gap, kind="stable")[:tokens])]
        assert np.sort(gap)[-tokens] > GAP
    return jnp.asarray(x[:tokens], jnp.bfloat16)


def signs(rng, shape):
    """Rows of one magnitude, about that of what the experts add."""
    return rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.integers(-5, -2, (shape[0], 1))


def normed(x, norm):
    x = np.asarray(x, np.float64)
    h = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * np.asarray(norm[NORM_LAYER])
    return h.astype(jnp.bfloat16).astype(np.float64)


def logits_of(h, router):
    return h @ np.asarray(router[LAYER], np.float64).T


def define(h, router, matrices_of, valid, top_k, normalize):
    """What experts add, what it may be off by, and the mass, by loops over tokens and experts."""
    logits = logits_of(h, router)
    added, error = np.zeros_like(h), np.zeros_like(h)
    mass = np.zeros(logits.shape[1])
    for t in np.flatnonzero(valid):
        share = np.exp(logits[t] - logits[t].max())
        ids = sorted(range(len(share)), key=lambda e: (-logits[t, e], e))[:top_k]
        share /= share[ids].sum() if normalize else share.sum()
        for e in ids:
            gate_up, down = matrices_of(e)
            product = (gate_up @ h[t]).reshape(-1, 2, 8)  # eights alternate
            gate, up = product[:, 0].reshape(-1), product[:, 1].reshape(-1)
            hidden = gate / (1 + np.exp(-gate)) * up
            added[t] += share[e] * (down @ hidden)
            error[t] += (share[e] * down * hidden) ** 2 @ np.ones(len(hidden))
            mass[e] += share[e]
    return added, 6 * 2**-9 / np.sqrt(3) * np.sqrt(error), mass
