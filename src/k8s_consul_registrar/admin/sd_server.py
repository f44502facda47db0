"""The HTTP server of `HTTP_SD_PORT`: targets for collectors outside the cluster, who show who they are."""

import asyncio
from collections.abc import Callable
from typing import Self

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from k8s_consul_registrar.admin.accepting import Bounds
from k8s_consul_registrar.admin.http_sd import SD_PATH, no_saved_targets, sd_handler
from k8s_consul_registrar.admin.serving import Serving
from k8s_consul_registrar.admin.view import MetaNames, SavedTargets, TargetsView, as_they_are
from k8s_consul_registrar.bearer import BearerFile
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import ServerTls

# Seconds between two looks at the files: a Secret's volume is up to a minute late itself.
_LOOK_EVERY = 5.0
# Seconds an answer under way gets when the server stops, or takes new TLS files.
_SHUTDOWN_TIMEOUT = 2.0
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
        saved: Callable[[], SavedTargets | None] = no_saved_targets,
        bearer: BearerFile | None = None,
        tls: ServerTls | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        asking = [_asks_for(bearer)] if bearer else []
        self._serving = Serving(
            "HTTP_SD_PORT", port, patience=_SHUTDOWN_TIMEOUT, bounds=bounds, middlewares=asking
        )
        self._serving.app.router.add_get(SD_PATH, sd_handler(view, meta_names, saved), allow_head=False)
        self._serving.app.on_response_prepare.append(_harden)
        self._bearer = bearer
        self._tls = tls

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._serving.port

    async def __aenter__(self) -> Self:
        """Start listening; raises OperationalError when the port cannot be had."""
        await self._serving.start(self._tls.context if self._tls else None)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and close what is open."""
        await self._serving.stop()

    async def keep_fresh(self) -> None:
        """Follow the files of the token and of TLS for ever; what cannot be read leaves the old in force."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await self.refresh()

    async def refresh(self) -> None:
        """Look at the files once, and serve by the new ones from here on."""
        if self._bearer is not None:
            self._bearer.refresh()
        if self._tls is not None and self._tls.refresh():
            await self._serving.renew(self._tls.context)
            log.info("HTTP_SD_PORT has new TLS files")


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
