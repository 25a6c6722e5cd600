"""A sequence of the engine: its prompt, and how far it has come."""

import dataclasses

import jax
import numpy as np

from dynaexq_jax.engine.prompt import Prompt
from dynaexq_jax.engine.sampling import SamplingParams


@dataclasses.dataclass(kw_only=True)
class EngineSequence:
    """Where one sequence is, as far as the host knows."""

    number: int
    prompt: np.ndarray
    max_tokens: int
    sampling: SamplingParams
    queued_s: float
    """Time of the clock when it was queued, and when its first and its last token came."""
    first_s: float = 0.0
    last_s: float = 0.0
    slot: int = -1
    prefilled: int = 0
    """Tokens of the prompt that chunks read, all those that were dispatched."""
    on_device: Prompt | None = None
    """From when it is the next one whose prompt is read until that is over."""
    dispatched: int = 0
    received: int = 0
    done: bool = False

    @property
    def unread(self) -> int:
        """Tokens of the prompt for which chunks are still to be dispatched."""
        return int(self.prompt.size) - self.prefilled

    @property
    def decodes(self) -> bool:
        """Whether decode steps are still to be dispatched for it, as far as the host knows."""
        return 0 < self.dispatched < self.max_tokens

    def send(self, padded: int, device: jax.Device) -> None:
        """Starts to copy the prompt to the device, padded to so many tokens."""
        self.on_device = Prompt.send(
            self.prompt,
            padded=padded,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            device=device,
        )
