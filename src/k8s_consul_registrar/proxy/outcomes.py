"""What became of each scrape, as plain counts that cost next to nothing to keep."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from k8s_consul_registrar.proxy.histogram import NO_TIMES, Histogram, HistogramValue


class Outcome(StrEnum):
    """How a request to the proxy ended; a fixed set, fit for a metric's label."""

    OK = "ok"
    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    HANDSHAKE = "tls_handshake_failed"
    METHOD = "method_not_allowed"
    UNKNOWN_PATH = "unknown_path"
    UNKNOWN_NODE = "unknown_node"
    UNKNOWN_POD = "unknown_pod"
    NODES_UNKNOWN = "nodes_not_yet_known"
    PODS_UNKNOWN = "pods_not_yet_known"
    BUSY = "too_many_scrapes"
    NO_CREDENTIALS = "no_credentials"
    UNREACHABLE = "kubelet_unreachable"
    UNVERIFIED = "kubelet_unverified"
    FORBIDDEN = "kubelet_forbids"
    ANSWERED = "kubelet_other_status"
    MALFORMED = "kubelet_malformed"
    POD_UNREACHABLE = "pod_unreachable"
    POD_UNVERIFIED = "pod_unverified"
    POD_ANSWERED = "pod_other_status"
    POD_MALFORMED = "pod_malformed"
    TIMEOUT = "timeout"
    CUT = "cut"
    CALLER_LEFT = "caller_left"


class Refusal(NamedTuple):
    """An answer of our own in place of a kubelet's; `reason` is for people and echoes nothing a caller sent."""

    status: int
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class ProxyStats:
    """The proxy's own figures at one moment; those from `running` on go up and down, but for the histograms.

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
    workers: int | None = None
    worker_deaths: int = 0


NO_STATS = ProxyStats(dict.fromkeys(Outcome, 0), 0, 0, 0, 0, 0, 0, 0, 0, 0, nodes_known=False)


def added(one: ProxyStats, other: ProxyStats, *, with_gauges: bool = True) -> ProxyStats:
    """Return the sum of two processes' figures; without gauges those of `other` are of the past.

    Nodes and Pods are the same for all, and not added.
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
    )


class Counts:
    """Counts what the relay does, one increment a scrape."""

    __slots__ = ("body_bytes", "dials", "durations", "outcomes", "retries", "reuses", "upstream_times")

    def __init__(self) -> None:
        self.outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.body_bytes = 0
        self.dials = 0
        self.reuses = 0
        self.retries = 0
        self.durations = Histogram()
        self.upstream_times = Histogram()

    def ended(self, outcome: Outcome) -> None:
        """Count one request by how it ended."""
        self.outcomes[outcome] += 1
