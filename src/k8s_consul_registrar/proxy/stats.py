"""Figures of the proxy: counts, histograms, and the latest failures of each upstream."""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from k8s_consul_registrar.proxy.nodes import KUBELET, Endpoint
from k8s_consul_registrar.proxy.refusals import Outcome

# Upper bounds of a histogram's buckets, in seconds. A kubelet answers in 10 ms to some seconds, and
# collectors give up after 10 to 30.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

# Failures remembered, and for how long in seconds: five thousand kubelets failing at once have one cause.
MAX_FAILURES = 1024
# Upstreams whose latest scrape is remembered; all are forgotten where gone ones make it more.
MAX_UPSTREAMS = 200_000
FAILURES_KEPT = 900.0


class HistogramValue(NamedTuple):
    """Counts by bucket, the last for values above all bounds, and the sum in seconds."""

    counts: tuple[int, ...]
    total: float

    def plus(self, other: "HistogramValue") -> "HistogramValue":
        """Return both together."""
        counts = tuple(one + another for one, another in zip(self.counts, other.counts, strict=True))
        return HistogramValue(counts, self.total + other.total)


NO_TIMES = HistogramValue((0,) * (len(BOUNDS) + 1), 0.0)


class Histogram:
    """A histogram of durations: a binary search and two additions for each."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def value(self) -> HistogramValue:
        """Return the current counts."""
        return HistogramValue(tuple(self._counts), self._total)


@dataclass(frozen=True, slots=True)
class ProxyStats:
    """Figures of a proxy at one moment; those from `running` on go up and down, except the histograms.

    `workers` is None in a process that relays itself; `worker_deaths` only grows.
    """

    outcomes: Mapping[Outcome, int]
    body_bytes: int
    dials: int
    reuses: int
    retries: int
    running: int
    waiting: int
    callers: int
    kept: int
    nodes: int
    nodes_known: bool
    pods: int = 0
    pods_known: bool = False
    durations: HistogramValue = NO_TIMES
    upstream_times: HistogramValue = NO_TIMES
    evicted: int = 0
    denied: int = 0
    workers: int | None = None
    worker_deaths: int = 0


NO_STATS = ProxyStats(dict.fromkeys(Outcome, 0), 0, 0, 0, 0, 0, 0, 0, 0, 0, nodes_known=False)


def added(one: ProxyStats, other: ProxyStats, *, with_gauges: bool = True) -> ProxyStats:
    """Return the sum of the figures of two processes; the gauges of a process that ended do not count.

    Nodes and Pods are the same for all and are not added.
    """
    gauges = (other.running, other.waiting, other.callers, other.kept) if with_gauges else (0, 0, 0, 0)
    return replace(
        one,
        outcomes={outcome: count + other.outcomes.get(outcome, 0) for outcome, count in one.outcomes.items()},
        body_bytes=one.body_bytes + other.body_bytes,
        dials=one.dials + other.dials,
        reuses=one.reuses + other.reuses,
        retries=one.retries + other.retries,
        running=one.running + gauges[0],
        waiting=one.waiting + gauges[1],
        callers=one.callers + gauges[2],
        kept=one.kept + gauges[3],
        durations=one.durations.plus(other.durations),
        upstream_times=one.upstream_times.plus(other.upstream_times),
        evicted=one.evicted + other.evicted,
        denied=one.denied + other.denied,
    )


class ScrapeCounts:
    """Counters of a relay, a few increments for each scrape."""

    __slots__ = (
        "body_bytes",
        "denied",
        "dials",
        "durations",
        "evicted",
        "outcomes",
        "retries",
        "reuses",
        "upstream_times",
    )

    def __init__(self) -> None:
        self.outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.body_bytes = 0
        self.dials = 0
        self.evicted = 0
        self.denied = 0
        self.reuses = 0
        self.retries = 0
        self.durations = Histogram()
        self.upstream_times = Histogram()

    def ended(self, outcome: Outcome) -> None:
        """Count a request by its outcome."""
        self.outcomes[outcome] += 1


class Failure(NamedTuple):
    """A scrape that failed; `at` is in epoch seconds, `reason` quotes nothing that a client sent."""

    at: float
    endpoint: Endpoint
    outcome: Outcome
    reason: str


class LastScrape(NamedTuple):
    """The latest scrape of an upstream: its end in epoch seconds, its duration, and how it ended.

    `expires_at` is when the certificate expires that the upstream showed, None if it is unknown.
    """

    at: float
    seconds: float
    outcome: Outcome
    expires_at: float | None = None


class LastScrapes:
    """The latest scrape of each upstream that was scraped at all.

    Each is `noted` under its endpoint: its begin and end by the monotonic clock, how it ended, and when the
    certificate expires. So a scrape costs no more than a tuple; `take` makes the rest of it.
    """

    __slots__ = ("_by_endpoint", "noted")

    def __init__(self) -> None:
        self.noted: dict[Endpoint, tuple[float, float, Outcome, float | None]] = {}
        self._by_endpoint: dict[Endpoint, LastScrape] = {}

    def take(self) -> dict[Endpoint, LastScrape]:
        """Return what was noted since the last call."""
        noted, self.noted = self.noted, {}
        ahead = time.time() - time.monotonic()
        return {
            endpoint: LastScrape(end + ahead, end - begin, outcome, expires_at)
            for endpoint, (begin, end, outcome, expires_at) in noted.items()
        }

    def trim(self) -> None:
        """Forget all where those of upstreams that are gone make them too many."""
        if len(self.noted) > MAX_UPSTREAMS:
            self.noted.clear()

    def add(self, others: Iterable[tuple[Endpoint, LastScrape]]) -> None:
        """Remember the scrapes that another process noted."""
        if len(self._by_endpoint) >= MAX_UPSTREAMS:
            self._by_endpoint.clear()
        self._by_endpoint.update(others)

    def collect(self) -> Mapping[Endpoint, LastScrape]:
        """Return the latest scrape of each upstream."""
        self.add(self.take().items())
        return self._by_endpoint


class RecentFailures:
    """The latest failures; `noted` counts all there ever were."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._latest: deque[Failure] = deque(maxlen=MAX_FAILURES)
        self.noted = 0

    def note(self, endpoint: Endpoint, outcome: Outcome, reason: str) -> None:
        """Remember a failure, and forget the oldest where there are too many."""
        self.take(Failure(self._clock(), endpoint, outcome, reason))

    def take(self, failure: Failure) -> None:
        """Remember a failure that another process noted."""
        self._latest.append(failure)
        self.noted += 1

    def since(self, noted: int) -> list[Failure]:
        """Return the failures after the first `noted`, as far as they are remembered."""
        fresh = min(self.noted - noted, len(self._latest))
        return list(self._latest)[len(self._latest) - fresh :]

    def lately(self) -> list[Failure]:
        """Return the failures of the last `FAILURES_KEPT` seconds, the latest last."""
        oldest = self._clock() - FAILURES_KEPT
        return [failure for failure in self._latest if failure.at >= oldest]


def failing_report(failures: list[Failure], names: Mapping[str, str]) -> dict[str, object]:
    """Return the failures by upstream, the latest first, ready for JSON.

    `names` are those of Nodes and Pods by UID; an upstream that is gone since has none.
    """
    by_endpoint: dict[Endpoint, list[Failure]] = {}
    for failure in failures:
        by_endpoint.setdefault(failure.endpoint, []).append(failure)
    rows = []
    for endpoint, of_one in by_endpoint.items():
        latest = of_one[-1]
        rows.append(
            {
                "kind": "node" if endpoint.peer == KUBELET else "pod",
                "name": names.get(endpoint.uid, ""),
                "address": str(endpoint),
                "failures": len(of_one),
                "first": of_one[0].at,
                "last": latest.at,
                "outcome": latest.outcome.value,
                "reason": latest.reason,
            }
        )
    rows.sort(key=lambda row: row["last"], reverse=True)
    return {"seconds": FAILURES_KEPT, "remembered": MAX_FAILURES, "failing": rows}
