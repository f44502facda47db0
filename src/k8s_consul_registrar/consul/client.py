"""Speaks HTTP to Consul and turns what goes wrong into errors that say who is at fault."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulToken
from k8s_consul_registrar.errors import (
    AccessError,
    ConsulBusy,
    ConsulError,
    ConsulForbidden,
    ConsulRefused,
    ConsulUnreachable,
)

# Of an error's text this much is shown: it is Consul's, and may quote what we sent.
LONGEST_PROBLEM = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer, whole."""

    body: bytes
    headers: Mapping[str, str]


class ConsulClient:
    """One Consul, over kept connections; use it as an async context manager."""

    def __init__(self, access: ConsulAccess, timing: Timing, *, connections: int = 32) -> None:
        self._access = access
        self._timing = timing
        self._connections = connections
        self._token = ConsulToken(access)
        self._session: aiohttp.ClientSession | None = None
        scope = {"ns": access.namespace, "partition": access.partition}
        self._scope = {key: value for key, value in scope.items() if value}

    async def __aenter__(self) -> Self:
        """Open the pool of connections; nothing is sent yet."""
        connector: aiohttp.BaseConnector
        if self._access.address.socket:
            connector = aiohttp.UnixConnector(path=self._access.address.socket, limit=self._connections)
        else:
            connector = aiohttp.TCPConnector(limit=self._connections, ssl=self._access.ssl_context or True)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=self._timing.read_timeout, sock_connect=self._timing.connect_timeout
            ),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Send one request; `path` is already percent-encoded. Raises a `ConsulError` unless it is a 200."""
        assert self._session is not None
        url = URL(self._access.address.url.rstrip("/") + path, encoded=True)
        url = url.update_query({**self._scope, **(params or {})}) if self._scope or params else url
        try:
            async with self._session.request(
                method,
                url,
                data=body,
                headers=self._headers(),
                server_hostname=self._access.tls_server_name or None,
                allow_redirects=False,
            ) as response:
                answer = Answer(await response.read(), response.headers)
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(error) from None
        if status != 200:
            raise refusal(status, path.partition("?")[0], answer)
        return answer

    def _headers(self) -> dict[str, str]:
        try:
            token = self._token.current()
        except AccessError as error:
            raise ConsulForbidden(str(error)) from None
        return {"X-Consul-Token": token} if token else {}

    def _unreachable(self, error: Exception) -> ConsulUnreachable:
        where = f"Consul at {self._access.address}"
        match error:
            case aiohttp.ClientConnectorCertificateError() | ssl.SSLCertVerificationError():
                return ConsulUnreachable(
                    f"{where}: its certificate cannot be verified (CONSUL_CACERT names the authority, "
                    f"CONSUL_TLS_SERVER_NAME the name in it): {error}"
                )
            case TimeoutError():
                return ConsulUnreachable(f"{where}: no answer in time")
            case _:
                return ConsulUnreachable(f"{where}: {str(error) or type(error).__name__}")


def refusal(status: int, path: str, answer: Answer) -> ConsulError:
    """Turn an answer that is no success into the error that says what to do about it."""
    text = answer.body[: 4 * LONGEST_PROBLEM].decode("utf-8", "replace").strip()
    text = "".join(char if char.isprintable() else " " for char in text)[:LONGEST_PROBLEM]
    problem = f"Consul answers {status} to {path}: {text or 'without a reason'}"
    if status == 403:
        return ConsulForbidden(f"{problem} (the token lacks a right, or is not known)")
    if status == 429 or status >= 500:
        retry_after = answer.headers.get("Retry-After", "")
        return ConsulBusy(problem, float(retry_after) if retry_after.isdecimal() else None)
    return ConsulRefused(problem, status)
