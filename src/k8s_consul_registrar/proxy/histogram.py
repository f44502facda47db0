"""How long things take, counted in fixed buckets: a binary search and two additions a time."""

from bisect import bisect_left
from typing import NamedTuple

# In seconds, each the most its bucket holds. A kubelet answers in 10 ms to some seconds, and callers give up
# after 10 to 30; what is beyond the last bound is counted apart.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class HistogramValue(NamedTuple):
    """One moment's counts by bucket, the last for what is beyond all bounds, and the sum in seconds."""

    counts: tuple[int, ...]
    total: float

    def plus(self, other: "HistogramValue") -> "HistogramValue":
        """Return both together."""
        counts = tuple(one + another for one, another in zip(self.counts, other.counts, strict=True))
        return HistogramValue(counts, self.total + other.total)


NO_TIMES = HistogramValue((0,) * (len(BOUNDS) + 1), 0.0)


class Histogram:
    """Counts times."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def value(self) -> HistogramValue:
        """Return the counts of this moment."""
        return HistogramValue(tuple(self._counts), self._total)
