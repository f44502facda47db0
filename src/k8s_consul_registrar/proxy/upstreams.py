"""Kinds of upstream (kubelets, Pods), each with its own TLS context, token, limits and pool of idle connections."""

import ssl
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Protocol

from k8s_consul_registrar.proxy.config import ProxyConfig
from k8s_consul_registrar.proxy.limits import Limits
from k8s_consul_registrar.proxy.nodes import Endpoint, Nodes
from k8s_consul_registrar.proxy.refusals import Refusal, of_pod
from k8s_consul_registrar.proxy.response import AnswerRules, HeadCache
from k8s_consul_registrar.proxy.routes import UNKNOWN_NODE, UNKNOWN_POD, Pods
from k8s_consul_registrar.proxy.upstream import UpstreamConnection


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
        self._credentials = credentials

    def token(self) -> str:
        """Return the proxy's token for kubelets."""
        return self._credentials.token()

    def context(self) -> ssl.SSLContext:
        """Return the context for kubelets."""
        return self._credentials.context()

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
