"""Prometheus' HTTP service discovery: targets as one JSON document, for collectors outside the cluster."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Self

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from k8s_consul_registrar.admin.connections import Bounds
from k8s_consul_registrar.admin.documents import Document, Documents, pieces
from k8s_consul_registrar.admin.saved_state import SavedState
from k8s_consul_registrar.admin.server import HttpServer
from k8s_consul_registrar.admin.target_groups import (
    BadQuery,
    GroupEncoder,
    SdQuery,
    parse_sd_query,
    parse_wait,
)
from k8s_consul_registrar.admin.view import Owner, SavedTargets, Targets, TargetsView
from k8s_consul_registrar.rotating import BearerTokens, Rotating
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.tls import ServerTls

SD_PATH = "/sd/targets"
# Sent only with targets that an earlier process saved.
STALE_SINCE = "X-Stale-Since"
# Sent with every answer about targets: the registrar that they belong to.
CLUSTER, INSTANCE, CLUSTER_UID = "X-Registrar-Cluster", "X-Registrar-Instance", "X-Registrar-Cluster-UID"
# Sent with every answer; `check` recognises a registrar by them.
HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}

# Seconds between two looks at the files: a Secret's volume is up to a minute late itself.
_LOOK_EVERY = 1.0
# Seconds an answer under way gets when the server stops, or gets new TLS files.
_SHUTDOWN_TIMEOUT = 2.0
# Seconds until a collector may try again while the first lists come in; Prometheus keeps what it has.
_RETRY_AFTER = "5"
# Requests that wait for a change at once: half of the connections, so that they keep no other request out.
MOST_WAITING = 64
# Seconds between two looks for a change while requests wait for one.
_CHANGE_LOOK = 0.1
log = get_logger("http_sd")


def no_saved_targets() -> SavedTargets | None:
    """Return None: nothing was saved."""
    return None


class LongPolls:
    """Requests that wait for a change, a bounded number: beyond it the one that has waited longest is answered."""

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._most = most
        self._waiting: dict[asyncio.Event, None] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, request: web.Request, is_over: Callable[[], bool], ends: float) -> bool:
        """Return True as soon as `is_over` does; False when a request must be answered, or no client waits for it."""
        answer = asyncio.Event()
        self._waiting[answer] = None
        if len(self._waiting) > self._most:
            next(iter(self._waiting)).set()
        try:
            while not answer.is_set() and not self._is_closed and _is_open(request):
                left = ends - time.monotonic()
                if is_over():
                    return True
                if left <= 0:
                    break
                await asyncio.sleep(min(_CHANGE_LOOK, left))
            return False
        finally:
            del self._waiting[answer]

    async def close(self, _: web.Application) -> None:
        """Have every request answered."""
        self._is_closed = True


class SdHandler:
    """The handler of `SD_PATH`: 200 with every target asked for, 503 while they are not known.

    A query that `target_groups` does not know is a 400. A request that includes a source that was never listed is
    answered from `saved`, marked as stale, and never in part. With `wait` a request whose `If-None-Match` names
    the document of now is answered once there is another, or at the end of that time.
    """

    def __init__(
        self, view: TargetsView, saved: Callable[[], SavedTargets | None], documents: Documents
    ) -> None:
        self._view = view
        self._saved = saved
        self._documents = documents
        self._stale: Documents | None = None
        self.polls = LongPolls()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        try:
            query = parse_sd_query(request.query.items())
            wait = parse_wait(request.query.getall("wait", ()))
        except BadQuery as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        ends = time.monotonic() + wait
        # A client that waits again and again is no reason to render more often.
        origin, document = await self._latest(query, may_be_old=wait > 0)

        def may_be_another() -> bool:
            if self._view.unlisted(query.scope):
                return False
            if origin is not self._documents:
                return True
            return origin.is_old(document.position) and time.monotonic() >= origin.due(document)

        while _is_known(request, document) and await self.polls.wait(request, may_be_another, ends):
            origin, document = await self._latest(query)
        return await _answer(request, document, self._view.owner, origin.view)

    async def _latest(self, query: SdQuery, *, may_be_old: bool = False) -> tuple[Documents, Document]:
        """Return the document of now, or one that is not due again, and the documents it is one of."""
        if problem := self._view.unlisted(query.scope):
            targets = self._saved()
            if targets is None:
                text = " ".join(problem.split())
                raise web.HTTPServiceUnavailable(text=f"{text}\n", headers={"Retry-After": _RETRY_AFTER})
            if self._stale is None or self._stale.view is not targets:
                self._stale = Documents(targets, self._documents.encoder)
            return self._stale, await self._stale.get(query)
        if self._stale is not None and not self._view.unlisted():
            self._stale = None
        return self._documents, await self._documents.get(query, may_be_old=may_be_old)


def _is_open(request: web.Request) -> bool:
    return request.transport is not None and not request.transport.is_closing()


def _is_known(request: web.Request, document: Document) -> bool:
    return any(tag.value in (document.etag, "*") for tag in request.if_none_match or ())


async def _answer(
    request: web.Request, document: Document, owner: Owner, targets: Targets | SavedTargets
) -> web.StreamResponse:
    # The tag is weak because both encodings share it.
    headers = {"ETag": f'W/"{document.etag}"', "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    headers |= {CLUSTER: owner.cluster, INSTANCE: owner.instance, CLUSTER_UID: owner.cluster_uid}
    if isinstance(targets, SavedState):
        # The age of the targets (RFC 9111, 5.1), and when they were last up to date.
        moment = datetime.fromtimestamp(targets.since, UTC).isoformat(timespec="seconds")
        headers["Age"] = str(max(0, round(time.time() - targets.since)))
        headers[STALE_SINCE] = moment.replace("+00:00", "Z")
        headers[CLUSTER_UID] = targets.cluster_uid
    if _is_known(request, document):
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = "application/json"
    if accepts_gzip(",".join(request.headers.getall("Accept-Encoding", ()))):
        headers["Content-Encoding"] = "gzip"
        return web.Response(body=document.packed, headers=headers)
    response = web.StreamResponse(headers=headers)
    response.content_length = document.size
    await response.prepare(request)
    for piece in pieces(document.packed):
        await response.write(piece)
        await asyncio.sleep(0)
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
        documents: Documents | None = None,
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
        documents = documents or Documents(view, GroupEncoder(view.meta_keys))
        handler = SdHandler(view, saved, documents)
        self._server.app.router.add_get(SD_PATH, handler.answer, allow_head=False)
        self.polls = handler.polls
        self._server.app.on_shutdown.append(handler.polls.close)
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
