"""HTTP exchanges with one API server: credentials on every request, refusals and breaks as our errors."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import AccessError, ClusterUnauthorized
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.faults import TRANSPORT_ERRORS, transport_error
from k8s_consul_registrar.kube.status import Action, cluster_error, decode_status

SUCCESSES = (200, 201)
REFUSAL_LIMIT = 1 << 16
# A streamed body is handed on in pieces of about this many bytes: large ones cost less per byte.
READ_SIZE = 1 << 18
HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip",
    "User-Agent": "k8s-consul-registrar",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of an API server; `path` begins after the server's own."""

    action: Action
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


class Exchange:
    """Sends requests to one API server; `async with` it.

    Every method raises a ClusterError. Environment proxies are ignored and redirects not followed: our
    credentials go to the server of `access` alone.
    """

    def __init__(self, access: Access, timing: Timing) -> None:
        self._access = access
        # An API server ends a request of its own accord after a minute (--request-timeout).
        self._timeout = aiohttp.ClientTimeout(
            total=timing.connect_timeout + 2 * timing.read_timeout,
            sock_connect=timing.connect_timeout,
            sock_read=timing.read_timeout,
        )
        # Events that stay away end a watch before this does, so that the cause is known by its name.
        self._stream_timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=timing.connect_timeout,
            sock_read=timing.watch_silence + timing.connect_timeout,
        )
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # Each followed source holds a connection for its watch; a limit could starve the requests between.
            connector=aiohttp.TCPConnector(limit=0),
            headers=HEADERS,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            read_bufsize=READ_SIZE,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, request: Request) -> bytes:
        """Return the whole body of a success."""
        async with self._success(request, self._timeout) as response:
            return await response.read()

    async def stream(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Yield the body of a success as it arrives: an empty piece once it is known to be one, then the rest."""
        async with self._success(request, self._stream_timeout) as response:
            yield b""
            while piece := await response.content.readany():
                yield piece

    @asynccontextmanager
    async def _success(
        self, request: Request, limits: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open a success, tried once more with fresh credentials after a 401; reading it may break too."""
        try:
            try:
                response = await self._attempt(request, limits)
            except ClusterUnauthorized:
                response = await self._attempt(request, limits)
            async with response:
                yield response
        except AccessError as error:
            raise ClusterUnauthorized(f"cannot {request.action}: {error}") from None
        except TRANSPORT_ERRORS as error:
            raise transport_error(error, request.action, self._access) from None

    async def _attempt(self, request: Request, limits: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        """Return the response of a success, its body unread, or raise what a refusal means."""
        if self._session is None:
            raise RuntimeError("Exchange is used outside `async with`")
        identity = await self._access.credentials.identity()
        context = self._access.ssl_context(identity)
        response = await self._session.request(
            request.method,
            f"{self._access.server}{request.path}",
            params=request.query,
            headers={**request.headers, **identity.headers()},
            data=request.body,
            allow_redirects=False,
            proxy=self._access.proxy,
            ssl=context if context is not None else True,
            server_hostname=self._access.server_hostname,
            timeout=limits,
        )
        if response.status in SUCCESSES:
            return response
        async with response:
            if response.status == 401:
                self._access.credentials.rejected(identity)
            status = decode_status(await _head(response.content))
            raise cluster_error(
                request.action,
                response.status,
                status,
                retry_after=response.headers.get("Retry-After", ""),
                origin=self._access.origin,
            )


async def _head(stream: aiohttp.StreamReader) -> bytes:
    """Read a refusal's body, as far as it is worth reading."""
    kept = bytearray()
    while len(kept) < REFUSAL_LIMIT and (chunk := await stream.read(REFUSAL_LIMIT)):
        kept += chunk
    return bytes(kept)
