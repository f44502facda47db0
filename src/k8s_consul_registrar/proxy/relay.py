"""What all scrapes share, and the decision whether one may begin."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from k8s_consul_registrar.proxy.buffers import Buffers
from k8s_consul_registrar.proxy.headers import request_start
from k8s_consul_registrar.proxy.limits import Concurrency, Limits
from k8s_consul_registrar.proxy.nodes import Nodes, NodeTable
from k8s_consul_registrar.proxy.outcomes import Counts, Refusal
from k8s_consul_registrar.proxy.pool import Pool
from k8s_consul_registrar.proxy.request import Memory
from k8s_consul_registrar.proxy.route import Route, find_route

# Distinct targets remembered; each Node has one or two, but a query makes any number of them.
MOST_ROUTES = 16_384


@dataclass(frozen=True, slots=True)
class RelayTiming:
    """Every delay of the relay, in seconds; tests hand in smaller ones.

    `keep_alive` outlasts the five minutes Go's client keeps an idle connection, so that the caller closes first
    and no request meets a connection just closed. `upstream_idle` stays under a kubelet's 90 s.
    """

    connect: float = 5.0
    longest_scrape: float = 120.0
    request_head: float = 10.0
    keep_alive: float = 330.0
    flush: float = 30.0
    linger: float = 1.0
    upstream_idle: float = 75.0
    tick: float = 1.0


class TokenSource(Protocol):
    """Where the bearer token for kubelets comes from; it is asked at every scrape and must not block."""

    def __call__(self) -> str:
        """Return the current token, empty for none; raises OperationalError where it cannot be had."""


@dataclass(frozen=True, slots=True)
class Routed:
    """A request target that leads somewhere, with the part of the request to the kubelet that never changes."""

    route: Route
    request: bytes


class Relay:
    """The parts every scrape of one process uses; not for use from another thread."""

    def __init__(
        self,
        *,
        nodes: Nodes,
        paths: frozenset[str],
        token: TokenSource,
        context: Callable[[], ssl.SSLContext],
        concurrency: Concurrency,
        kept_connections: int,
        timing: RelayTiming,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.buffers = Buffers()
        self.counts = Counts()
        self.memory = Memory()
        self.timing = timing
        self.token = token
        self.context = context
        self.nodes = nodes
        self.limits = Limits(concurrency)
        self.pool = Pool(overall=kept_connections, idle_limit=timing.upstream_idle)
        self.is_draining = False
        self._paths = paths
        self._routed: dict[bytes, Routed] = {}
        self._version = nodes.version

    def find(self, target: bytes) -> Routed | Refusal:
        """Decide on a raw request target.

        The decision is a function of the target and the table alone, so it is remembered until the table
        changes.
        """
        if self._version != self.nodes.version:
            self.notice_nodes()
        routed = self._routed.get(target)
        if routed is not None:
            return routed
        found = find_route(target, self.nodes.current, self._paths, known=self.nodes.known)
        if isinstance(found, Refusal):
            return found
        if len(self._routed) >= MOST_ROUTES:
            self._routed.clear()
        routed = self._routed[target] = Routed(found, request_start(found))
        return routed

    def notice_nodes(self) -> None:
        """Drop what was remembered of a table that is no longer current, connections included."""
        self._version = self.nodes.version
        self._routed.clear()
        self.pool.retain(self.nodes.current.endpoints)

    def is_current(self, route: Route) -> bool:
        """Say whether a kubelet may still be asked: its Node may have gone while the scrape waited."""
        table: NodeTable = self.nodes.current
        return route.endpoint in table.endpoints
