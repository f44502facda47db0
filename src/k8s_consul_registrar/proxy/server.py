"""The proxy of one process: its listening sockets, the connections on them, and an orderly end."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence

from k8s_consul_registrar.proxy.downstream import Downstream
from k8s_consul_registrar.proxy.failing import Failure
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.nodes import Nodes
from k8s_consul_registrar.proxy.outcomes import ProxyStats
from k8s_consul_registrar.proxy.peers import PodAccess, TokenSource
from k8s_consul_registrar.proxy.relay import Relay, RelayTiming
from k8s_consul_registrar.proxy.secure import SecureDownstream
from k8s_consul_registrar.rotating import BearerTokens, Rotating
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import ServerTls

BACKLOG = 1024

_log = get_logger(__name__)


class ProxyServer:
    """Relays scrapes of Nodes' kubelets to whoever connects.

    `nodes` is the table of kubelets, replaced from outside at any time (call `notice_nodes` after it).
    `token` and `context` are asked at every scrape, so a rotated token or CA counts at once. `inbound` is
    what callers must show, None for an open port; with `tls` they must speak it. `pods` are relayed beside the
    Nodes. Beyond `max_callers` connections new ones are closed.
    """

    def __init__(
        self,
        *,
        nodes: Nodes,
        paths: frozenset[str],
        token: TokenSource,
        context: Callable[[], ssl.SSLContext],
        concurrency: Concurrency | None = None,
        inbound: Rotating[BearerTokens] | None = None,
        tls: ServerTls | None = None,
        pods: PodAccess | None = None,
        max_callers: int = 4096,
        kept_connections: int = 8192,
        timing: RelayTiming | None = None,
    ) -> None:
        self._nodes = nodes
        self._paths = paths
        self._token = token
        self._context = context
        self._concurrency = concurrency or Concurrency()
        self._inbound = inbound
        self._tls = tls
        self._pods = pods
        self._max_callers = max_callers
        self._kept_connections = kept_connections
        self._timing = timing or RelayTiming()
        self._callers: set[Downstream] = set()
        self._servers: list[asyncio.Server] = []
        self._empty = asyncio.Event()
        self._empty.set()
        self._ticking: asyncio.TimerHandle | None = None
        self._relay: Relay | None = None

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Serve on sockets that are bound, as `listen` returns them; they are closed at the end."""
        self._relay = relay = Relay(
            nodes=self._nodes,
            paths=self._paths,
            token=self._token,
            context=self._context,
            concurrency=self._concurrency,
            kept_connections=self._kept_connections,
            timing=self._timing,
            pods=self._pods,
        )
        for bound in sockets:
            self._servers.append(
                await relay.loop.create_server(lambda: self._accept(relay), sock=bound, backlog=BACKLOG)
            )
        self._ticking = relay.loop.call_later(self._timing.tick, self._tick, relay)

    def _accept(self, relay: Relay) -> asyncio.BaseProtocol:
        if len(self._callers) >= self._max_callers:
            return _TurnedAway()
        if self._tls is not None:
            self._refresh(self._tls)
        caller = (
            Downstream(relay, self._inbound, self._forget)
            if self._tls is None
            else SecureDownstream(relay, self._inbound, self._forget, self._tls)
        )
        self._callers.add(caller)
        self._empty.clear()
        return caller

    def _forget(self, caller: Downstream) -> None:
        self._callers.discard(caller)
        if not self._callers:
            self._empty.set()

    def _tick(self, relay: Relay) -> None:
        self._ticking = relay.loop.call_later(self._timing.tick, self._tick, relay)
        now = relay.loop.time()
        for caller in list(self._callers):
            caller.expire(now)
        for peers in relay.all_peers:
            peers.pool.expire(now)
        if self._inbound is not None:
            self._inbound.refresh()
        if self._tls is not None:
            self._refresh(self._tls)

    def _refresh(self, tls: ServerTls) -> None:
        if tls.refresh():
            _log.info("a new certificate or authority for callers is in use")
            for caller in list(self._callers):
                caller.doubt()

    def notice_nodes(self) -> None:
        """Close the kept connections to kubelets that left the table."""
        if self._relay is not None:
            self._relay.notice_nodes()

    async def drain(self, grace: float) -> None:
        """Accept no more, let the scrapes under way finish for up to `grace` seconds, then stop."""
        if self._relay is not None:
            self._relay.is_draining = True
        for server in self._servers:
            server.close()
        for caller in list(self._callers):
            if caller.is_idle:
                caller.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
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
        for caller in list(self._callers):
            caller.reset()
        if self._relay is not None:
            self._relay.close()
        # Connections tell of their end in the loop's next turns.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._empty.wait()

    def stats(self) -> ProxyStats:
        """Return the figures of this moment; cheap enough for every scrape of the admin port."""
        relay = self._relay
        assert relay is not None, "the server has not started"
        counts = relay.counts
        return ProxyStats(
            outcomes=dict(counts.outcomes),
            body_bytes=counts.body_bytes,
            dials=counts.dials,
            reuses=counts.reuses,
            retries=counts.retries,
            running=sum(peers.limits.running for peers in relay.all_peers),
            waiting=sum(peers.limits.waiting for peers in relay.all_peers),
            callers=len(self._callers),
            kept=sum(len(peers.pool) for peers in relay.all_peers),
            nodes=len(self._nodes.current.by_name),
            nodes_known=self._nodes.known,
            pods=0 if self._pods is None else len(self._pods.pods),
            pods_known=self._pods is not None and self._pods.pods.known,
            durations=counts.durations.value(),
            upstream_times=counts.upstream_times.value(),
        )

    def failures(self) -> list[Failure]:
        """Return the scrapes that failed lately, the latest last."""
        return [] if self._relay is None else self._relay.failures.lately()

    def failures_since(self, noted: int) -> tuple[list[Failure], int]:
        """Return those after the first so many, and how many there were by now."""
        assert self._relay is not None, "the server has not started"
        return self._relay.failures.since(noted), self._relay.failures.noted

    @property
    def is_serving(self) -> bool:
        """Whether callers are accepted."""
        return bool(self._servers)


class _TurnedAway(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.abort()  # type: ignore[attr-defined]  # a stream's transport has it
