"""Shared parts of all scrapes of a process: kinds of upstream, idle connections, deadlines, and where a request leads."""

import asyncio
import ssl
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from k8s_consul_registrar.proxy.config import ProxyConfig
from k8s_consul_registrar.proxy.headers import request_start
from k8s_consul_registrar.proxy.limits import Limits
from k8s_consul_registrar.proxy.nodes import POD_TLS, Endpoint, Nodes
from k8s_consul_registrar.proxy.refusals import Refusal, of_pod
from k8s_consul_registrar.proxy.request import RequestCache
from k8s_consul_registrar.proxy.response import AnswerRules, HeadCache
from k8s_consul_registrar.proxy.routes import (
    NODES_UNKNOWN,
    POD_PREFIX,
    UNKNOWN_NODE,
    UNKNOWN_POD,
    Pods,
    Route,
    find_pod,
    find_route,
)
from k8s_consul_registrar.proxy.stats import LastScrapes, RecentFailures, ScrapeCounts
from k8s_consul_registrar.proxy.tls_stream import Buffers
from k8s_consul_registrar.proxy.upstream import UpstreamConnection

# Distinct targets remembered; each Node has one or two, but queries make any number of them.
MAX_ROUTES = 16_384
# The most that a scrape may outlast its deadline, in seconds; a much shorter scrape has a timer of its own.
GRAIN = 0.1
SHORT = 20 * GRAIN


class Pool:
    """Idle connections, the longest idle first.

    `overall` bounds their number; the number to one kubelet is bounded by the scrapes of it that may run, since
    each takes a kept one first. `idle_limit` is in seconds and must stay under the 90 s after which a kubelet
    closes them (net/http's server in pkg/kubelet/server).
    """

    def __init__(self, *, overall: int, idle_limit: float) -> None:
        self._overall = overall
        self._idle_limit = idle_limit
        self._by_endpoint: dict[Endpoint, list[UpstreamConnection]] = {}
        self._in_order: dict[UpstreamConnection, None] = {}

    def __len__(self) -> int:
        return len(self._in_order)

    def take(self, endpoint: Endpoint, context: ssl.SSLContext | None) -> UpstreamConnection | None:
        """Return the usable connection used last, None if there is none.

        One made under another context is closed: a CA or certificate was replaced since.
        """
        kept = self._by_endpoint.get(endpoint)
        while kept:
            connection = kept.pop()
            del self._in_order[connection]
            if not kept:
                del self._by_endpoint[endpoint]
            if connection.is_usable and connection.context is context:
                return connection
            connection.close()
        return None

    def put(self, connection: UpstreamConnection, now: float) -> None:
        """Keep a connection, and close the longest idle one where there are too many."""
        if len(self._in_order) >= self._overall:
            self._drop(next(iter(self._in_order)))
        connection.idle_since = now
        self._by_endpoint.setdefault(connection.endpoint, []).append(connection)
        self._in_order[connection] = None

    def expire(self, now: float) -> None:
        """Close connections that were idle for too long, and forget those that the upstream closed."""
        while self._in_order:
            connection = next(iter(self._in_order))
            if connection.is_usable and now - connection.idle_since < self._idle_limit:
                return
            self._drop(connection)

    def retain(self, endpoints: AbstractSet[Endpoint]) -> None:
        """Close the connections to all other endpoints: their Nodes are gone or have moved."""
        for endpoint in [endpoint for endpoint in self._by_endpoint if endpoint not in endpoints]:
            for connection in list(self._by_endpoint[endpoint]):
                self._drop(connection)

    def forget(self, endpoint: Endpoint) -> None:
        """Close the connections to one endpoint."""
        for connection in list(self._by_endpoint.get(endpoint, ())):
            self._drop(connection)

    def close(self) -> None:
        """Close all."""
        self.retain(frozenset())

    def _drop(self, connection: UpstreamConnection) -> None:
        del self._in_order[connection]
        kept = self._by_endpoint[connection.endpoint]
        kept.remove(connection)
        if not kept:
            del self._by_endpoint[connection.endpoint]
        connection.close()


class CredentialSource(Protocol):
    """The proxy's credentials for kubelets; asked at every scrape, so they must not block."""

    def context(self) -> ssl.SSLContext:
        """Return the current context; the same one while nothing changed."""

    def token(self) -> str:
        """Return the current token, empty for none; raises OperationalError where none is available."""


class Upstream(Protocol):
    """One kind of upstream; scrapes of one kind never use the places or connections of another."""

    limits: Limits
    pool: Pool
    heads: HeadCache
    unknown: Refusal  # the answer where an endpoint may no longer be asked

    def token(self) -> str:
        """Return the token to send, empty for none; raises OperationalError where none is available."""

    def context(self) -> ssl.SSLContext | None:
        """Return the current TLS context, None for plain connections."""

    def is_current(self, endpoint: Endpoint) -> bool:
        """Return True if an endpoint may still be asked."""

    def describe(self, refusal: Refusal) -> Refusal:
        """Return a refusal in the words for this kind."""


class KubeletUpstream:
    """The kubelets of the cluster's Nodes."""

    unknown = UNKNOWN_NODE

    def __init__(self, nodes: Nodes, credentials: CredentialSource, config: ProxyConfig) -> None:
        self.limits = Limits(config.concurrency)
        self.pool = Pool(overall=config.kept_connections, idle_limit=config.timing.upstream_idle)
        self.heads = HeadCache(AnswerRules(may_end_by_close=True))
        self._nodes = nodes
        # Asked at every scrape.
        self.token = credentials.token
        self.context = credentials.context

    def is_current(self, endpoint: Endpoint) -> bool:
        """Return True if a Node still claims the endpoint."""
        return endpoint in self._nodes.current.endpoints

    def describe(self, refusal: Refusal) -> Refusal:
        """Return the refusal as it is: its words are about kubelets."""
        return refusal


class PodUpstream:
    """The Pods that are scraped over http, or those over https where there is a `context`; never shown a token."""

    unknown = UNKNOWN_POD

    def __init__(
        self,
        pods: Pods,
        context: Callable[[], ssl.SSLContext] | None,
        limits: Limits,
        pool: Pool,
        heads: HeadCache,
    ) -> None:
        self.limits = limits
        self.pool = pool
        self.heads = heads
        self._pods = pods
        self._context = context

    def token(self) -> str:
        """Return none: a Pod never sees the proxy's credentials."""
        return ""

    def context(self) -> ssl.SSLContext | None:
        """Return the context for Pods over https, None for plain ones."""
        return None if self._context is None else self._context()

    def is_current(self, endpoint: Endpoint) -> bool:
        """Return True if a Pod that may be scraped still has the endpoint."""
        return self._pods.is_current(endpoint)

    def describe(self, refusal: Refusal) -> Refusal:
        """Return the refusal reworded for a Pod."""
        return of_pod(refusal)


class Bounded(Protocol):
    """Anything with a deadline."""

    def expire(self) -> None:
        """End, because the time is up."""


class Deadlines:
    """Deadlines by length, the earliest first in each.

    Prometheus announces one timeout for a whole job, so scrapes with the same timeout form a queue whose first
    is always the next to expire. A timer each would cost more than the rest of a scrape's bookkeeping.
    """

    __slots__ = ("_lanes", "_loop", "_ticking", "_timers")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lanes: dict[float, dict[Bounded, float]] = {}
        self._timers: dict[Bounded, asyncio.TimerHandle] = {}
        self._ticking: asyncio.TimerHandle | None = None

    def start(self, bounded: Bounded, seconds: float) -> None:
        """Expire `bounded` in `seconds`, at most `GRAIN` later; to the millisecond where shorter than `SHORT`."""
        if seconds < SHORT:
            self._timers[bounded] = self._loop.call_later(seconds, self._expire, bounded)
            return
        lane = self._lanes.get(seconds)
        if lane is None:
            lane = self._lanes[seconds] = {}
        lane[bounded] = self._loop.time() + seconds
        if self._ticking is None:
            self._ticking = self._loop.call_later(GRAIN, self._tick)

    def stop(self, bounded: Bounded, seconds: float) -> None:
        """Forget a deadline; `seconds` is what it began with."""
        if seconds < SHORT:
            timer = self._timers.pop(bounded, None)
            if timer is not None:
                timer.cancel()
            return
        lane = self._lanes.get(seconds)
        if lane is not None:
            lane.pop(bounded, None)

    def close(self) -> None:
        """Forget all."""
        for timer in (*self._timers.values(), *((self._ticking,) if self._ticking is not None else ())):
            timer.cancel()
        self._timers.clear()
        self._lanes.clear()
        self._ticking = None

    def _expire(self, bounded: Bounded) -> None:
        self._timers.pop(bounded, None)
        bounded.expire()

    def _tick(self) -> None:
        self._ticking = None
        now = self._loop.time()
        due = []
        for seconds, lane in list(self._lanes.items()):
            for bounded, at in lane.items():
                if at > now:
                    break
                due.append((seconds, bounded))
            if not lane:
                # Clients choose the lengths, so unused ones must not gather.
                del self._lanes[seconds]
        for seconds, bounded in due:
            self.stop(bounded, seconds)
            bounded.expire()
        if self._lanes and self._ticking is None:
            self._ticking = self._loop.call_later(GRAIN, self._tick)


@dataclass(frozen=True, slots=True)
class Routed:
    """A request target that leads to an upstream, with the unchanging start of the request to it."""

    route: Route
    request: bytes
    upstream: Upstream


class Relay:
    """The parts that every scrape of one process uses; not for use from another thread.

    Pods are relayed where there are `pods`, those over https where there is `pod_context` too.
    """

    def __init__(
        self,
        config: ProxyConfig,
        nodes: Nodes,
        credentials: CredentialSource,
        pods: Pods | None = None,
        pod_context: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.timing = config.timing
        self.buffers = Buffers()
        self.requests = RequestCache()
        self.counts = ScrapeCounts()
        self.failures = RecentFailures()
        self.last_scrapes = LastScrapes()
        self.deadlines = Deadlines(self.loop)
        self.is_draining = False
        self.nodes = nodes
        self.pods = pods
        self.kubelets = KubeletUpstream(nodes, credentials, config)
        self.upstreams: tuple[Upstream, ...] = (self.kubelets,)
        if pods is not None:
            limits = Limits(config.concurrency, attrgetter("namespace"))
            pool = Pool(overall=config.kept_connections, idle_limit=config.timing.upstream_idle)
            pods.on_gone = pool.forget
            heads = HeadCache(
                AnswerRules(may_end_by_close=True, content_type=config.pod_content_type.encode())
            )
            self._plain_pods = PodUpstream(pods, None, limits, pool, heads)
            self._tls_pods = PodUpstream(pods, pod_context, limits, pool, heads)
            # One for both, which share limits and pool.
            self.upstreams += (self._plain_pods,)
        self._paths = config.paths
        self._routed: dict[bytes, Routed] = {}
        self._version = nodes.version

    def find(self, target: bytes) -> Routed | Refusal:
        """Return where a raw request target leads.

        For a Node the answer depends on the target and the table only and is remembered until the table
        changes.
        """
        if self._version != self.nodes.version:
            self.notice_nodes()
        routed = self._routed.get(target)
        if routed is not None:
            return routed
        if self.pods is not None and target.startswith(POD_PREFIX):
            return self._find_pod(self.pods, target)
        found = find_route(target, self.nodes.current, self._paths, known=self.nodes.known)
        if isinstance(found, Refusal):
            return found
        if len(self._routed) >= MAX_ROUTES:
            self._routed.clear()
        routed = self._routed[target] = Routed(found, request_start(found), self.kubelets)
        return routed

    def _find_pod(self, pods: Pods, target: bytes) -> Routed | Refusal:
        # Not remembered: Pods come and go all the time, and finding one costs a few microseconds.
        if not self.nodes.known:
            return NODES_UNKNOWN  # a Pod could claim the address of a Node or of the API server
        found = find_pod(target, pods, self.nodes.current)
        if isinstance(found, Refusal):
            return found
        upstream = self._tls_pods if found.endpoint.peer == POD_TLS else self._plain_pods
        return Routed(found, request_start(found), upstream)

    def notice_nodes(self) -> None:
        """Forget routes of the previous table, and close the connections to kubelets that left it."""
        self._version = self.nodes.version
        self._routed.clear()
        self.kubelets.pool.retain(self.nodes.current.endpoints)

    def close(self) -> None:
        """Close every kept connection, and forget every deadline."""
        self.deadlines.close()
        for upstream in self.upstreams:
            upstream.pool.close()
