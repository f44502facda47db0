"""HTTP to Consul: one client, its connections, and errors that say who is at fault."""

import asyncio
import math
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec
from yarl import URL

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulTokenFile, TokenSource
from k8s_consul_registrar.consul.health import (
    LONGEST_HEAD,
    TOO_MANY_REQUESTS,
    ConsulAnswer,
    ConsulHealth,
    RequestKind,
    StreamedAnswer,
    refusal,
)
from k8s_consul_registrar.errors import (
    AccessError,
    ConsulBusy,
    ConsulError,
    ConsulFenced,
    ConsulTokenUnknown,
    ConsulUnreachable,
)
from k8s_consul_registrar.tls import CONSUL, explain

# Half of what an agent allows one address before 1.7.1, a quarter of what it does since (Consul's
# limits.http_max_conns_per_client): room for the writes, a blocking query and another registrar beside us.
CONNECTIONS = 50
CHUNK = 64 * 1024  # bytes read at once from a streamed body
MOST_BODY = 256 << 20  # bytes of an answer that is kept whole; one without end would fill the memory
# A streamed body may take this many times as long: each byte of a Consul that drips ends the wait for the next.
STREAM_PATIENCE = 20
ATTEMPTS = 4  # for a request that is answered 429, the first included
# No service has this name, so the read is cheap and shows nothing.
_PROBE = b'[{"Service":{"Verb":"get","Node":"k8s-consul-registrar-probe","Service":{"ID":"none"}}}]'

# SO_LINGER on, for 0 seconds: closing discards what was not sent yet (Linux, socket(7)).
_DISCARD_ON_CLOSE = struct.pack("ii", 1, 0)
# Twice the largest body, in bytes: the system takes a request at once and nothing of it waits in our memory.
_SEND_BUFFER = 1024 * 1024
# A connection outlives one lost packet, whatever the grace, in seconds.
_LEAST_PATIENCE = 1.0

# aiohttp raises a ValueError for a URL that it cannot use.
_BROKEN = (aiohttp.ClientError, TimeoutError, OSError, ValueError)

T = TypeVar("T")


class _Request(msgspec.Struct, frozen=True):
    method: str
    path: str
    params: Mapping[str, str] | None
    body: bytes | None = None
    access: RequestKind = RequestKind.READ


class Fence(msgspec.Struct, frozen=True):
    """The time in which writes may be made.

    `left` returns the seconds until none of our writes may be under way, 0 or less where none may start.
    `grace` is how many seconds lie between that moment and the first in which another may write. `why` says why
    nothing may be written afterwards.
    """

    left: Callable[[], float]
    grace: float
    why: str = "this replica does not lead"

    def socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        """Return a socket whose unsent data end with it, and with a process that was stopped.

        By default a system goes on sending what a closed connection left, and what a stopped process wrote,
        for minutes: long enough for a write to reach Consul when another leads. TCP_USER_TIMEOUT (Linux, RFC
        5482) has it give up the connection when data stay unacknowledged for so long.
        """
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DISCARD_ON_CLOSE)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                patience = round(1000 * max(_LEAST_PATIENCE, self.grace))
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        except OSError:
            made.close()
            raise
        return made


class ConsulClient:
    """One Consul, over kept connections; use it as an async context manager.

    `health` has the outcome of every request that was sent.
    """

    def __init__(
        self,
        access: ConsulAccess,
        timing: Timing,
        *,
        connections: int = CONNECTIONS,
        fence: Fence | None = None,
        health: ConsulHealth | None = None,
        tokens: TokenSource | None = None,
    ) -> None:
        """Make the client; `tokens` takes the place of the token that `access` names."""
        self.health = health or ConsulHealth(timing)
        self._access = access
        self._fence = fence
        self._timing = timing
        self._connections = connections
        if tokens is None and access.token_file:
            tokens = ConsulTokenFile(access.token_file)
        self._tokens = tokens  # None where the token stays
        self._session: aiohttp.ClientSession | None = None
        self._background: set[asyncio.Task[Any]] = set()
        scope = {"ns": access.namespace, "partition": access.partition}
        self._scope = {key: value for key, value in scope.items() if value}

    @property
    def namespace(self) -> str:
        """The Consul Enterprise namespace, empty for none."""
        return self._access.namespace

    @property
    def partition(self) -> str:
        """The Consul Enterprise partition, empty for none."""
        return self._access.partition

    @property
    def token_version(self) -> int:
        """The number of times that the token was seen to change while requests were sent."""
        return 0 if self._tokens is None else self._tokens.version

    def single(self) -> "ConsulClient":
        """Return a client of the same Consul with one new connection, which one agent answers; it is not open yet."""
        return ConsulClient(
            self._access,
            self._timing,
            connections=1,
            fence=self._fence,
            health=self.health,
            tokens=self._tokens,
        )

    async def __aenter__(self) -> Self:
        """Open the pool of connections; nothing is sent yet."""
        connector: aiohttp.BaseConnector
        if self._access.address.socket:
            connector = aiohttp.UnixConnector(path=self._access.address.socket, limit=self._connections)
        else:
            connector = aiohttp.TCPConnector(
                limit=self._connections,
                socket_factory=self._fence.socket if self._fence else None,
            )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            # Compressing 8,200 services doubled what the read costs Consul (0.12 to 0.25 s of a core for
            # 4.7 MB), which is more than a local network needs to carry them as they are.
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(
                total=self._timing.read_timeout, sock_connect=self._timing.connect_timeout
            ),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what runs in the background and close every connection."""
        background = tuple(self._background)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something in the background, at most for as long as this client is open."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        accepts: tuple[int, ...] = (200,),
        accepts_text: str = "",
        is_read: bool = False,
        wait: float = 0.0,
    ) -> ConsulAnswer:
        """Send one request; `path` is already percent-encoded. Raises a `ConsulError` unless accepted.

        An answer is accepted by its status, or for `accepts_text` (in lower case) in an error's text. A GET
        is a read, another method a write unless `is_read`. A blocking query says in `wait`, in seconds, how
        long Consul may take before it answers; Consul adds up to a sixteenth of it (Consul API, "Blocking
        queries"). A 429 is answered by a few more attempts with growing, jittered waits.
        """
        access = RequestKind.READ if is_read or method == "GET" else RequestKind.WRITE
        asking = _Request(method, path, params, body, access)
        waits: Iterator[float] | None = None
        for left in reversed(range(1 if wait else ATTEMPTS)):
            attempt = self.health.begin(access, is_blocking=bool(wait))
            token = ""
            try:
                token = await self._token()
                answer = await self._exchange(asking, token, wait)
                is_accepted = answer.status in accepts or (
                    accepts_text and accepts_text in answer.text.lower()
                )
                if not is_accepted:
                    raise refusal(answer.status, path, answer)
            except ConsulError as error:
                is_last = not self._is_worth_another(error, token) or not left
                self.health.raised(attempt, error, is_last=is_last)
                if is_last:
                    raise
                asked = getattr(error, "retry_after", None) or 0.0
            else:
                self.health.succeeded(attempt)
                return answer
            finally:
                self.health.end(attempt)
            waits = waits or delays(self._timing.retry_first, self._timing.retry_cap)
            await asyncio.sleep(max(next(waits), min(asked, self._timing.retry_cap)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def probe(self, *, is_write_owed: bool) -> None:
        """Send a small consistent read, which needs Consul's leader and its quorum; raises a `ConsulError`.

        With nothing left to write, its success also clears a failed write.
        """
        await self.request(
            "PUT", "/v1/txn", params={"consistent": ""}, body=_PROBE, accepts=(200, 409), is_read=True
        )
        if not is_write_owed:
            self.health.clear_writes_by_read()

    @asynccontextmanager
    async def stream(
        self, path: str, *, params: Mapping[str, str] | None = None
    ) -> AsyncIterator[StreamedAnswer]:
        """Read an answer too large to be kept whole; raises a `ConsulError` unless it is a 200.

        It counts as a success once its end was read.
        """
        longest = self._timing.read_timeout
        limits = aiohttp.ClientTimeout(
            total=STREAM_PATIENCE * longest, sock_connect=self._timing.connect_timeout, sock_read=longest
        )
        attempt = self.health.begin(RequestKind.READ)
        try:
            async with await self._begin(_Request("GET", path, params), limits) as response:
                yield StreamedAnswer(self._chunks(response), response.headers)
                if response.content.at_eof():
                    self.health.succeeded(attempt)
        except ConsulError as error:
            self.health.raised(attempt, error)
            raise
        finally:
            self.health.end(attempt)

    async def _begin(self, asking: _Request, limits: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        """Return an answer that succeeds and is still to be read; a token that has ended is replaced once."""
        for left in (True, False):
            token = await self._token()
            response = await self._send(asking, token, limits)
            if response.status == 200:
                return response
            async with response:
                head = await self._read(response.content.read(LONGEST_HEAD))
            error = refusal(response.status, asking.path, ConsulAnswer(head, response.headers))
            if not (left and isinstance(error, ConsulTokenUnknown) and self._is_worth_another(error, token)):
                break
            await asyncio.sleep(self._timing.retry_first)
        raise error

    async def _exchange(self, asking: _Request, token: str, wait: float) -> ConsulAnswer:
        longest = self._timing.read_timeout + wait * 17 / 16
        fenced = math.inf if asking.access is RequestKind.READ else self._time_left()
        limits = aiohttp.ClientTimeout(total=min(longest, fenced), sock_connect=self._timing.connect_timeout)
        try:
            async with await self._send(asking, token, limits) as response:
                return ConsulAnswer(await self._read(_whole(response)), response.headers, response.status)
        except ConsulUnreachable as error:
            # The lead may have been renewed while the write hung: then Consul is at fault, not the fence.
            if fenced < longest and isinstance(error.__cause__, TimeoutError):
                self._time_left()
            raise

    def _time_left(self) -> float:
        """Return how many seconds a write may take; raises `ConsulFenced` where none may be made.

        The clock is read for each single write: a process that was stopped meanwhile learns it here.
        """
        if self._fence is None:
            return math.inf
        left = self._fence.left()
        if left <= 0:
            raise ConsulFenced(f"no write, or one broken off: {self._fence.why}")
        return left

    async def _send(
        self, asking: _Request, token: str, limits: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        assert self._session is not None
        try:
            url = URL(self._access.address.url.rstrip("/") + asking.path, encoded=True)
            query = {**self._scope, **(asking.params or {})}
            return await self._session.request(
                asking.method,
                url.update_query(query) if query else url,
                data=asking.body,
                headers={"X-Consul-Token": token} if token else {},
                ssl=self._access.tls.current().context if self._access.tls else True,
                server_hostname=self._access.tls_server_name or None,
                allow_redirects=False,
                timeout=limits,
            )
        except (*_BROKEN, AccessError) as error:
            raise self._unreachable(error) from error

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        while chunk := await self._read(response.content.read(CHUNK)):
            yield chunk

    async def _read(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        try:
            return await reading
        except _BROKEN as error:
            raise self._unreachable(error) from error

    async def _token(self) -> str:
        if self._tokens is None:
            return self._access.token
        try:
            return await self._tokens.token()
        except AccessError as error:
            raise ConsulTokenUnknown(str(error)) from None

    def _is_worth_another(self, error: ConsulError, token: str) -> bool:
        """Return True for a 429, and where the next attempt may show another token."""
        if isinstance(error, ConsulTokenUnknown):
            return self._tokens is not None and self._tokens.is_unknown(token)
        return isinstance(error, ConsulBusy) and error.status == TOO_MANY_REQUESTS

    def _unreachable(self, error: Exception) -> ConsulUnreachable:
        tls = self._access.tls
        # Behind aiohttp's own text, which speaks of TLS where there is none.
        text = str(getattr(error, "os_error", error)) or type(error).__name__
        text = "no answer in time" if isinstance(error, TimeoutError) else text
        why = explain(error, CONSUL, tls.value.context if tls else None) or text
        return ConsulUnreachable(f"Consul at {self._access.address}: {why}")


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MOST_BODY:
            raise aiohttp.ClientPayloadError("the answer is longer than any that Consul sends")
    return bytes(body)
