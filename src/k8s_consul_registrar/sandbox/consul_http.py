"""The parts that all of Consul's HTTP endpoints share: rights, limits, blocking queries, headers and gzip."""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from k8s_consul_registrar.sandbox import filters
from k8s_consul_registrar.sandbox.consul_acl import ANONYMOUS, Right, Tokens
from k8s_consul_registrar.sandbox.consul_model import DEFAULT_NAMESPACE, Json
from k8s_consul_registrar.sandbox.consul_release import (
    ConsulOptions,
    FilteredMark,
    Scope,
    TooManyConnections,
)
from k8s_consul_registrar.sandbox.consul_rules import HttpError
from k8s_consul_registrar.sandbox.consul_state import Catalog
from k8s_consul_registrar.sandbox.server import accepts_gzip, compress

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HIDES = web.RequestKey("hides", bool)  # True once ACLs left something out of its answer
_LONGEST_WAIT = 600.0  # seconds
_DEFAULT_WAIT = 300.0
_JITTER = 16  # up to a sixteenth of the wait is added
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Write(NamedTuple):
    """A request that was meant to change something."""

    method: str
    path: str
    body: bytes

    def json(self) -> Any:
        """Return the decoded body."""
        return msgspec.json.decode(self.body)


class _Rate:
    """A limit of requests a second, 0 for none."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._times: list[float] = []

    def is_exceeded(self) -> bool:
        """Count a request, and return True if it is one too many."""
        if not self._per_second:
            return False
        now = time.monotonic()
        self._times = [then for then in self._times if now - then < 1.0]
        if len(self._times) >= self._per_second:
            return True
        self._times.append(now)
        return False


class Gate:
    """Decides which requests a Consul answers, and completes every answer."""

    def __init__(self, options: ConsulOptions, catalog: Catalog, tokens: Tokens) -> None:
        self._options = options
        self._release = options.release
        self._catalog = catalog
        self._tokens = tokens
        self._connections: set[asyncio.Transport] = set()
        limits = (options.read_rate, options.write_rate) if self._release.has_request_limits else (0.0, 0.0)
        self._reads, self._changes = map(_Rate, limits)
        self.writes: list[Write] = []

    # Rights

    def sees_everything(self, request: web.Request) -> bool:
        """Return True if a read is answered in full; HttpError 403 for an unknown token."""
        return self._tokens.has_all(token_of(request))

    def require(self, request: web.Request, right: Right) -> None:
        """Raise HttpError 403 unless the token has all rights."""
        if not self.sees_everything(request):
            raise HttpError(403, self.denial(request, right))

    def denial(self, request: web.Request, right: Right) -> str:
        """Return the text that denies a right to the request."""
        return self._tokens.denial(token_of(request), right)

    async def write(self, request: web.Request, right: Right) -> bytes:
        """Return the body of a request that changes something, after it was allowed and recorded."""
        body = await request.read()
        self.require(request, right)
        self.record(request, body)
        return body

    def record(self, request: web.Request, body: bytes) -> None:
        """Remember a write."""
        self.writes.append(Write(request.method, request.path_qs, body))

    def in_namespace(self, request: web.Request, namespace: str) -> bool:
        """Return True if a record of this namespace belongs into the answer; one that ACLs hide is noted."""
        asked, namespace = request.query.get("ns") or DEFAULT_NAMESPACE, namespace or DEFAULT_NAMESPACE
        if asked not in ("*", namespace):
            return False
        is_seen = self._tokens.sees(token_of(request), namespace)
        request[_HIDES] = request.get(_HIDES, False) or not is_seen
        return is_seen

    def refuse_elsewhere(self, request: web.Request) -> None:
        """Raise HttpError for a request about a namespace or another datacenter."""
        self._tokens.refuse_namespace(request.query)
        self._refuse_datacenter(request)

    def _refuse_datacenter(self, request: web.Request) -> None:
        if request.query.get("dc", "") not in ("", self._options.datacenter):
            raise HttpError(500, "No path to datacenter")

    # Limits

    def count_read(self) -> None:
        """Count a request that servers answer by a read; HttpError beyond `limits.request_limits`."""
        if self._reads.is_exceeded():
            raise HttpError(429, "rate limit exceeded, try again later or against a different server")

    def count_write(self) -> None:
        """Count a request that the leader answers by a write; HttpError beyond `limits.request_limits`."""
        if self._changes.is_exceeded():
            cause = "for operation that can only be performed by the leader, try again later"
            raise HttpError(503, f"rate limit exceeded {cause}")

    # Answers

    async def query(
        self, request: web.Request, scope: Scope, read: Callable[[], Any], *, unseen: Any
    ) -> web.Response:
        """Answer a read of the catalog, after the wait of a blocking query.

        `unseen` is the answer to a token without rights.
        """
        self.count_read()
        self.refuse_elsewhere(request)
        is_seen = self.sees_everything(request)
        await self._block(request, scope)
        response = json_response(read() if is_seen else unseen)
        response.headers["X-Consul-Index"] = str(self._index(scope))
        response.headers["X-Consul-KnownLeader"] = "true"
        response.headers["X-Consul-LastContact"] = "0"
        is_stale = "stale" in request.query
        response.headers["X-Consul-Effective-Consistency"] = "stale" if is_stale else "leader"
        if not is_seen or request.get(_HIDES, False):
            self.mark_filtered(request, response)
        return response

    def mark_filtered(self, request: web.Request, response: web.Response) -> None:
        """Add the header that tells that ACLs left something out, if the release sends it to this token."""
        mark, token = self._release.filtered_mark, token_of(request)
        unmarked = ("", ANONYMOUS) if mark is FilteredMark.NAMED_TOKEN else ("",)
        if mark is not FilteredMark.NONE and token not in unmarked:
            response.headers["X-Consul-Results-Filtered-By-ACLs"] = "true"

    async def _block(self, request: web.Request, scope: Scope) -> None:
        text = request.query.get("index", "0")
        if not text.isdecimal():
            raise HttpError(400, "Invalid index")
        known, seconds = int(text), wait_of(request)
        if known and self._index(scope) <= known:
            await wait_until(lambda: self._catalog.index_of(scope) > known, seconds, self._catalog.subscribe)

    def _index(self, scope: Scope) -> int:
        tables = self._release.table_indexes.get(scope[0], ())
        return max(map(self._catalog.index_of, tables), default=0) or self._catalog.index_of(scope)

    @web.middleware
    async def manners(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Keep the limits, turn refusals into texts and compress answers, as Consul's HTTP server does."""
        if not self._admits(request):
            return self._refuse_connection(request)
        began = time.monotonic()
        try:
            response = await self._handled(request, handler)
        except HttpError as error:
            response = web.Response(text=error.text, status=error.status)
        except web.HTTPNotFound:
            return web.Response(status=404)
        longest = self._release.longest_answer
        if longest and time.monotonic() - began > longest:
            _cut(request)
        response.headers["Vary"] = "Accept-Encoding"
        if isinstance(response, web.Response) and isinstance(response.body, bytes) and accepts_gzip(request):
            if not response.body:
                return response
            response.body = compress(response.body)
            response.headers["Content-Encoding"] = "gzip"
        return response

    async def _handled(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        largest = self._release.largest_body
        if largest and len(await request.read()) > largest:
            raise HttpError(413, f"Request body too large, max size: {largest} bytes.")
        try:
            return await handler(request)
        except web.HTTPMethodNotAllowed as error:
            response = web.Response(text=f"method {request.method} not allowed", status=405)
            response.headers["Allow"] = ",".join(sorted(error.allowed_methods))
            return response

    def _admits(self, request: web.Request) -> bool:
        most = self._options.most_connections
        if not most or request.transport is None:
            return True
        self._connections = {one for one in self._connections if not one.is_closing()}
        if request.transport not in self._connections and len(self._connections) >= most:
            return False
        self._connections.add(request.transport)
        return True

    def _refuse_connection(self, request: web.Request) -> web.Response:
        if self._release.too_many_connections is TooManyConnections.CLOSE:
            _cut(request)
        text = "Your IP is issuing too many concurrent connections, please rate limit your calls\n"
        response = web.Response(text=text, status=429)
        response.force_close()
        return response


async def wait_until(
    is_due: Callable[[], bool],
    seconds: float,
    subscribe: Callable[[Callable[[], None]], Callable[[], None]],
) -> None:
    """Return when `is_due`, which is asked again after each change, or when the time is over."""
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
    """Return the seconds that a blocking query waits, with jitter; HttpError 400 for no duration."""
    text = request.query.get("wait", "")
    seconds = _DEFAULT_WAIT
    if text:
        if not (match := _DURATION.fullmatch(text)):
            raise HttpError(400, "Invalid wait time")
        seconds = float(match[1]) * _SECONDS[match[2]] or _DEFAULT_WAIT
    seconds = min(seconds, _LONGEST_WAIT)
    return seconds + random.random() * seconds / _JITTER  # spreads load, keeps no secret


def selected(request: web.Request, records: list[Json], fields: frozenset[str]) -> list[Json]:
    """Return the records that pass the request's filter; HttpError 500 if it cannot be parsed."""
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


def token_of(request: web.Request) -> str:
    """Return the secret of the request's token, empty without one."""
    if token := request.headers.get("X-Consul-Token", ""):
        return token
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else request.query.get("token", "")


def _cut(request: web.Request) -> None:
    """Close the request's connection before its answer."""
    if request.transport is not None:
        request.transport.close()
