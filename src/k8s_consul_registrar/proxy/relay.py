"""Parts that all scrapes of a process share, and the decision where a request leads."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from k8s_consul_registrar.proxy.config import ProxyConfig
from k8s_consul_registrar.proxy.headers import request_start
from k8s_consul_registrar.proxy.limits import Deadlines, Limits
from k8s_consul_registrar.proxy.nodes import POD_TLS, Nodes
from k8s_consul_registrar.proxy.refusals import Refusal
from k8s_consul_registrar.proxy.request import RequestCache
from k8s_consul_registrar.proxy.response import AnswerRules, HeadCache
from k8s_consul_registrar.proxy.routes import NODES_UNKNOWN, POD_PREFIX, Pods, Route, find_pod, find_route
from k8s_consul_registrar.proxy.stats import LastScrapes, RecentFailures, ScrapeCounts
from k8s_consul_registrar.proxy.tls_stream import Buffers
from k8s_consul_registrar.proxy.upstreams import (
    CredentialSource,
    KubeletUpstream,
    PodUpstream,
    Pool,
    Upstream,
)

# Distinct targets remembered; each Node has one or two, but queries make any number of them.
MAX_ROUTES = 16_384


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
            limits = Limits(config.concurrency)
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
