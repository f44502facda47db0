"""HTTP servers on ports of their own, and that of the admin port: probes, metrics, and what a mode adds."""

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol, Self

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Middleware
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.connections import Bounds, Connections
from k8s_consul_registrar.admin.metrics import metrics_routes, nothing
from k8s_consul_registrar.errors import OperationalError

# Clients ask every few seconds or once a minute: a connection is not worth keeping long.
_KEEPALIVE_TIMEOUT = 30.0
# Seconds for which the body of a request is read that no handler reads, before its connection is closed.
_LINGERING_TIME = 2.0
# Seconds a request under way gets when the admin server stops; probes and scrapes are short.
_SHUTDOWN_TIMEOUT = 1.0


def listen(port: int, setting: str) -> socket.socket:
    """Return a socket that listens on every address of the machine, IPv4 and IPv6 where it has both.

    Port 0 lets the system pick one. Raises OperationalError naming `setting` when the port cannot be used.
    """
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # IPv6 compiled in and switched off
                    raise
        return socket.create_server(("", port))
    except OSError as error:
        # The socket module appends the address to strerror; the plain words come from the number.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OperationalError(f"{setting} {port} cannot be listened on: {reason}") from error


class _OwnErrors(logging.Filter):
    """Drops mistakes of clients, which aiohttp logs as errors, each with a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, (ConnectionError, HttpProcessingError))


_log = logging.getLogger("k8s_consul_registrar.http")
_log.addFilter(_OwnErrors())


class HttpServer:
    """An HTTP application on a port of its own, on every address, from `start` to `stop`.

    `setting` names the port. An answer under way gets `shutdown_timeout` seconds when the server stops, or
    gets another TLS context.
    """

    def __init__(
        self,
        setting: str,
        port: int,
        *,
        shutdown_timeout: float,
        bounds: Bounds | None = None,
        middlewares: Iterable[Middleware] = (),
    ) -> None:
        self._connections = Connections(bounds)
        self.app = web.Application(middlewares=[self._connections.middleware, *middlewares])
        self._runner = web.AppRunner(
            self.app,
            access_log=None,
            logger=_log,
            keepalive_timeout=_KEEPALIVE_TIMEOUT,
            shutdown_timeout=shutdown_timeout,
            lingering_time=_LINGERING_TIME,
        )
        self._setting = setting
        self._shutdown_timeout = shutdown_timeout
        self.port = port

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        """Listen, with TLS if there is a context; raises OperationalError when the port cannot be used."""
        self._listening = listen(self.port, self._setting)
        self.port = self._listening.getsockname()[1]
        try:
            await self._runner.setup()
            assert self._runner.server is not None
            self._connections.start(self._listening, self._runner.server, context)
        except BaseException:
            await self.stop()
            raise

    async def renew(self, context: ssl.SSLContext) -> None:
        """Accept with another context from now on, and end what was accepted with the one before."""
        assert self._runner.server is not None
        before = self._runner.server.connections
        self._connections.renew(context)
        # Not their `close`, which leaves an idle connection open and unattended (aiohttp 3.14).
        await asyncio.gather(*(one.shutdown(self._shutdown_timeout) for one in before))

    async def stop(self) -> None:
        """Stop listening and close what is open."""
        await self._connections.stop()
        await self._runner.cleanup()
        self._listening.close()


class ProbeStatus(Protocol):
    """The daemon as its probes see it."""

    def is_alive(self) -> bool:
        """Return True if the main loop ticked lately; otherwise the kubelet restarts us."""

    def readiness(self) -> str:
        """Return in one line why the daemon is not ready; empty when it is."""


class AdminServer:
    """The server of `ADMIN_PORT` in either mode, while its context is open.

    `before_metrics` is awaited before each scrape: it counts what would hold up the loop. Port 0 lets the
    system pick one; `port` tells which.
    """

    def __init__(
        self,
        *,
        port: int,
        health: ProbeStatus,
        registry: CollectorRegistry,
        routes: Iterable[web.AbstractRouteDef] = (),
        before_metrics: Callable[[], Awaitable[None]] = nothing,
        bounds: Bounds | None = None,
    ) -> None:
        self._server = HttpServer("ADMIN_PORT", port, shutdown_timeout=_SHUTDOWN_TIMEOUT, bounds=bounds)
        self._server.app.add_routes(
            [*_health_routes(health), *metrics_routes(registry, before_metrics), *routes]
        )

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.port

    async def __aenter__(self) -> Self:
        """Start listening; raises OperationalError when the port cannot be used."""
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and close what is open."""
        await self._server.stop()


def _health_routes(health: ProbeStatus) -> list[web.RouteDef]:
    """Return `/healthz` and `/readyz`: 200 or 503, with the reason in one line of text."""

    async def healthz(_: web.Request) -> web.Response:
        return _answer("" if health.is_alive() else "the main loop has not ticked lately")

    async def readyz(_: web.Request) -> web.Response:
        return _answer(health.readiness())

    return [web.get("/healthz", healthz), web.get("/readyz", readyz)]


def _answer(problem: str) -> web.Response:
    text = " ".join(problem.split()) or "ok"
    return web.Response(
        status=503 if problem else 200, text=f"{text}\n", headers={"Cache-Control": "no-store"}
    )


def failing_routes(report: Callable[[], Mapping[str, object]]) -> list[web.RouteDef]:
    """Return `/api/v1/failing`, the proxy's Nodes and Pods whose scrapes fail at this moment."""

    async def failing(_: web.Request) -> web.Response:
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return web.json_response(report(), headers=headers)

    return [web.get("/api/v1/failing", failing)]
