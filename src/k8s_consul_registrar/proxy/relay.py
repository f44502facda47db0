"""What all scrapes share, and the decision whether one may begin."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from k8s_consul_registrar.proxy.buffers import Buffers
from k8s_consul_registrar.proxy.deadlines import Deadlines
from k8s_consul_registrar.proxy.failing import Failures
from k8s_consul_registrar.proxy.failures import of_pod
from k8s_consul_registrar.proxy.headers import request_start
from k8s_consul_registrar.proxy.limits import Concurrency, Limits
from k8s_consul_registrar.proxy.nodes import POD_TLS, Nodes
from k8s_consul_registrar.proxy.outcomes import Counts, Refusal
from k8s_consul_registrar.proxy.peers import Peers, PodAccess, TokenSource, as_it_is, no_context, no_token
from k8s_consul_registrar.proxy.pod_route import POD_PREFIX, UNKNOWN_POD, find_pod
from k8s_consul_registrar.proxy.pool import Pool
from k8s_consul_registrar.proxy.request import Memory
from k8s_consul_registrar.proxy.route import UNKNOWN_NODE, Route, find_route

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


@dataclass(frozen=True, slots=True)
class Routed:
    """A request target that leads somewhere, with the part of the request to there that never changes."""

    route: Route
    request: bytes
    peers: Peers


class PodPeers:
    """The Pods as peers, over TLS and in plain, which share places and the bound on kept connections."""

    def __init__(self, access: PodAccess, idle_limit: float) -> None:
        self.pods = access.pods
        limits = Limits(access.concurrency)
        pool = Pool(overall=access.kept_connections, idle_limit=idle_limit)
        access.pods.on_gone = pool.forget

        def peers(context: Callable[[], ssl.SSLContext | None]) -> Peers:
            return Peers(
                context=context,
                token=no_token,
                limits=limits,
                pool=pool,
                is_current=access.pods.is_current,
                unknown=UNKNOWN_POD,
                worded=of_pod,
            )

        self.over_tls = peers(access.context)
        self.in_plain = peers(no_context)


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
        pods: PodAccess | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.buffers = Buffers()
        self.counts = Counts()
        self.memory = Memory()
        self.timing = timing
        self.failures = Failures()
        self.nodes = nodes
        self.deadlines = Deadlines(self.loop)
        self.kubelets = Peers(
            context=context,
            token=token,
            limits=Limits(concurrency),
            pool=Pool(overall=kept_connections, idle_limit=timing.upstream_idle),
            is_current=lambda endpoint: endpoint in nodes.current.endpoints,
            unknown=UNKNOWN_NODE,
            worded=as_it_is,
        )
        self.pods = None if pods is None else PodPeers(pods, timing.upstream_idle)
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
        if self.pods is not None and target.startswith(POD_PREFIX):
            return self._find_pod(self.pods, target)
        found = find_route(target, self.nodes.current, self._paths, known=self.nodes.known)
        if isinstance(found, Refusal):
            return found
        if len(self._routed) >= MOST_ROUTES:
            self._routed.clear()
        routed = self._routed[target] = Routed(found, request_start(found), self.kubelets)
        return routed

    def notice_nodes(self) -> None:
        """Drop what was remembered of a table that is no longer current, connections included."""
        self._version = self.nodes.version
        self._routed.clear()
        self.kubelets.pool.retain(self.nodes.current.endpoints)

    def _find_pod(self, pods: PodPeers, target: bytes) -> Routed | Refusal:
        # Not remembered: Pods come and go all the time, and to find one again costs a few microseconds.
        found = find_pod(target, pods.pods, self.nodes.current)
        if isinstance(found, Refusal):
            return found
        peers = pods.over_tls if found.endpoint.peer == POD_TLS else pods.in_plain
        return Routed(found, request_start(found), peers)

    @property
    def all_peers(self) -> tuple[Peers, ...]:
        """Each kind that has places and connections of its own."""
        return (self.kubelets,) if self.pods is None else (self.kubelets, self.pods.in_plain)

    def close(self) -> None:
        """Close every connection that is kept, and forget every deadline."""
        self.deadlines.close()
        for peers in self.all_peers:
            peers.pool.close()
