"""The questions we ask one API server."""

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import msgspec

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import (
    ClusterForbidden,
    ClusterRefused,
    ClusterSilent,
    ClusterUnstreamed,
)
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.exchange import Exchange, Request
from k8s_consul_registrar.kube.objects import Page, RawPage, split_page
from k8s_consul_registrar.kube.status import Action
from k8s_consul_registrar.kube.watch import RESOURCES, Bookmark, WatchDecoder, WatchEvent
from k8s_consul_registrar.model import Kind

PAGE_SIZE = 500
# What servers say that know no initial events, or have them switched off (feature gate WatchList).
UNSTREAMED = (400, 422)

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


class KubeClient:
    """Asks one API server; `async with` it.

    Every method raises a ClusterError. `streams_lists` says whether the server still may send a list as
    the initial events of a watch; it is False once it was seen not to.
    """

    def __init__(self, access: Access, timing: Timing) -> None:
        self._exchange = Exchange(access, timing)
        self._timing = timing
        self.streams_lists = True

    async def __aenter__(self) -> Self:
        await self._exchange.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exchange.__aexit__(kind, error, trace)

    async def pages(
        self, kind: Kind, *, namespace: str = "", label_selector: str = "", page_size: int = PAGE_SIZE
    ) -> AsyncGenerator[Page, None]:
        """Yield a complete, consistent list in pages, each decoded while the next one is on its way.

        ClusterExpired in the middle means that the snapshot is gone: what came so far is no list, begin
        afresh. `resourceVersion` is left unset: the list is as new as the request (Kubernetes API concepts,
        "Semantics for get and list").
        """
        action = Action("list", RESOURCES[kind], namespace)
        query = {"limit": str(page_size), **_selecting(label_selector)}
        coming: asyncio.Task[bytes] | None = None
        body = await self._exchange.send(Request(action, _path(kind, namespace), query))
        try:
            while True:
                raw = _split(body, kind, action)
                del body
                if not raw.continue_token:
                    yield raw.decode()
                    return
                if raw.continue_token == query.get("continue"):
                    raise ClusterRefused(f"cannot {action}: the API server repeats a page for ever", 200)
                query = {**query, "continue": raw.continue_token}
                coming = asyncio.create_task(
                    self._exchange.send(Request(action, _path(kind, namespace), query))
                )
                await asyncio.sleep(0)  # so that the request leaves before the decoding begins
                page = raw.decode()
                del raw
                yield page
                del page
                body = await coming
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)

    async def watch(
        self,
        kind: Kind,
        *,
        namespace: str = "",
        label_selector: str = "",
        resource_version: str = "",
        send_initial_events: bool = False,
        timeout_seconds: int,
    ) -> AsyncGenerator[list[WatchEvent], None]:
        """Yield what happens after a version, as it arrives, until the server ends the watch.

        With `send_initial_events` that begins with the whole state; a Bookmark tells its end. The first
        batch is empty: the server took the watch. Raises ClusterSilent when neither event nor bookmark came
        for `watch_silence`, ClusterUnstreamed when the initial events are refused, or fail to end
        (Kubernetes API concepts, "Efficient detection of changes" and "Streaming lists").
        """
        # Following takes both rights, so that both are named at once where one is missing.
        verb = "list and watch" if send_initial_events else "watch"
        action = Action(verb, RESOURCES[kind], namespace)
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(timeout_seconds),
            **_selecting(label_selector),
        }
        if send_initial_events:
            query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        if resource_version:
            query["resourceVersion"] = resource_version
        decoder = WatchDecoder(kind, namespace)
        pieces = self._exchange.stream(Request(action, _path(kind, namespace), query))
        is_initial = send_initial_events
        try:
            await anext(pieces)
            yield []
            while True:
                patience = self._timing.read_timeout if is_initial else self._timing.watch_silence
                events = await _next_events(pieces, decoder, patience, is_initial=is_initial)
                if events is None:
                    return
                is_initial = is_initial and not any(
                    isinstance(event, Bookmark) and event.ends_initial_events for event in events
                )
                yield events
        except TimeoutError:
            if is_initial:
                self.streams_lists = False
                raise ClusterUnstreamed(f"cannot {action}: the initial events do not end") from None
            silence = self._timing.watch_silence
            raise ClusterSilent(f"cannot {action}: neither event nor bookmark for {silence:g} s") from None
        except ClusterRefused as error:
            if send_initial_events and error.status in UNSTREAMED:
                self.streams_lists = False
                raise ClusterUnstreamed(str(error)) from None
            raise
        finally:
            await pieces.aclose()

    async def probe_version(
        self, kind: Kind, *, namespace: str = "", label_selector: str = "", resource_version: str
    ) -> None:
        """Make sure that the server's history contains a version; raises ClusterAhead where it does not.

        A watch from a version that lies in the server's future is answered by silence, so that is asked
        first (Kubernetes API concepts, "Resource versions").
        """
        query = {
            "limit": "1",
            "resourceVersion": resource_version,
            "resourceVersionMatch": "NotOlderThan",
            **_selecting(label_selector),
        }
        action = Action("list", RESOURCES[kind], namespace)
        body = await self._exchange.send(Request(action, _path(kind, namespace), query))
        _split(body, kind, action)

    async def namespace_uid(self, name: str) -> str | None:
        """Return the UID of a namespace, None where we may not see it or it is not there."""
        action = Action("get", "namespaces")
        try:
            body = await self._exchange.send(Request(action, f"/api/v1/namespaces/{quote(name, safe='')}"))
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
        return _decode(await self._exchange.send(Request(action, "/version")), _Version, action).git_version

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
        """Tell whether our credentials are allowed something (a SelfSubjectAccessReview)."""
        attributes = {
            "verb": verb,
            "resource": resource,
            "group": group,
            "subresource": subresource,
            "namespace": namespace,
            "name": name,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {key: value for key, value in attributes.items() if value}},
        }
        action = Action("create", "selfsubjectaccessreviews")
        request = Request(
            action,
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            method="POST",
            headers={"Content-Type": "application/json"},
            body=msgspec.json.encode(review),
        )
        body = await self._exchange.send(request)
        return _decode(body, _Review, action).status.allowed

    async def request(
        self, action: Action, path: str, *, method: str = "GET", body: bytes | None = None
    ) -> bytes:
        """Return the answer to a request about one object; a body is sent as JSON."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        return await self._exchange.send(Request(action, path, method=method, headers=headers, body=body))


async def _next_events(
    pieces: AsyncGenerator[bytes, None], decoder: WatchDecoder, patience: float, *, is_initial: bool
) -> list[WatchEvent] | None:
    """Return the next events, None at the end; raises TimeoutError when none come for so many seconds.

    While initial events are awaited a bookmark that does not end them is no progress: servers that ignore
    our asking for them send such.
    """
    async with asyncio.timeout(patience):
        async for piece in pieces:
            events = decoder.feed(piece)
            if is_initial:
                events = [one for one in events if not isinstance(one, Bookmark) or one.ends_initial_events]
            if events:
                return events
    return None


def _path(kind: Kind, namespace: str) -> str:
    scope = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
    return f"/api/v1{scope}/{RESOURCES[kind]}"


def _selecting(label_selector: str) -> dict[str, str]:
    return {"labelSelector": label_selector} if label_selector else {}


def _split(body: bytes, kind: Kind, action: Action) -> RawPage:
    try:
        return split_page(body, kind)
    except ClusterRefused as error:
        raise ClusterRefused(f"cannot {action}: {error}", error.status) from None


def _decode(body: bytes, kind: type[AnswerT], action: Action) -> AnswerT:
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError):
        raise ClusterRefused(f"cannot {action}: the answer is not what was asked for", 200) from None
