"""Traffic that shifts: seeded requests in phases, each with its own mix of domains."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.measure.requests import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of traffic. Raises InputError unless it has a mix and one length."""

    mix: Mapping[str, float]
    """Weight of each domain, positive; their sum does not matter."""
    requests: int | None = None
    seconds: float | None = None
    """Length in one of the two; seconds need a rate."""

    def __post_init__(self) -> None:
        if not self.mix or not all(name and weight > 0 for name, weight in self.mix.items()):
            raise InputError(f"a phase needs domains with positive weights, got {self.mix}")
        lengths = [length for length in (self.requests, self.seconds) if length is not None]
        if len(lengths) != 1 or lengths[0] <= 0:
            raise InputError(
                f"a phase needs either a number of requests or seconds, above 0; got "
                f"{self.requests} and {self.seconds}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads DOMAIN[=WEIGHT][+DOMAIN...]:LENGTH, a length of requests ("32") or seconds ("60s").

        Raises InputError for other text.
        """
        mix, _, length = text.rpartition(":")
        try:
            pairs = (part.partition("=") for part in mix.split("+"))
            weights = {name: float(weight or 1) for name, _, weight in pairs}
            if length.endswith("s"):
                return cls(mix=weights, seconds=float(length[:-1]))
            return cls(mix=weights, requests=int(length))
        except ValueError as error:
            raise InputError(
                f"a phase is DOMAIN[=WEIGHT][+DOMAIN...]:REQUESTS or ...:SECONDSs, got {text!r}: "
                f"{error}"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Phases, when their requests arrive, and how long these are. Raises InputError."""

    phases: Sequence[Phase]
    rate: float | None = None
    """Requests a second, Poisson; infinite: all at once; None: whenever a slot is free."""
    prompt_tokens: int = 2048
    output_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.phases:
            raise InputError("traffic needs at least one phase")
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rate is not None and self.rate <= 0:
            raise InputError(f"the rate must be positive, got {self.rate}")
        timed = self.rate is not None and math.isfinite(self.rate)
        if not timed and any(phase.seconds is not None for phase in self.phases):
            raise InputError(f"a phase of seconds needs a finite rate of arrivals, got {self.rate}")

    def requests(self, domains: Sequence[str], vocab_size: int) -> list[Request]:
        """All requests in order of arrival; token v belongs to ``domains[v % D]``.

        Raises InputError for a domain that there is not.
        """
        rng = np.random.default_rng(self.seed)
        return [
            Request(
                prompt=self._prompt(rng, phase, domains, vocab_size),
                max_tokens=self.output_tokens,
                phase=number,
                arrival_s=arrival,
            )
            for number, phase, arrival in self._arrivals(rng)
        ]

    def _arrivals(self, rng: np.random.Generator) -> Iterator[tuple[int, Phase, float | None]]:
        """Number, phase and arrival of every request."""
        now, end = 0.0, 0.0
        for number, phase in enumerate(self.phases):
            if phase.seconds is None:
                for _ in range(phase.requests or 0):
                    if self.rate is None:
                        yield number, phase, None
                        continue
                    now += rng.exponential(1 / self.rate)
                    yield number, phase, now
                end = now
                continue
            assert self.rate is not None
            # memoryless: the wait for the next request begins anew where a phase does
            now, end = end, end + phase.seconds
            while (now := now + rng.exponential(1 / self.rate)) < end:
                yield number, phase, now
            now = end

    def _prompt(
        self, rng: np.random.Generator, phase: Phase, domains: Sequence[str], vocab_size: int
    ) -> np.ndarray:
        if unknown := sorted(phase.mix.keys() - set(domains)):
            raise InputError(f"no domain {unknown[0]!r}: there are {', '.join(domains)}")
        weights = np.array(list(phase.mix.values()))
        domain = domains.index(list(phase.mix)[rng.choice(weights.size, p=weights / weights.sum())])
        ids = np.arange(domain, vocab_size, len(domains), dtype=np.int32)
        return rng.choice(ids, self.prompt_tokens)
