"""What became of each scrape, as plain counts that cost next to nothing to keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Outcome(StrEnum):
    """How a request to the proxy ended; a fixed set, fit for a metric's label."""

    OK = "ok"
    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    METHOD = "method_not_allowed"
    UNKNOWN_PATH = "unknown_path"
    UNKNOWN_NODE = "unknown_node"
    NODES_UNKNOWN = "nodes_not_yet_known"
    BUSY = "too_many_scrapes"
    NO_CREDENTIALS = "no_credentials"
    UNREACHABLE = "kubelet_unreachable"
    UNVERIFIED = "kubelet_unverified"
    FORBIDDEN = "kubelet_forbids"
    ANSWERED = "kubelet_other_status"
    MALFORMED = "kubelet_malformed"
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
    """The proxy's own figures at one moment; everything but the last six only ever grows."""

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


class Counts:
    """Counts what the relay does, one increment a scrape."""

    __slots__ = ("body_bytes", "dials", "outcomes", "retries", "reuses")

    def __init__(self) -> None:
        self.outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.body_bytes = 0
        self.dials = 0
        self.reuses = 0
        self.retries = 0

    def ended(self, outcome: Outcome) -> None:
        """Count one request by how it ended."""
        self.outcomes[outcome] += 1
