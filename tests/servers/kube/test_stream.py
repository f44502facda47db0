"""`kube.client` reading what does not come at once: watches, pages on their way, and a server's present version."""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import (
    ClusterExpired,
    ClusterForbidden,
    ClusterRefused,
    ClusterSilent,
    ClusterUnreachable,
)
from k8s_consul_registrar.kube.access import Access
from k8s_consul_registrar.kube.client import SLICE, KubeClient
from k8s_consul_registrar.kube.credentials import ClientIdentity, StoredCredentials
from k8s_consul_registrar.kube.objects import Bookmark, Broken, Changed, Deleted, WatchDecoder, WatchEvent
from k8s_consul_registrar.model import Kind
from servers.kube.test_client import serve
from support.files import recorded
from support.scripted import (
    ApiAnswer,
    ScriptedApi,
    Stream,
    bookmark_object,
    cuts,
    ends,
    list_answer,
    pod_object,
    serving_api,
    status_object,
)
from support.waiting import PATIENCE, SLACK, unless_late

TIMING = Timing(
    connect_timeout=20.0, read_timeout=20.0, watch_silence=5.0
)  # no test waits for it, even on a busy machine
ANONYMOUS = StoredCredentials(ClientIdentity())


@asynccontextmanager
async def client_of(url: str, timing: Timing = TIMING) -> AsyncIterator[KubeClient]:
    """Open a client."""
    async with KubeClient(Access(url, ANONYMOUS), timing) as client:
        yield client


async def watched(client: KubeClient, *, version: str = "7") -> list[WatchEvent]:
    """Watch Pods to the end."""
    batches = client.watch(Kind.POD, resource_version=version, timeout_seconds=9)
    async with aclosing(batches):
        return [event async for batch in batches for event in batch]


@pytest.mark.parametrize(
    "name", ["k8s-pods-watch", "k8s-pods-watch-initial-events", "k8s-pods-watch-expired"]
)
@pytest.mark.parametrize("size", [1, 997, 1 << 20])
async def test_recorded_watches_however_they_are_cut(name: str, size: int) -> None:
    """The recorded bytes come out as the decoder alone gives them, byte by byte as in one piece."""
    body = recorded(name).body

    async def replay(stream: Stream) -> None:
        for start in range(0, len(body), size):
            await stream.write(body[start : start + size])

    api = ScriptedApi()
    api.watches.append(replay)
    async with serving_api(api), client_of(api.url) as client:
        events = await watched(client)
    expected = WatchDecoder(Kind.POD).feed(body)
    assert [_told(event) for event in events] == [_told(event) for event in expected]


def _told(event: WatchEvent) -> object:
    return str(event.error) if isinstance(event, Broken) else event


async def test_compressed_watch_is_read_as_it_comes() -> None:
    """Flushed bytes are decoded at once, not when the stream ends."""
    decoded = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        assert request.headers["Accept-Encoding"] == "gzip"
        response = web.StreamResponse(headers={"Content-Encoding": "gzip"})
        await response.prepare(request)
        compressor = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
        line = json.dumps({"type": "ADDED", "object": pod_object("a")}).encode() + b"\n"
        await response.write(compressor.compress(line) + compressor.flush(zlib.Z_SYNC_FLUSH))
        await decoded.wait()
        await response.write(compressor.flush())
        return response

    async with serve(handle) as port, client_of(f"http://127.0.0.1:{port}") as client:
        count = 0
        async for batch in client.watch(Kind.POD, resource_version="1", timeout_seconds=9):
            count += len(batch)
            if batch:
                decoded.set()
        assert count == 1


async def test_first_batch_says_that_the_watch_was_taken() -> None:
    """It is empty and comes before any event does."""
    api = ScriptedApi()
    async with serving_api(api), client_of(api.url) as client:
        batches = client.watch(Kind.POD, resource_version="1", timeout_seconds=9)
        async with aclosing(batches), asyncio.timeout(PATIENCE):
            assert await anext(batches) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ApiAnswer(401, status_object(401)), "ClusterUnauthorized"),
        (ApiAnswer(403, status_object(403)), "ClusterForbidden"),
        (ApiAnswer(410, status_object(410)), "ClusterExpired"),
        (ApiAnswer(429, status_object(429)), "ClusterBusy"),
        (ApiAnswer(400, status_object(400)), "ClusterRefused"),
    ],
)
async def test_refused_watch_is_the_error_it_would_be_elsewhere(answer: ApiAnswer, expected: str) -> None:
    """Before the first batch, by name."""
    api = ScriptedApi()
    api.watches.extend([answer, answer])
    async with serving_api(api), client_of(api.url) as client:
        with pytest.raises(Exception, match="cannot watch pods at the cluster scope") as caught:
            await watched(client)
    assert type(caught.value).__name__ == expected


async def test_watch_ends_by_its_server_or_breaks() -> None:
    """A clean end is an end; a cut is unreachable, and what came before it was given."""
    api = ScriptedApi()
    api.watches.extend([ends(("ADDED", pod_object("a"))), cuts(("DELETED", pod_object("a")))])
    async with serving_api(api), client_of(api.url) as client:
        (added,) = await watched(client)
        assert isinstance(added, Changed)
        given: list[WatchEvent] = []
        with pytest.raises(ClusterUnreachable):  # noqa: PT012 - the break comes in the loop
            async for batch in client.watch(Kind.POD, resource_version="1", timeout_seconds=9):
                given.extend(batch)
        assert [type(event) for event in given] == [Deleted]


async def test_silence_ends_a_watch_and_blank_lines_are_silence() -> None:
    """Only events and bookmarks count; each begins the wait again."""
    loop = asyncio.get_running_loop()

    async def attempt(stretch: int) -> None:
        async def blank(stream: Stream) -> None:
            await asyncio.sleep(1.0 * stretch)
            await stream.send(("BOOKMARK", bookmark_object(8)))
            while True:
                await stream.write(b"\n")
                await asyncio.sleep(0.05)

        api = ScriptedApi()
        api.watches.append(blank)
        began = loop.time()
        timing = replace(TIMING, watch_silence=2.0 * stretch)
        async with serving_api(api), client_of(api.url, timing) as client, asyncio.timeout(PATIENCE):
            with pytest.raises(ClusterSilent, match=f"neither event nor bookmark for {2 * stretch} s"):
                await watched(client)
        assert 2.9 * stretch <= loop.time() - began < 4.0 * stretch + SLACK

    await unless_late(attempt, by=0.5)


async def test_server_that_never_answers_a_watch_is_unreachable() -> None:
    """The read timeout bounds the wait for the response's head."""

    async def mute(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    timing = replace(TIMING, connect_timeout=5.0, read_timeout=0.4)
    async with (
        serve(mute) as port,
        client_of(f"http://127.0.0.1:{port}", timing) as client,
        asyncio.timeout(PATIENCE),
    ):
        with pytest.raises(ClusterUnreachable, match="took too long"):
            await watched(client)


async def test_page_is_given_while_the_next_is_on_its_way() -> None:
    """The second request is at the server before the first page was used."""
    second_asked = asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        if "continue" in request.query:
            second_asked.set()
            body = recorded("k8s-pods-list-page2").body.replace(b'"continue"', b'"was-continue"')
            return web.Response(body=body)
        return web.Response(body=recorded("k8s-pods-list-page1").body)

    async with serve(handle) as port, client_of(f"http://127.0.0.1:{port}") as client:
        pages = client.pages(Kind.POD)
        async with aclosing(pages), asyncio.timeout(PATIENCE):
            assert len((await anext(pages)).items) == 4
            await second_asked.wait()
            assert len((await anext(pages)).items) == 4


@pytest.mark.parametrize("is_failing", [False, True])
async def test_list_given_up_leaves_no_request_behind(is_failing: bool) -> None:
    """Nor a failure that is never reported."""
    given_up = asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        if "continue" not in request.query:
            return web.Response(body=recorded("k8s-pods-list-page1").body)
        if is_failing:
            return web.Response(status=500)
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()
        raise AssertionError

    async with serve(handle) as port, client_of(f"http://127.0.0.1:{port}") as client:
        pages = client.pages(Kind.POD)
        await anext(pages)
        await asyncio.sleep(0.1)
        async with asyncio.timeout(PATIENCE):
            await pages.aclose()
        assert not any("_send" in repr(task) for task in asyncio.all_tasks())


async def test_present_version_is_that_of_a_list_of_one() -> None:
    """The most recent one, whatever the namespace holds; refusals have their own errors."""
    api = ScriptedApi()
    api.probes.extend(
        [list_answer("9"), ApiAnswer(410, status_object(410)), ApiAnswer(403, status_object(403))]
    )
    api.probes.extend([ApiAnswer(200, {"kind": "Other"}), list_answer("")])
    async with serving_api(api), client_of(api.url) as client:
        assert await client.current_version(Kind.POD, namespace="n") == "9"
        for expected in (ClusterExpired, ClusterForbidden, ClusterRefused, ClusterRefused):
            with pytest.raises(expected):
                await client.current_version(Kind.POD)
    assert api.queries("probe")[0] == {"limit": "1"}


async def test_list_is_given_in_parts_that_leave_the_loop_its_turn() -> None:
    """A whole list of thousands comes as many parts of one version."""
    api = ScriptedApi(pods=[pod_object(f"p{number}") for number in range(2 * SLICE + 1)])
    async with serving_api(api), client_of(api.url) as client:
        pages = [page async for page in client.pages(Kind.POD, page_size=None)]
        assert [len(page.items) for page in pages] == [SLICE, SLICE, 1]
        assert {page.resource_version for page in pages} == {"100"}
        api.pods = []
        assert [len(page.items) async for page in client.pages(Kind.POD)] == [0]
    assert "limit" not in api.queries("list")[0]


async def test_many_watches_leave_room_for_requests() -> None:
    """A connection for each of two hundred namespaces, and still one for a question."""
    api = ScriptedApi()
    async with serving_api(api), client_of(api.url) as client:
        watches = [
            client.watch(Kind.POD, namespace=f"n-{number}", resource_version="1", timeout_seconds=9)
            for number in range(200)
        ]
        async with asyncio.timeout(PATIENCE):
            for batches in watches:
                await anext(batches)
            assert await client.current_version(Kind.POD) == "100"
            for batches in watches:
                await batches.aclose()


def test_bookmark_with_null_containers_only_moves_the_version() -> None:
    """As the real server sends it."""
    (only,) = WatchDecoder(Kind.POD).feed(
        json.dumps({"type": "BOOKMARK", "object": bookmark_object(354)}).encode() + b"\n"
    )
    assert only == Bookmark("354")
