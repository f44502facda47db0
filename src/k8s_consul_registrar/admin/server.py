"""The HTTP server of the admin port: health, metrics, and what a mode adds; never in the NodePort Service."""

from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Self

from aiohttp import web
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.accepting import Acceptor, Bounds, server_log
from k8s_consul_registrar.admin.health import Health, health_routes
from k8s_consul_registrar.admin.listening import listen
from k8s_consul_registrar.admin.metrics import metrics_routes, nothing

# Seconds a request under way gets when the server stops; probes and scrapes of us are short.
_SHUTDOWN_TIMEOUT = 1.0
# Probes come every few seconds and scrapes every minute; an idle connection is not worth keeping long.
_KEEPALIVE_TIMEOUT = 30.0


class AdminServer:
    """Serves the admin endpoints of either mode while its context is open.

    Listens on IPv4 and IPv6, on IPv4 alone where the machine has no IPv6. Port 0 takes one the system
    hands out; `port` says which.
    """

    __slots__ = ("_acceptor", "_listening", "_runner", "_wanted", "port")

    def __init__(
        self,
        *,
        port: int,
        health: Health,
        registry: CollectorRegistry,
        routes: Iterable[web.AbstractRouteDef] = (),
        before_metrics: Callable[[], Awaitable[None]] = nothing,
        bounds: Bounds | None = None,
    ) -> None:
        self._acceptor = Acceptor(bounds)
        app = web.Application(middlewares=[self._acceptor.middleware])
        app.add_routes([*health_routes(health), *metrics_routes(registry, before_metrics), *routes])
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=server_log(),
            keepalive_timeout=_KEEPALIVE_TIMEOUT,
            shutdown_timeout=_SHUTDOWN_TIMEOUT,
        )
        self._wanted = port
        self.port = port

    async def __aenter__(self) -> Self:
        """Start listening; raises OperationalError when the port cannot be had."""
        self._listening = listen(self._wanted, "ADMIN_PORT")
        self.port = self._listening.getsockname()[1]
        try:
            await self._runner.setup()
            assert self._runner.server is not None
            self._acceptor.start(self._listening, self._runner.server, None)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop listening and close what is open."""
        await self._close()

    async def _close(self) -> None:
        await self._acceptor.stop()
        await self._runner.cleanup()
        self._listening.close()
