"""The HTTP server of the admin port: health, metrics, and what a mode adds; never in the NodePort Service."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Self

from aiohttp import web
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.accepting import Bounds
from k8s_consul_registrar.admin.health import Health, health_routes
from k8s_consul_registrar.admin.metrics import metrics_routes, nothing
from k8s_consul_registrar.admin.serving import Serving

# Seconds a request under way gets when the server stops; probes and scrapes of us are short.
_SHUTDOWN_TIMEOUT = 1.0


class AdminServer:
    """Serves the admin endpoints of either mode while its context is open.

    Listens on IPv4 and IPv6, on IPv4 alone where the machine has no IPv6. Port 0 takes one the system
    hands out; `port` says which.
    """

    __slots__ = ("_serving",)

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
        self._serving = Serving("ADMIN_PORT", port, patience=_SHUTDOWN_TIMEOUT, bounds=bounds)
        self._serving.app.add_routes(
            [*health_routes(health), *metrics_routes(registry, before_metrics), *routes]
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._serving.port

    async def __aenter__(self) -> Self:
        """Start listening; raises OperationalError when the port cannot be had."""
        await self._serving.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and close what is open."""
        await self._serving.stop()
