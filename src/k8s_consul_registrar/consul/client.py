"""Speaks HTTP to Consul and turns what goes wrong into errors that say who is at fault."""

import asyncio
import math
import ssl
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
from yarl import URL

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulToken, unverified
from k8s_consul_registrar.consul.answers import LONGEST_HEAD, Answer, StreamedAnswer, refusal
from k8s_consul_registrar.consul.fence import Fence
from k8s_consul_registrar.errors import AccessError, ConsulFenced, ConsulForbidden, ConsulUnreachable

# Half of what an agent allows one address before 1.7.1, a quarter of what it does since (Consul's
# limits.http_max_conns_per_client): room for the writes, a held query and another registrar beside us.
CONNECTIONS = 50
# What is read at once from a body that is not kept whole, in bytes.
CHUNK = 64 * 1024

T = TypeVar("T")


class ConsulClient:
    """One Consul, over kept connections; use it as an async context manager."""

    def __init__(
        self,
        access: ConsulAccess,
        timing: Timing,
        *,
        connections: int = CONNECTIONS,
        fence: Fence | None = None,
    ) -> None:
        self._access = access
        self._fence = fence
        self._timing = timing
        self._connections = connections
        self._token = ConsulToken(access)
        self._session: aiohttp.ClientSession | None = None
        self._held: set[asyncio.Task[Any]] = set()
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
        """How many times the token was seen to change while requests were sent."""
        return self._token.version

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
            headers={"Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(
                total=self._timing.read_timeout, sock_connect=self._timing.connect_timeout
            ),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is held and close every connection."""
        held = tuple(self._held)
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def hold(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something beside everything else, for as long as this client is open at most."""
        task = asyncio.create_task(work)
        self._held.add(task)
        task.add_done_callback(self._held.discard)
        return task

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        accepts: tuple[int, ...] = (200,),
        wait: float = 0.0,
    ) -> Answer:
        """Send one request; `path` is already percent-encoded. Raises a `ConsulError` unless accepted.

        A blocking query says in `wait`, in seconds, how long Consul may take before it answers; Consul adds
        up to a sixteenth of it (Consul API, "Blocking queries").
        """
        longest = self._timing.read_timeout + wait * 17 / 16
        fence = self._time_for(method)
        timeout = aiohttp.ClientTimeout(total=min(longest, fence), sock_connect=self._timing.connect_timeout)
        try:
            async with self._send(method, path, params, body, timeout) as response:
                answer = Answer(await response.read(), response.headers, response.status)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if isinstance(error, TimeoutError) and fence < longest:
                raise ConsulFenced("a write was broken off: this replica leads no longer") from None
            raise self._unreachable(error) from None
        if answer.status not in accepts:
            raise refusal(answer.status, path, answer)
        return answer

    @asynccontextmanager
    async def stream(
        self, path: str, *, params: Mapping[str, str] | None = None
    ) -> AsyncIterator[StreamedAnswer]:
        """Read an answer too large to be kept whole; raises a `ConsulError` unless it is a 200."""
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self._timing.connect_timeout, sock_read=self._timing.read_timeout
        )
        sending = self._send("GET", path, params, None, timeout)
        try:
            response = await sending.__aenter__()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(error) from None
        try:
            if response.status != 200:
                head = await self._head(response)
                raise refusal(response.status, path, Answer(head, response.headers))
            yield StreamedAnswer(self._chunks(response), response.headers)
        finally:
            await sending.__aexit__(None, None, None)

    def _time_for(self, method: str) -> float:
        """Return how long a request may take, in seconds; raises `ConsulFenced` for a write we may not make.

        The clock is looked at for each single write: a process that was stopped meanwhile learns it here.
        """
        if method == "GET" or self._fence is None:
            return math.inf
        left = self._fence.left()
        if left <= 0:
            raise ConsulFenced("no write: this replica does not lead")
        return left

    def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        body: bytes | None,
        timeout: aiohttp.ClientTimeout,
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        assert self._session is not None
        url = URL(self._access.address.url.rstrip("/") + path, encoded=True)
        url = url.update_query({**self._scope, **(params or {})}) if self._scope or params else url
        return self._session.request(
            method,
            url,
            data=body,
            headers=self._headers(),
            ssl=self._access.tls.current() if self._access.tls else True,
            server_hostname=self._access.tls_server_name or None,
            allow_redirects=False,
            timeout=timeout,
        )

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for chunk in response.content.iter_chunked(CHUNK):
                yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(error) from None

    async def _head(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            return await response.content.read(LONGEST_HEAD)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(error) from None

    def _headers(self) -> dict[str, str]:
        try:
            token = self._token.current()
        except AccessError as error:
            raise ConsulForbidden(str(error)) from None
        return {"X-Consul-Token": token} if token else {}

    def _unreachable(self, error: Exception) -> ConsulUnreachable:
        where = f"Consul at {self._access.address}"
        match error:
            case aiohttp.ClientConnectorCertificateError(
                certificate_error=ssl.SSLCertVerificationError() as why
            ) | (ssl.SSLCertVerificationError() as why):
                return ConsulUnreachable(f"{where}: {unverified(why)}")
            case TimeoutError():
                return ConsulUnreachable(f"{where}: no answer in time")
            case _:
                return ConsulUnreachable(f"{where}: {str(error) or type(error).__name__}")
