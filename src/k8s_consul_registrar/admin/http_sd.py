"""Prometheus' HTTP service discovery: targets as one JSON document, for collectors outside the cluster."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Self

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from k8s_consul_registrar.admin.connections import Bounds
from k8s_consul_registrar.admin.documents import Document, Documents, unpacked
from k8s_consul_registrar.admin.server import HttpServer
from k8s_consul_registrar.admin.target_groups import BadQuery, GroupEncoder, parse_sd_query
from k8s_consul_registrar.admin.view import SavedTargets, TargetsView
from k8s_consul_registrar.rotating import BearerTokens, Rotating
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import ServerTls

SD_PATH = "/sd/targets"
# Sent only with targets that an earlier process saved.
STALE_SINCE = "X-Stale-Since"
# Sent with every answer; `check` recognises a registrar by them.
HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}

# Seconds between two looks at the files: a Secret's volume is up to a minute late itself.
_LOOK_EVERY = 1.0
# Seconds an answer under way gets when the server stops, or gets new TLS files.
_SHUTDOWN_TIMEOUT = 2.0
# Seconds until a collector may try again while the first lists come in; Prometheus keeps what it has.
_RETRY_AFTER = "5"
log = get_logger("http_sd")


def no_saved_targets() -> SavedTargets | None:
    """Return None: nothing was saved."""
    return None


def sd_handler(
    view: TargetsView, saved: Callable[[], SavedTargets | None] = no_saved_targets
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return the handler of `SD_PATH`: 200 with every target asked for, 503 while they are not known.

    `kind`, `namespace` and `shard_path` filter, each may be repeated; anything else is a 400. A request that
    includes a source that was never listed is answered from `saved`, marked as stale, and never in part.
    """
    encoder = GroupEncoder(view.meta_keys)
    documents = Documents(view, encoder)
    stale: Documents | None = None

    async def targets(request: web.Request) -> web.StreamResponse:
        nonlocal stale
        try:
            query = parse_sd_query(request.query.items())
        except BadQuery as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        if problem := view.unlisted(query.scope):
            targets = saved()
            if targets is None:
                text = " ".join(problem.split())
                raise web.HTTPServiceUnavailable(text=f"{text}\n", headers={"Retry-After": _RETRY_AFTER})
            if stale is None or stale.view is not targets:
                stale = Documents(targets, encoder)
            return await _answer(request, await stale.get(query), stale_since=targets.since)
        if stale is not None and not view.unlisted():
            stale = None
        return await _answer(request, await documents.get(query))

    return targets


async def _answer(
    request: web.Request, document: Document, stale_since: float | None = None
) -> web.StreamResponse:
    # The tag is weak because both encodings share it.
    headers = {"ETag": f'W/"{document.etag}"', "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    if stale_since is not None:
        # The age of the targets (RFC 9111, 5.1), and when they were last up to date.
        moment = datetime.fromtimestamp(stale_since, UTC).isoformat(timespec="seconds")
        headers["Age"] = str(max(0, round(time.time() - stale_since)))
        headers[STALE_SINCE] = moment.replace("+00:00", "Z")
    known = request.if_none_match or ()
    if any(tag.value in (document.etag, "*") for tag in known):
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = "application/json"
    if accepts_gzip(",".join(request.headers.getall("Accept-Encoding", ()))):
        headers["Content-Encoding"] = "gzip"
        return web.Response(body=document.packed, headers=headers)
    response = web.StreamResponse(headers=headers)
    response.content_length = document.size
    await response.prepare(request)
    async for piece in unpacked(document.packed):
        await response.write(piece)
    await response.write_eof()
    return response


def accepts_gzip(accept_encoding: str) -> bool:
    """Return True if an Accept-Encoding names gzip with a weight above 0 (RFC 9110, 12.5.3)."""
    for coding in accept_encoding.lower().split(","):
        name, _, weight = coding.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "").rstrip("0.") != "q="
    return False


class HttpSdServer:
    """The server of `HTTP_SD_PORT`, which serves `SD_PATH` while its context is open.

    `bearer` is the token every request must carry, None for none; `tls` makes it HTTPS. A change of the
    files of either cuts off clients that rely on the old ones; `keep_fresh` looks for it. Port 0 lets the
    system pick one.
    """

    def __init__(
        self,
        *,
        port: int,
        view: TargetsView,
        saved: Callable[[], SavedTargets | None] = no_saved_targets,
        bearer: Rotating[BearerTokens] | None = None,
        tls: ServerTls | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self._server = HttpServer(
            "HTTP_SD_PORT",
            port,
            shutdown_timeout=_SHUTDOWN_TIMEOUT,
            bounds=bounds,
            middlewares=[_require(bearer)] if bearer else [],
        )
        self._server.app.router.add_get(SD_PATH, sd_handler(view, saved), allow_head=False)
        self._server.app.on_response_prepare.append(_harden)
        self._bearer = bearer
        self._tls = tls

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.port

    async def __aenter__(self) -> Self:
        """Start listening; raises OperationalError when the port cannot be used."""
        await self._server.start(self._tls.value.context if self._tls else None)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and close what is open."""
        await self._server.stop()

    async def keep_fresh(self) -> None:
        """Look at the files of the token and of TLS forever; the old ones stay in force while new ones are unusable."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await self.refresh()

    async def refresh(self) -> None:
        """Look at the files once, and use them from now on if they changed."""
        if self._bearer is not None:
            self._bearer.refresh()
        if self._tls is not None and self._tls.refresh():
            await self._server.renew(self._tls.value.context)
            log.info("HTTP_SD_PORT has new TLS files")


def _require(bearer: Rotating[BearerTokens]) -> Middleware:
    """Return a middleware that refuses requests without the token, whatever the path."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization")
        if not bearer.current().accepts(None if given is None else given.encode("utf-8", "surrogateescape")):
            raise web.HTTPUnauthorized(
                text="a bearer token is needed\n", headers={"WWW-Authenticate": "Bearer"}
            )
        return await handler(request)

    return check


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    """Mark every answer as something that no browser should render."""
    response.headers.update(HEADERS)
