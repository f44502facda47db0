"""What all of Consul's HTTP endpoints share: tokens, blocking queries, headers, refusals, gzip."""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from k8s_consul_registrar.sandbox import filters
from k8s_consul_registrar.sandbox.compression import accepts_gzip, compress
from k8s_consul_registrar.sandbox.consul_model import Json
from k8s_consul_registrar.sandbox.consul_state import Catalog, Scope

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LONGEST_WAIT = 600.0  # seconds
_DEFAULT_WAIT = 300.0
_JITTER = 16  # up to a sixteenth of the wait is added
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_ACL_HEADER_SINCE = (1, 13)


class HttpError(Exception):
    """A refusal: an HTTP status and a text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Write(NamedTuple):
    """A request that was to change something."""

    method: str
    path: str
    body: bytes

    def json(self) -> Any:
        """Return the decoded body."""
        return msgspec.json.decode(self.body)


@dataclass(frozen=True, slots=True)
class ConsulOptions:
    """How the sandbox's Consul is set up.

    `token`: when set, ACLs are on: it alone may write and sees everything; requests without a token and
    those with one of `blind_tokens` see nothing, any other token is unknown.
    """

    version: str = "1.8.7"
    datacenter: str = "dc1"
    node_name: str = "agent-1"
    token: str = ""
    blind_tokens: frozenset[str] = frozenset()

    @property
    def release(self) -> tuple[int, int]:
        """The version's first two numbers."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


class Gate:
    """Who may do what, and the shape of every answer."""

    def __init__(self, options: ConsulOptions, catalog: Catalog) -> None:
        self._options = options
        self._catalog = catalog
        self.writes: list[Write] = []

    def sees_everything(self, request: web.Request) -> bool:
        """Return whether a read is answered in full; HttpError 403 for an unknown token."""
        token = _token(request)
        if not self._options.token or token == self._options.token:
            return True
        if token and token not in self._options.blind_tokens:
            raise HttpError(403, "ACL not found")
        return False

    def require_all(self, request: web.Request) -> None:
        """Raise HttpError 403 unless the token may do everything."""
        if not self.sees_everything(request):
            raise HttpError(403, "Permission denied")

    async def write(self, request: web.Request) -> bytes:
        """Return the body of a request that changes something, once it is allowed and recorded."""
        body = await request.read()
        self.require_all(request)
        self.record(request, body)
        return body

    def record(self, request: web.Request, body: bytes) -> None:
        """Remember a write."""
        self.writes.append(Write(request.method, request.path_qs, body))

    async def query(
        self, request: web.Request, scope: Scope, read: Callable[[], Any], *, unseen: Any
    ) -> web.Response:
        """Answer a catalog read, waiting first where the request is a blocking query.

        `unseen` is the answer for a token that may see nothing.
        """
        is_seen = self.sees_everything(request)
        await self._block(request, scope)
        response = json_response(read() if is_seen else unseen)
        index = self._catalog.index_of(scope)
        response.headers["X-Consul-Index"] = str(index)
        response.headers["X-Consul-KnownLeader"] = "true"
        response.headers["X-Consul-LastContact"] = "0"
        is_stale = "stale" in request.query
        response.headers["X-Consul-Effective-Consistency"] = "stale" if is_stale else "leader"
        if not is_seen:
            self.mark_filtered(request, response)
        return response

    def mark_filtered(self, request: web.Request, response: web.Response) -> None:
        """Say that ACLs left something out, as versions do that can and only to who shows a token."""
        if self._options.release >= _ACL_HEADER_SINCE and _token(request):
            response.headers["X-Consul-Results-Filtered-By-ACLs"] = "true"

    async def _block(self, request: web.Request, scope: Scope) -> None:
        known = request.query.get("index", "0")
        if not known.isdecimal():
            raise HttpError(400, "Invalid index")
        if int(known):
            await wait_until(
                lambda: self._catalog.index_of(scope) > int(known), wait_of(request), self._catalog.subscribe
            )


async def wait_until(
    is_due: Callable[[], bool],
    seconds: float,
    subscribe: Callable[[Callable[[], None]], Callable[[], None]],
) -> None:
    """Return once `is_due`, judged again after each change, or when the time is over."""
    changed = asyncio.Event()
    unsubscribe = subscribe(changed.set)
    try:
        async with asyncio.timeout(seconds):
            while not is_due():
                await changed.wait()
                changed.clear()
    except TimeoutError:
        pass
    finally:
        unsubscribe()


def wait_of(request: web.Request) -> float:
    """Return how long a blocking query waits, in seconds, jitter included; HttpError 400 for no duration."""
    text = request.query.get("wait", "")
    seconds = _DEFAULT_WAIT
    if text:
        if not (match := _DURATION.fullmatch(text)):
            raise HttpError(400, "Invalid wait time")
        seconds = float(match[1]) * _SECONDS[match[2]] or _DEFAULT_WAIT
    seconds = min(seconds, _LONGEST_WAIT)
    return seconds + random.random() * seconds / _JITTER  # spreads load, keeps no secret


def selected(request: web.Request, records: list[Json], fields: frozenset[str]) -> list[Json]:
    """Return the records the request's filter lets through; HttpError 500 when it cannot be parsed."""
    if not (expression := request.query.get("filter", "")):
        return records
    try:
        predicate = filters.parse(expression, fields)
    except filters.FilterError as error:
        raise HttpError(500, f"Failed to create boolean expression evaluator: {error}") from None
    plain = msgspec.json.decode(msgspec.json.encode(records))  # the filter sees what the reader would
    return [record for record, judged in zip(records, plain, strict=True) if predicate(judged)]


def json_response(value: Any, *, status: int = 200) -> web.Response:
    """Return a response of JSON."""
    body = msgspec.json.encode(value) + b"\n"
    return web.Response(body=body, status=status, content_type="application/json")


def empty_response() -> web.Response:
    """Return the empty 200 by which an agent says it is done."""
    return web.Response()


@web.middleware
async def consul_manners(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn refusals into texts and compress what may be, as Consul's HTTP server does."""
    try:
        response = await handler(request)
    except HttpError as error:
        response = web.Response(text=error.text, status=error.status)
    except web.HTTPNotFound:
        return web.Response(status=404)
    except web.HTTPMethodNotAllowed as error:
        response = web.Response(text=f"method {request.method} not allowed", status=405)
        response.headers["Allow"] = ",".join(sorted(error.allowed_methods))
    response.headers["Vary"] = "Accept-Encoding"
    if isinstance(response, web.Response) and isinstance(response.body, bytes) and accepts_gzip(request):
        if not response.body:
            return response
        response.body = compress(response.body)
        response.headers["Content-Encoding"] = "gzip"
    return response


def _token(request: web.Request) -> str:
    if token := request.headers.get("X-Consul-Token", ""):
        return token
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else request.query.get("token", "")
