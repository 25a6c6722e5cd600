"""Which rows of hidden states a conversion carries from layer to layer, and at which level.

[0, text)              calibration rows, one part after another for the levels of
                       PROPAGATE_BITS: what Hessians are made of, with the earlier layers at
                       that level
[text, + probes)       reference: some of these rows again, with every layer at REFERENCE_BITS
then probes each       for every layer with experts so far: the reference with that layer at
                       the lowest level, to see what it does to the predictions
"""

import dataclasses
from collections.abc import Iterator
from typing import Final, NamedTuple

from pallas_kernels.levels import LEVEL_BITS, Bits

PROPAGATE_BITS: Final[tuple[Bits, ...]] = (2, 4)
REFERENCE_BITS: Final[Bits] = 4
PROBE_ROWS: Final = 16
_MEASURED_SHARE: Final = 8


class Run(NamedTuple):
    """Successive rows whose experts run at one level."""

    start: int
    stop: int
    bits: Bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Where the rows of each kind lie."""

    text: int
    """Calibration rows."""

    @property
    def probes(self) -> int:
        """Rows of the reference, and of each stream that is compared with it."""
        return min(PROBE_ROWS, self.text)

    def rows(self, streams: int) -> int:
        """All rows after so many layers with experts."""
        return self.text + self.probes * (1 + streams)

    def stream(self, index: int) -> int:
        """First row of the stream whose layer with experts number ``index`` is at the lowest."""
        return self.rows(index)

    def text_runs(self) -> Iterator[Run]:
        """The calibration rows."""
        bounds = [self.text * part // len(PROPAGATE_BITS) for part in range(len(PROPAGATE_BITS))]
        for start, stop, bits in zip(bounds, [*bounds[1:], self.text], PROPAGATE_BITS, strict=True):
            yield Run(start, stop, bits)

    def measured_runs(self) -> Iterator[Run]:
        """The calibration rows on which output errors are measured: a share of each part."""
        for run in self.text_runs():
            count = -(-(run.stop - run.start) // _MEASURED_SHARE)
            yield Run(run.start, run.start + count, run.bits)

    def all_runs(self, index: int) -> Iterator[Run]:
        """Every row of the layer with experts number ``index``, its own stream included."""
        yield from self.text_runs()
        yield Run(self.text, self.stream(index), REFERENCE_BITS)
        yield Run(self.stream(index), self.rows(index + 1), LEVEL_BITS[0])
