"""Requests to one API server."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import (
    AccessError,
    ClusterForbidden,
    ClusterRefused,
    ClusterUnauthorized,
)
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.credentials import Identity
from k8s_consul_registrar.kube.faults import TRANSPORT_ERRORS, transport_error
from k8s_consul_registrar.kube.objects import Page, decode_page
from k8s_consul_registrar.kube.status import Action, cluster_error, decode_status
from k8s_consul_registrar.model import Kind

RESOURCES = {Kind.POD: "pods", Kind.NODE: "nodes"}
PAGE_SIZE = 500
SUCCESSES = (200, 201)
REFUSAL_LIMIT = 1 << 16
HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip",
    "User-Agent": "k8s-consul-registrar",
}


AnswerT = TypeVar("AnswerT")


class _Metadata(msgspec.Struct):
    uid: str


class _Object(msgspec.Struct):
    metadata: _Metadata


class _Version(msgspec.Struct, rename="camel"):
    git_version: str


class _Verdict(msgspec.Struct):
    allowed: bool


class _Review(msgspec.Struct):
    status: _Verdict


@dataclass(frozen=True, slots=True)
class _Request:
    action: Action
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


class KubeClient:
    """Asks one API server; `async with` it.

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
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=HEADERS,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def pages(
        self, kind: Kind, *, namespace: str = "", label_selector: str = "", page_size: int = PAGE_SIZE
    ) -> AsyncIterator[Page]:
        """Yield a complete, consistent list in pages.

        ClusterExpired in the middle means that the snapshot is gone: what came so far is no list, begin
        afresh. `resourceVersion` is left unset: the list is as new as the request (Kubernetes API concepts,
        "Semantics for get and list").
        """
        action = Action("list", RESOURCES[kind], namespace)
        scope = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
        path = f"/api/v1{scope}/{RESOURCES[kind]}"
        query = {"limit": str(page_size)}
        if label_selector:
            query["labelSelector"] = label_selector
        while True:
            body = await self._send(_Request(action, path, dict(query)))
            try:
                page = decode_page(body, kind)
            except ClusterRefused as error:
                raise ClusterRefused(f"cannot {action}: {error}", error.status) from None
            yield page
            if not page.continue_token:
                return
            if page.continue_token == query.get("continue"):
                raise ClusterRefused(f"cannot {action}: the API server repeats a page for ever", 200)
            query["continue"] = page.continue_token

    async def namespace_uid(self, name: str) -> str | None:
        """Return the UID of a namespace, None where we may not see it or it is not there."""
        action = Action("get", "namespaces")
        try:
            body = await self._send(_Request(action, f"/api/v1/namespaces/{quote(name, safe='')}"))
        except ClusterForbidden:
            return None
        except ClusterRefused as error:
            if error.status == 404:
                return None
            raise
        return _decode(body, _Object, action).metadata.uid

    async def server_version(self) -> str:
        """Return the API server's version, for example `v1.31.2`."""
        action = Action("get", "/version")
        return _decode(await self._send(_Request(action, "/version")), _Version, action).git_version

    async def can_i(
        self, verb: str, resource: str, *, group: str = "", subresource: str = "", namespace: str = ""
    ) -> bool:
        """Tell whether our credentials are allowed something (a SelfSubjectAccessReview)."""
        attributes = {
            "verb": verb,
            "resource": resource,
            "group": group,
            "subresource": subresource,
            "namespace": namespace,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {name: value for name, value in attributes.items() if value}},
        }
        action = Action("create", "selfsubjectaccessreviews")
        request = _Request(
            action,
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            method="POST",
            headers={"Content-Type": "application/json"},
            body=msgspec.json.encode(review),
        )
        body = await self._send(request)
        return _decode(body, _Review, action).status.allowed

    async def request(
        self, action: Action, path: str, *, method: str = "GET", body: bytes | None = None
    ) -> bytes:
        """Return the answer to a request about one object; a body is sent as JSON."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        return await self._send(_Request(action, path, method=method, headers=headers, body=body))

    async def _send(self, request: _Request) -> bytes:
        """Return the body of a success, tried once more with fresh credentials after a 401."""
        try:
            try:
                return await self._attempt(request)
            except ClusterUnauthorized:
                return await self._attempt(request)
        except AccessError as error:
            raise ClusterUnauthorized(f"cannot {request.action}: {error}") from None

    async def _attempt(self, request: _Request) -> bytes:
        identity = await self._access.credentials.identity()
        try:
            status, retry_after, body = await self._exchange(request, identity)
        except TRANSPORT_ERRORS as error:
            raise transport_error(error, request.action, self._access) from None
        if status in SUCCESSES:
            return body
        if status == 401:
            self._access.credentials.rejected(identity)
        origin = self._access.origin
        raise cluster_error(
            request.action, status, decode_status(body), retry_after=retry_after, origin=origin
        )

    async def _exchange(self, request: _Request, identity: Identity) -> tuple[int, str, bytes]:
        """Return status, Retry-After and body: all of a success, the beginning of a refusal."""
        if self._session is None:
            raise RuntimeError("KubeClient is used outside `async with`")
        context = self._access.ssl_context(identity)
        async with self._session.request(
            request.method,
            f"{self._access.server}{request.path}",
            params=request.query,
            headers={**request.headers, **identity.headers()},
            data=request.body,
            allow_redirects=False,
            proxy=self._access.proxy,
            ssl=context if context is not None else True,
            server_hostname=self._access.server_hostname,
        ) as response:
            body = await (response.read() if response.status in SUCCESSES else _head(response.content))
            return response.status, response.headers.get("Retry-After", ""), body


async def _head(stream: aiohttp.StreamReader) -> bytes:
    """Read a refusal's body, as far as it is worth reading."""
    kept = bytearray()
    while len(kept) < REFUSAL_LIMIT and (chunk := await stream.read(REFUSAL_LIMIT)):
        kept += chunk
    return bytes(kept)


def _decode(body: bytes, kind: type[AnswerT], action: Action) -> AnswerT:
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError):
        raise ClusterRefused(f"cannot {action}: the answer is not what was asked for", 200) from None
