"""The reading verbs of the sandbox's Kubernetes API: get, list and watch."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator

import msgspec
from aiohttp import web

from k8s_consul_registrar.sandbox import api_errors
from k8s_consul_registrar.sandbox.access import Attempt
from k8s_consul_registrar.sandbox.listing import Page, list_page
from k8s_consul_registrar.sandbox.resources import Resource
from k8s_consul_registrar.sandbox.selection import Selection, parse_fields, parse_labels
from k8s_consul_registrar.sandbox.server import GZIP, accepts_gzip
from k8s_consul_registrar.sandbox.store import HistoryExpiredError, Store, Stored
from k8s_consul_registrar.sandbox.watching import (
    WatchOptions,
    bookmark,
    change_events,
    error_event,
    initial_events,
    parse_options,
)

_CHUNK = 256 * 1024
_GZIP_FROM = 128 * 1024  # bytes; apiserver `pkg/endpoints/handlers/responsewriters/writers.go`
_LONGEST_WATCH = 1800.0  # seconds; `--min-request-timeout`


def selection_of(request: web.Request, attempt: Attempt) -> Selection:
    """Return the selection of a list or watch request; ApiError 400 for a bad selector."""
    return Selection(
        namespace=attempt.namespace,
        labels=parse_labels(request.query.get("labelSelector", "")),
        fields=parse_fields(request.query.get("fieldSelector", ""), attempt.resource),
    )


def object_body(resource: Resource, stored: Stored) -> bytes:
    """Return the response to a request for one object."""
    return resource.type_prefix + stored.body[1:] + b"\n"


class Reader:
    """The reading side of the API server over one store.

    `bookmark_period` is in seconds; `can_stream_lists` is the feature gate WatchList.
    """

    def __init__(self, store: Store, *, bookmark_period: float, can_stream_lists: bool) -> None:
        self._store = store
        self._bookmark_period = bookmark_period
        self._can_stream_lists = can_stream_lists

    def get(self, attempt: Attempt) -> bytes:
        """Return one object; ApiError 404 if there is none."""
        resource = attempt.resource
        stored = self._store.get(resource, resource.key(attempt.namespace, attempt.name))
        if stored is None:
            raise api_errors.not_found(resource, attempt.name)
        return object_body(resource, stored)

    async def list(self, request: web.Request, attempt: Attempt) -> web.StreamResponse:
        """Send a list from the stored bytes of its objects, in chunks, compressed if it is large."""
        page = list_page(self._store, attempt.resource, selection_of(request, attempt), request.query)
        response = _json_stream()
        chunks = _chunks(_list_parts(attempt.resource, page))
        size = sum(len(stored.body) for stored in page.items)
        if size >= _GZIP_FROM and accepts_gzip(request):
            response.headers.update({"Content-Encoding": "gzip", "Vary": "Accept-Encoding"})
            chunks = _gzipped(chunks)
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        await response.write_eof()
        return response

    async def watch(self, request: web.Request, attempt: Attempt) -> web.StreamResponse:
        """Send events as they happen, until the watch times out or its history is lost."""
        selection = selection_of(request, attempt)
        options = parse_options(request.query, can_stream_lists=self._can_stream_lists)
        if options.starts_with_state and options.version > self._store.revision:
            raise api_errors.too_large(options.version, self._store.revision)
        response = _json_stream()
        await response.prepare(request)
        try:
            async with asyncio.timeout(options.timeout or _LONGEST_WATCH):
                async for chunk in self._events(attempt.resource, selection, options):
                    await response.write(chunk)
        except TimeoutError:
            pass
        await response.write_eof()
        return response

    async def _events(
        self, resource: Resource, selection: Selection, options: WatchOptions
    ) -> AsyncIterator[bytes]:
        store, epoch, position = self._store, self._store.epoch, options.version
        changed = asyncio.Event()
        unsubscribe = store.subscribe(changed.set)
        try:
            if options.starts_with_state:
                position = store.revision
                state = [stored for stored in store.select(resource) if selection.matches(stored)]
                for chunk in _chunks(initial_events(resource, state)):
                    yield chunk
                if options.ends_state_with_bookmark:
                    yield bookmark(resource, position, ends_state=True)
            while store.epoch == epoch:  # a restored server closes its watches
                changed.clear()
                try:
                    changes = store.changes(resource, since=position)
                except HistoryExpiredError as error:
                    yield error_event(api_errors.too_old(position, error.oldest))
                    return
                position = max(position, store.revision)
                for chunk in _chunks(change_events(resource, changes, selection)):
                    yield chunk
                if await self._is_quiet(changed) and options.wants_bookmarks and position <= store.revision:
                    yield bookmark(resource, position)
        finally:
            unsubscribe()

    async def _is_quiet(self, changed: asyncio.Event) -> bool:
        """Wait for a change and return False, or return True once a bookmark is due."""
        try:
            async with asyncio.timeout(self._bookmark_period):
                await changed.wait()
        except TimeoutError:
            return True
        return False


def _json_stream() -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.enable_chunked_encoding()
    return response


def _list_parts(resource: Resource, page: Page) -> Iterator[bytes]:
    head = f'{{"kind":"{resource.kind}List","apiVersion":"{resource.api_version}","metadata":'
    yield head.encode() + msgspec.json.encode(page.metadata) + b',"items":['
    separator = b""
    for stored in page.items:
        yield separator + stored.body
        separator = b","
    yield b"]}\n"


def _chunks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Join small parts into chunks."""
    gathered: list[bytes] = []
    size = 0
    for part in parts:
        gathered.append(part)
        size += len(part)
        if size >= _CHUNK:
            yield b"".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)


def _gzipped(chunks: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(1, wbits=GZIP)
    for chunk in chunks:
        if data := compressor.compress(chunk):
            yield data
    yield compressor.flush()
