"""The HTTP server of `HTTP_SD_PORT`: targets for collectors outside the cluster, who show who they are."""

import asyncio
import ssl
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from k8s_consul_registrar.admin.accepting import Acceptor, Bounds, server_log
from k8s_consul_registrar.admin.http_sd import SD_PATH, sd_handler
from k8s_consul_registrar.admin.listening import listen
from k8s_consul_registrar.admin.view import MetaNames, TargetsView, as_they_are
from k8s_consul_registrar.bearer import BearerFile
from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.server_tls import ServerTls
from k8s_consul_registrar.telemetry import get_logger

# Seconds between two looks at the files: a Secret's volume is up to a minute late itself.
_LOOK_EVERY = 5.0
# Seconds an answer under way gets when the server stops, or takes new TLS files.
_SHUTDOWN_TIMEOUT = 2.0
# Collectors ask every minute; a handshake a minute costs less than a connection kept.
_KEEPALIVE_TIMEOUT = 30.0
# Seconds a body that nobody asked for is read for, before its connection is closed.
_LINGERING_TIME = 2.0
# Of every answer; what `check` knows us by.
HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}

log = get_logger("http_sd")


class HttpSdServer:
    """Serves `SD_PATH` while its context is open; `keep_fresh` runs beside it.

    `bearer` is the token every request must carry, None for none; `tls` makes it HTTPS. Whoever changes the
    files of either cuts off callers who go by the old ones. Port 0 takes one the system hands out.
    """

    def __init__(
        self,
        *,
        port: int,
        view: TargetsView,
        meta_names: MetaNames = as_they_are,
        bearer: BearerFile | None = None,
        tls: ServerTls | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self._acceptor = Acceptor(bounds)
        asking = [_asks_for(bearer)] if bearer else []
        app = web.Application(middlewares=[self._acceptor.middleware, *asking])
        app.router.add_get(SD_PATH, sd_handler(view, meta_names), allow_head=False)
        app.on_response_prepare.append(_harden)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=server_log(),
            keepalive_timeout=_KEEPALIVE_TIMEOUT,
            shutdown_timeout=_SHUTDOWN_TIMEOUT,
            lingering_time=_LINGERING_TIME,
        )
        self._bearer = bearer
        self._tls = tls
        self._wanted = port
        self.port = port

    async def __aenter__(self) -> Self:
        """Start listening; raises OperationalError when the port cannot be had."""
        self._listening = listen(self._wanted, "HTTP_SD_PORT")
        self.port = self._listening.getsockname()[1]
        try:
            await self._runner.setup()
            assert self._runner.server is not None
            context = self._tls.context if self._tls else None
            self._acceptor.start(self._listening, self._runner.server, context)
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

    async def keep_fresh(self) -> None:
        """Follow the files of the token and of TLS for ever; what cannot be read leaves the old in force."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await self.refresh()

    async def refresh(self) -> None:
        """Look at the files once, and serve by the new ones from here on."""
        if self._bearer is not None:
            self._bearer.refresh()
        if self._tls is None:
            return
        try:
            is_new = self._tls.refresh()
        except AccessError as error:
            log.warning("TLS of HTTP_SD_PORT stays as it was", problem=str(error))
            return
        if is_new:
            await self._renew(self._tls.context)
            log.info("HTTP_SD_PORT has new TLS files")

    async def _renew(self, context: ssl.SSLContext) -> None:
        """Accept with the context of this moment, and end what was accepted with the one before."""
        assert self._runner.server is not None
        before = self._runner.server.connections
        self._acceptor.renew(context)
        # Not their `close`, which leaves an idle connection open and unattended (aiohttp 3.14).
        await asyncio.gather(*(one.shutdown(_SHUTDOWN_TIMEOUT) for one in before))

    async def _close(self) -> None:
        await self._acceptor.stop()
        await self._runner.cleanup()
        self._listening.close()


def _asks_for(bearer: BearerFile) -> Middleware:
    """Turn away whoever lacks the token, whatever the path."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization")
        if not bearer.accepts(None if given is None else given.encode("utf-8", "surrogateescape")):
            raise web.HTTPUnauthorized(
                text="a bearer token is needed\n", headers={"WWW-Authenticate": "Bearer"}
            )
        return await handler(request)

    return check


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    """No answer of ours is a page, whatever a browser makes of it."""
    response.headers.update(HEADERS)
