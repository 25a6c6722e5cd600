"""How far the predictions of one engine are from those of another, the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Float, Float32, Int32

from dynaexq_jax.engine.engine import Engine
from dynaexq_jax.engine.programs import SCORE_ROWS, Experts, Programs


class Divergence:
    """Scores windows with ``engine``, and compares all that it predicts with ``reference``.

    Both read the same vocabulary. Their logits meet on the device, of ``SCORE_ROWS`` positions at
    once.
    """

    def __init__(self, reference: Engine, engine: Engine) -> None:
        self._reference = reference
        self._engine = engine
        self._compare = jax.jit(partial(_losses_and_kl, reference.programs, engine.programs))

    def score(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses and KL(reference || engine) of ``window`` int32 [W + 1], in nats: float32 [W].

        The loss is that of each token after the first, as in ``Engine.score``; the divergence is
        that of the two distributions it is predicted by. Neither engine may be busy.
        """
        of_reference, of_engine = (
            engine.hidden(window[:-1]) for engine in (self._reference, self._engine)
        )
        return self.compare(of_reference, of_engine, window[1:])

    def compare(
        self, of_reference: jax.Array, of_engine: jax.Array, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses and divergence at hidden states [T, H] of both; ``targets`` int32 [T] follow."""
        losses, kl = self._compare(
            (self._reference.params, self._engine.params),
            (self._reference.experts, self._engine.experts),
            of_reference,
            of_engine,
            jnp.asarray(targets, jnp.int32),
        )
        return np.asarray(losses), np.asarray(kl)


def _losses_and_kl(
    reference: Programs,
    programs: Programs,
    params: tuple[nnx.State, nnx.State],
    experts: tuple[Experts, Experts],
    of_reference: Float[jax.Array, "W H"],
    of_engine: Float[jax.Array, "W H"],
    targets: Int32[jax.Array, " W"],
) -> tuple[Float32[jax.Array, " W"], Float32[jax.Array, " W"]]:
    def compare(position: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        p, q, target = position
        log_p = jax.nn.log_softmax(reference.logits(params[0], experts[0], p))
        log_q = jax.nn.log_softmax(programs.logits(params[1], experts[1], q))
        return -log_q[target], jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    return lax.map(compare, (of_reference, of_engine, targets), batch_size=SCORE_ROWS)
