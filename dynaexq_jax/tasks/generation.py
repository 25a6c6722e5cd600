"""How a benchmark wants text generated, in the words of lm-eval's ``generation_kwargs``."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Self

from dynaexq_jax.engine.sampling import SamplingParams
from dynaexq_jax.errors import InputError

LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the most new tokens; the first that is given counts."""
FILTERS: Final = ("top_k", "top_p", "min_p", "seed")
KNOWN: Final = {"until", "do_sample", "temperature", *LENGTHS, *FILTERS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """When a text ends, and how its tokens are drawn."""

    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Reads ``generation_kwargs``. Raises InputError for what the engine does not have.

        Tokens are drawn where ``do_sample`` is true, by default at temperature 1, or where it is
        left out and a temperature given; elsewhere the likeliest is taken.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if unknown := sorted(given.keys() - KNOWN):
            raise InputError(
                f"the task wants {unknown[0]}={given[unknown[0]]!r}, which cannot be had here; "
                f"leave it out: generation takes {sorted(KNOWN)}"
            )
        until = given.get("until", [])
        draws = given.get("do_sample")
        temperature = float(given.get("temperature", 1.0 if draws else 0.0))
        sampling = {name: given[name] for name in FILTERS if name in given}
        lengths = [int(given[name]) for name in LENGTHS if name in given]
        return cls(
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            max_tokens=lengths[0] if lengths else cls.max_tokens,
            sampling=SamplingParams(temperature=0.0 if draws is False else temperature, **sampling),
        )
