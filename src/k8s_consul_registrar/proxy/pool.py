"""The pool of idle upstream connections, bounded in number and in age."""

import ssl
from collections.abc import Set as AbstractSet

from k8s_consul_registrar.proxy.nodes import Endpoint
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
