"""Keeps connections to kubelets between scrapes: so many over all, and none for long."""

import ssl
from collections.abc import Set as AbstractSet

from k8s_consul_registrar.proxy.nodes import Endpoint
from k8s_consul_registrar.proxy.upstream import Upstream


class Pool:
    """The idle connections, the longest idle first.

    `overall` bounds how many are kept; how many a kubelet has is bound by how many scrapes of it may run, since
    each takes a kept one first. `idle_limit` is in seconds and must stay under the 90 s after which a kubelet
    closes them (net/http's server in pkg/kubelet/server).
    """

    def __init__(self, *, overall: int, idle_limit: float) -> None:
        self._overall = overall
        self._idle_limit = idle_limit
        self._by_endpoint: dict[Endpoint, list[Upstream]] = {}
        self._in_order: dict[Upstream, None] = {}

    def __len__(self) -> int:
        return len(self._in_order)

    def take(self, endpoint: Endpoint, context: ssl.SSLContext | None) -> Upstream | None:
        """Return the connection used last that still stands, None where there is none.

        One that was made under another context (a CA or certificate was replaced since) is closed instead.
        """
        kept = self._by_endpoint.get(endpoint)
        while kept:
            upstream = kept.pop()
            del self._in_order[upstream]
            if not kept:
                del self._by_endpoint[endpoint]
            if upstream.is_usable and upstream.context is context:
                return upstream
            upstream.close()
        return None

    def put(self, upstream: Upstream, now: float) -> None:
        """Keep a connection, at the cost of the longest idle one where there are too many."""
        if len(self._in_order) >= self._overall:
            self._drop(next(iter(self._in_order)))
        upstream.idle_since = now
        self._by_endpoint.setdefault(upstream.endpoint, []).append(upstream)
        self._in_order[upstream] = None

    def expire(self, now: float) -> None:
        """Close what was idle for too long, and forget what its kubelet closed."""
        while self._in_order:
            upstream = next(iter(self._in_order))
            if upstream.is_usable and now - upstream.idle_since < self._idle_limit:
                return
            self._drop(upstream)

    def retain(self, endpoints: AbstractSet[Endpoint]) -> None:
        """Close the connections to all other kubelets: their Nodes are gone or have moved."""
        for endpoint in [endpoint for endpoint in self._by_endpoint if endpoint not in endpoints]:
            for upstream in list(self._by_endpoint[endpoint]):
                self._drop(upstream)

    def forget(self, endpoint: Endpoint) -> None:
        """Close the connections to one."""
        for upstream in list(self._by_endpoint.get(endpoint, ())):
            self._drop(upstream)

    def close(self) -> None:
        """Close all."""
        self.retain(frozenset())

    def _drop(self, upstream: Upstream) -> None:
        del self._in_order[upstream]
        kept = self._by_endpoint[upstream.endpoint]
        kept.remove(upstream)
        if not kept:
            del self._by_endpoint[upstream.endpoint]
        upstream.close()
