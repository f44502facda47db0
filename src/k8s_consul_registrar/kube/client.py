"""Requests to one API server: credentials on each, refusals and breaks as our error types."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.asyncio_tools import in_slices
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import (
    AccessError,
    ClusterError,
    ClusterForbidden,
    ClusterRefused,
    ClusterSilent,
    ClusterUnauthorized,
)
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.lists import Page, Paging, read_page
from k8s_consul_registrar.kube.objects import Item, WatchDecoder, WatchEvent
from k8s_consul_registrar.kube.responses import (
    RESOURCES,
    ApiAction,
    cluster_error,
    collection_path,
    decode_status,
    read_body,
    read_head,
    transport_error,
    unpacker,
)
from k8s_consul_registrar.model import EVERY_OBJECT, Kind, ObjectKey, Selector

# Half of kubectl's pages: a first sync holds 6 MB less at its peak and takes no longer.
PAGE_SIZE = 250
SLICE = 100  # objects decoded in one step; about 2 ms of work
# Bytes of a compressed body that are unpacked at once; a thread costs more.
SMALL = 1 << 14
SUCCESSES = (200, 201)
READ_SIZE = 1 << 18  # about a piece of a streamed body; large ones cost less per byte
JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
# `managedFields` are up to 60 % of an object. Servers that do not know the parameter ignore it (KEP-5958).
LEAN_JSON = "application/json;drop=metadata.managedFields, application/json;q=0.9"
HEADERS = {"Accept": JSON, "Accept-Encoding": "gzip", "User-Agent": "k8s-consul-registrar"}

AnswerT = TypeVar("AnswerT")


class _Metadata(msgspec.Struct):
    uid: str


class _Object(msgspec.Struct):
    metadata: _Metadata


class _Version(msgspec.Struct, rename="camel"):
    git_version: str


class _Review(msgspec.Struct):
    status: dict[str, object]


class _Request(msgspec.Struct, frozen=True):
    """One request; `path` begins after the server's own."""

    action: ApiAction
    path: str
    query: Mapping[str, str] = msgspec.field(default_factory=dict)
    method: str = "GET"
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    body: bytes | None = None


class KubeClient:
    """A client of one API server; `async with` it.

    Every method raises a ClusterError and nothing else. Environment proxies are ignored and redirects not
    followed: our credentials go only to the server of `access`.
    """

    def __init__(self, access: Access, timing: Timing) -> None:
        self._access = access
        self._timing = timing
        # An API server ends a request by itself after a minute (--request-timeout).
        self._timeout = aiohttp.ClientTimeout(
            total=timing.connect_timeout + 2 * timing.read_timeout,
            sock_connect=timing.connect_timeout,
            sock_read=timing.read_timeout,
        )
        # The watch's own limit on silence ends it first, so that the cause has its name.
        self._stream_timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=timing.connect_timeout,
            sock_read=timing.watch_silence + timing.connect_timeout,
        )
        self._session: aiohttp.ClientSession | None = None
        self._accept = LEAN_JSON

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # Each watch holds a connection; a limit could starve the requests between.
            connector=aiohttp.TCPConnector(limit=0),
            headers=HEADERS,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            read_bufsize=READ_SIZE,
            auto_decompress=False,  # a page is unpacked in a thread, while the one before is decoded
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._access.credentials.aclose()
        if self._session is not None:
            await self._session.close()

    async def pages(
        self,
        kind: Kind,
        *,
        namespace: str = "",
        selector: Selector = EVERY_OBJECT,
        page_size: int | None = PAGE_SIZE,
        verb: str = "list",
    ) -> AsyncGenerator[Page, None]:
        """Yield a complete, consistent list in parts, each decoded while the server's next page is on its way.

        ClusterExpired in the middle means that the snapshot is gone: what came so far is no list. Without a
        `page_size` the server answers with the whole list at once. `resourceVersion` stays unset: with 0 a
        server ignores the page size (Kubernetes API concepts, "Semantics for get and list"). `verb` names the
        rights that are missing when the list is denied.
        """
        action = ApiAction(verb, RESOURCES[kind], namespace)
        query = _selecting(selector) | ({} if page_size is None else {"limit": str(page_size)})
        request = self._reading(action, kind, query)
        paging = Paging(action)
        coming: asyncio.Task[bytes] | None = None
        body = await self._send(request)
        try:
            while True:
                raw = read_page(body, kind, action)
                del body
                if raw.continue_token:
                    paging.add(raw.decode(slice(1)).items)
                    request = replace(request, query={**query, "continue": raw.continue_token})
                    coming = asyncio.create_task(self._send(request))
                    await asyncio.sleep(0)  # so that the request leaves before the decoding begins
                # The page's bytes go before its objects are used, while the next page's are arriving.
                starts = range(0, len(raw.items) or 1, SLICE)
                parts = [raw.decode(slice(start, start + SLICE)) async for start in in_slices(starts, 1)]
                del raw
                for part in parts:
                    yield part
                if coming is None:
                    return
                body = await coming
                coming = None
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)

    async def watch(
        self,
        kind: Kind,
        *,
        namespace: str = "",
        selector: Selector = EVERY_OBJECT,
        resource_version: str,
        timeout_seconds: int,
    ) -> AsyncGenerator[list[WatchEvent], None]:
        """Yield what happens after a version, as it arrives, until the server ends the watch.

        The first batch is empty: the server has accepted the watch. Raises ClusterSilent when neither event
        nor bookmark came for `watch_silence` (Kubernetes API concepts, "Efficient detection of changes").
        """
        action = ApiAction("watch", RESOURCES[kind], namespace)
        query = {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_seconds)}
        query |= {"resourceVersion": resource_version, **_selecting(selector)}
        decoder = WatchDecoder(kind, namespace)
        pieces = self._stream(self._reading(action, kind, query))
        try:
            await anext(pieces)
            yield []
            while (events := await _next_events(pieces, decoder, self._timing.watch_silence)) is not None:
                yield events
        except TimeoutError:
            silence = self._timing.watch_silence
            raise ClusterSilent(f"cannot {action}: neither event nor bookmark for {silence:g} s") from None
        finally:
            await pieces.aclose()

    async def current_version(self, kind: Kind, *, namespace: str = "") -> str:
        """Return the version of the server's present state: that of a list of one object."""
        action = ApiAction("list", RESOURCES[kind], namespace)
        reading = self._reading(action, kind, {"limit": "1"})
        return read_page(await self._send(reading), kind, action).resource_version

    async def read_object(self, key: ObjectKey, selector: Selector = EVERY_OBJECT) -> Item | None:
        """Return an object as it is now, None where there is none; the right to list suffices.

        Without a selector an object that is no longer selected is found all the same. Raises a `ClusterError`.
        """
        action = ApiAction("list", RESOURCES[key.kind], key.namespace)
        fields = ",".join(filter(None, (f"metadata.name={_escaped(key.name)}", selector.fields)))
        query = _selecting(selector._replace(fields=fields))
        raw = read_page(await self._send(self._reading(action, key.kind, query)), key.kind, action)
        items = raw.decode().items
        found = next((item for item in items if item.key == key), None)
        if found is None and (items or raw.continue_token):
            raise ClusterRefused(f"cannot {action}: the answer is about other objects than {key}", 200)
        return found

    async def namespace_uid(self, name: str) -> str | None:
        """Return the UID of a namespace, None where we may not see it or it does not exist."""
        action = ApiAction("get", "namespaces")
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
        action = ApiAction("get", "/version")
        return _decode(await self._send(_Request(action, "/version")), _Version, action).git_version

    async def can_i(
        self,
        verb: str,
        resource: str,
        *,
        group: str = "",
        subresource: str = "",
        namespace: str = "",
        name: str = "",
    ) -> bool:
        """Return whether our credentials are allowed something (a SelfSubjectAccessReview)."""
        attributes = {"verb": verb, "resource": resource, "group": group, "subresource": subresource}
        attributes |= {"namespace": namespace, "name": name}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {key: value for key, value in attributes.items() if value}},
        }
        action = ApiAction("create", "selfsubjectaccessreviews")
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        body = await self.request(action, path, method="POST", body=msgspec.json.encode(review))
        return _decode(body, _Review, action).status.get("allowed") is True

    async def request(
        self, action: ApiAction, path: str, *, method: str = "GET", body: bytes | None = None
    ) -> bytes:
        """Return the answer to a request about one object; a body is sent as JSON."""
        headers = {} if body is None else {"Content-Type": MERGE_PATCH if method == "PATCH" else JSON}
        return await self._send(_Request(action, path, method=method, headers=headers, body=body))

    def _reading(self, action: ApiAction, kind: Kind, query: Mapping[str, str]) -> _Request:
        """Return a list or watch request of a kind, in the namespace of the action."""
        path = collection_path(kind, action.namespace)
        return _Request(action, path, query, headers={"Accept": self._accept})

    async def _send(self, request: _Request) -> bytes:
        """Return the whole body of a success."""
        async with self._success(request, self._timeout) as response:
            body, unpack = await read_body(response, request.action), unpacker(response)
            return await asyncio.to_thread(unpack, body) if len(body) > SMALL else unpack(body)

    async def _stream(self, request: _Request) -> AsyncGenerator[bytes, None]:
        """Yield the body of a success as it arrives: an empty piece first, once the head has come."""
        async with self._success(request, self._stream_timeout) as response:
            yield b""
            unpack = unpacker(response, is_part=True)
            while piece := await response.content.readany():
                yield unpack(piece)

    @asynccontextmanager
    async def _success(
        self, request: _Request, limits: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open a success; reading it may break too.

        A 401 is tried once more with fresh credentials, and a 406 once more with the plain media type.
        """
        try:
            try:
                response = await self._attempt(request, limits)
            except ClusterUnauthorized:
                response = await self._attempt(request, limits)
            except ClusterRefused as error:
                if error.status != 406 or request.headers.get("Accept") != LEAN_JSON:
                    raise
                self._accept = JSON
                plain = replace(request, headers={**request.headers, "Accept": JSON})
                response = await self._attempt(plain, limits)
            async with response:
                yield response
        except ClusterError:
            raise
        except AccessError as error:
            raise ClusterUnauthorized(f"cannot {request.action}: {error}") from None
        except Exception as error:
            raise transport_error(
                error, request.action, server=self._access.server, trust=self._access.trust
            ) from error

    async def _attempt(self, request: _Request, limits: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        """Return the response of a success, its body unread; raises the error that a refusal stands for."""
        if self._session is None:
            raise RuntimeError("KubeClient is used outside `async with`")
        identity = await self._access.credentials.identity()
        context = self._access.ssl_context(identity)
        # A head that never ends keeps the connection busy, so that no timeout of the socket ends it.
        async with asyncio.timeout(self._timeout.total):
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
            async with asyncio.timeout(self._timeout.total):
                head = await read_head(response.content)
            with suppress(aiohttp.ClientPayloadError):
                head = unpacker(response, is_part=True)(head)
            status = decode_status(head)
            raise cluster_error(
                request.action,
                response.status,
                status,
                retry_after=response.headers.get("Retry-After", ""),
                origin=self._access.origin,
            )


async def _next_events(
    pieces: AsyncGenerator[bytes, None], decoder: WatchDecoder, silence: float
) -> list[WatchEvent] | None:
    """Return the next events, None at the end; raises TimeoutError when none came for `silence` seconds."""
    async with asyncio.timeout(silence):
        async for piece in pieces:
            if events := decoder.feed(piece):
                return events
    return None


def _selecting(selector: Selector) -> dict[str, str]:
    query = {"labelSelector": selector.labels, "fieldSelector": selector.fields}
    return {name: text for name, text in query.items() if text}


def _escaped(name: str) -> str:
    """Return a value as field selectors take it (Kubernetes: `fields.EscapeValue`)."""
    return name.replace("\\", "\\\\").replace(",", "\\,").replace("=", "\\=")


def _decode(body: bytes, kind: type[AnswerT], action: ApiAction) -> AnswerT:
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError):
        raise ClusterRefused(f"cannot {action}: the answer is not what was asked for", 200) from None
