"""The proxy of one process: its listening sockets, the connections on them, and an orderly end."""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from k8s_consul_registrar.proxy.client_connection import ClientConnection
from k8s_consul_registrar.proxy.config import ProxyConfig
from k8s_consul_registrar.proxy.limits import ConnectionLimit
from k8s_consul_registrar.proxy.nodes import Endpoint, Nodes
from k8s_consul_registrar.proxy.relay import CredentialSource, Relay
from k8s_consul_registrar.proxy.routes import Pods
from k8s_consul_registrar.proxy.secure_connection import SecureClientConnection
from k8s_consul_registrar.proxy.stats import Failure, LastScrape, ProxyStats
from k8s_consul_registrar.rotating import BearerTokens, Rotating
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import ServerTls

BACKLOG = 1024
REPORT_PERIOD = 60.0  # seconds between two lines about evicted connections
# Errors of the system where IPv6 is compiled out or switched off.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

_log = get_logger(__name__)


class ProxyServer:
    """Relay of scrapes, for every client that connects.

    `nodes` holds the table of kubelets, which may be replaced at any time (call `notice_nodes` after it).
    `credentials` are asked at every scrape, so a rotated token or CA counts at once. Pods are relayed where
    there are `pods`, with `pod_context` those over https too. Clients must send a token of `inbound` and speak
    `tls`, each unless it is None.
    """

    def __init__(
        self,
        config: ProxyConfig,
        nodes: Nodes,
        credentials: CredentialSource,
        *,
        pods: Pods | None = None,
        pod_context: Callable[[], ssl.SSLContext] | None = None,
        inbound: Rotating[BearerTokens] | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        self._config = config
        self._inbound = inbound
        self._tls = tls
        self._relay = Relay(config, nodes, credentials, pods, pod_context)
        self._clients: set[ClientConnection] = set()
        self._limit: ConnectionLimit[ClientConnection] = ConnectionLimit(config.max_clients)
        self._reported = (0, 0)
        self._next_report = 0.0
        self._servers: list[asyncio.Server] = []
        self._empty = asyncio.Event()
        self._empty.set()
        self._ticking: asyncio.TimerHandle | None = None

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Serve on sockets that are bound, as `listen` returns them; they are closed at the end."""
        for bound in sockets:
            server = await self._relay.loop.create_server(self._accept, sock=bound, backlog=BACKLOG)
            self._servers.append(server)
        self._ticking = self._relay.loop.call_later(self._config.timing.tick, self._tick)

    def _accept(self) -> asyncio.BaseProtocol:
        if self._limit.is_full and not self._make_room():
            return _DeniedConnection()
        self._refresh_tls()
        client = (
            ClientConnection(self._relay, self._inbound, self._limit, self._forget)
            if self._tls is None
            else SecureClientConnection(self._relay, self._inbound, self._limit, self._forget, self._tls)
        )
        self._clients.add(client)
        self._relay.buffers.share(len(self._clients))
        self._empty.clear()
        return client

    def _make_room(self) -> bool:
        client = self._limit.first_to_go()
        if client is None:
            self._relay.counts.denied += 1
            return False
        self._relay.counts.evicted += 1
        client.give_way()
        return True

    def _report_evictions(self, now: float) -> None:
        """Log evictions, at most once in `REPORT_PERIOD`."""
        counts = self._relay.counts
        evicted, denied = counts.evicted, counts.denied
        if (evicted, denied) != self._reported and now >= self._next_report:
            _log.warning(
                "too many connections of clients",
                limit=self._config.max_clients,
                evicted=evicted - self._reported[0],
                denied=denied - self._reported[1],
            )
            self._reported = (evicted, denied)
            self._next_report = now + REPORT_PERIOD

    def _forget(self, client: ClientConnection) -> None:
        self._clients.discard(client)
        self._relay.buffers.share(len(self._clients))
        if not self._clients:
            self._empty.set()

    def _tick(self) -> None:
        relay = self._relay
        self._ticking = relay.loop.call_later(self._config.timing.tick, self._tick)
        now, now_of_scrapes = relay.loop.time(), monotonic()
        self._report_evictions(now)
        relay.last_scrapes.trim()
        for client in list(self._clients):
            client.expire(now)
        for upstream in relay.upstreams:
            upstream.pool.expire(now)
            upstream.limits.relieve(now_of_scrapes)
        if self._inbound is not None:
            self._inbound.refresh()
        self._refresh_tls()

    def _refresh_tls(self) -> None:
        if self._tls is not None and self._tls.refresh():
            _log.info("a new certificate or authority for callers is in use")
            for client in list(self._clients):
                client.recheck()

    def notice_nodes(self) -> None:
        """Close the kept connections to kubelets that left the table."""
        self._relay.notice_nodes()

    def announce_end(self) -> None:
        """Close each connection after its next answer, and say so in it; accept clients as before."""
        self._relay.is_draining = True

    async def drain(self, grace: float) -> None:
        """Accept no more, let the scrapes under way finish for up to `grace` seconds, then stop.

        Idle connections are closed last: until then a request on one of them is answered.
        """
        self.announce_end()
        for server in self._servers:
            server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while not all(client.is_idle for client in self._clients):  # noqa: ASYNC110 - only here it matters
                    await asyncio.sleep(0.02)
        for client in list(self._clients):
            client.part()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.timing.linger):
                await self._empty.wait()
        await self.stop()

    async def stop(self) -> None:
        """End everything at once; an answer under way is reset."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        for client in list(self._clients):
            client.reset()
        self._relay.close()
        # Connections are lost in the loop's next turns.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._empty.wait()

    def stats(self) -> ProxyStats:
        """Return the current figures; cheap enough for every scrape of the admin port."""
        relay = self._relay
        counts, pods = relay.counts, relay.pods
        return ProxyStats(
            outcomes=dict(counts.outcomes),
            body_bytes=counts.body_bytes,
            dials=counts.dials,
            reuses=counts.reuses,
            retries=counts.retries,
            running=sum(upstream.limits.running for upstream in relay.upstreams),
            waiting=sum(upstream.limits.waiting for upstream in relay.upstreams),
            callers=len(self._clients),
            kept=sum(len(upstream.pool) for upstream in relay.upstreams),
            nodes=len(relay.nodes.current.by_name),
            nodes_known=relay.nodes.known,
            pods=0 if pods is None else len(pods),
            pods_known=pods is not None and pods.known,
            durations=counts.durations.value(),
            upstream_times=counts.upstream_times.value(),
            evicted=counts.evicted,
            denied=counts.denied,
        )

    def failures(self) -> list[Failure]:
        """Return the scrapes that failed lately, the latest last."""
        return self._relay.failures.lately()

    def last_scrapes(self) -> Mapping[Endpoint, LastScrape]:
        """Return the latest scrape of each upstream."""
        return self._relay.last_scrapes.collect()

    def take_last_scrapes(self) -> dict[Endpoint, LastScrape]:
        """Return the latest scrape of each upstream scraped since the last call."""
        return self._relay.last_scrapes.take()

    def failures_since(self, noted: int) -> tuple[list[Failure], int]:
        """Return the failures after the first `noted`, and the number of all so far."""
        return self._relay.failures.since(noted), self._relay.failures.noted

    @property
    def is_serving(self) -> bool:
        """True if clients are accepted."""
        return bool(self._servers)


class _DeniedConnection(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.abort()  # type: ignore[attr-defined]  # a stream's transport has it


def listen(port: int, *, reuse_port: bool = False) -> list[socket.socket]:
    """Return sockets bound to one port on IPv4 and, where the machine has it, IPv6; 0 lets the system choose.

    Raises OSError if the port is not available.
    """
    first = _bound(socket.AF_INET, "0.0.0.0", port, reuse_port=reuse_port)  # noqa: S104 - the service is the port
    sockets = [first]
    if socket.has_ipv6:
        try:
            sockets.append(_bound(socket.AF_INET6, "::", first.getsockname()[1], reuse_port=reuse_port))
        except OSError as error:
            if error.errno not in _NO_IPV6:
                first.close()
                raise
    return sockets


def _bound(family: int, host: str, port: int, *, reuse_port: bool) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.setblocking(False)  # noqa: FBT003 - the socket's own signature
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
