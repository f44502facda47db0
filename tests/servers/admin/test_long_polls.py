"""Requests that wait for a change: when they are answered, and how few of them there can be."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import aiohttp
import pytest

from k8s_consul_registrar.admin.http_sd import MOST_WAITING, SD_PATH, HttpSdServer
from k8s_consul_registrar.admin.saved_state import SavedState, decode_state
from support.seen import Registrar, pod_target
from support.waiting import PATIENCE, SLACK, until
from unit.admin.test_saved_state import ORIGIN, encoded

pytestmark = pytest.mark.both_loops


class Answer(NamedTuple):
    """An answer and the seconds it took."""

    status: int
    body: bytes
    etag: str
    cluster: str
    seconds: float


class Collector:
    """A client that asks one server, each time on a connection of its own."""

    def __init__(self, server: HttpSdServer, session: aiohttp.ClientSession) -> None:
        self._url = f"http://127.0.0.1:{server.port}{SD_PATH}"
        self._session = session

    async def ask(self, etag: str = "", wait: str = "", more: str = "") -> Answer:
        """Ask once."""
        headers = {"If-None-Match": etag} if etag else {}
        query = "&".join(filter(None, (f"wait={wait}" if wait else "", more)))
        begun = time.monotonic()
        async with self._session.get(f"{self._url}?{query}", headers=headers) as response:
            body = await response.read()
            found = response.headers.get("ETag", ""), response.headers.get("X-Registrar-Cluster", "")
            return Answer(response.status, body, *found, time.monotonic() - begun)


@asynccontextmanager
async def collecting(server: HttpSdServer) -> AsyncIterator[Collector]:
    """Return a collector of a server that runs."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE * 2)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with server, aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Collector(server, session)


def waiting_at(server: HttpSdServer) -> int:
    """Return the number of requests that wait."""
    return len(server.polls)


async def test_change_ends_the_wait_and_its_end_is_a_304() -> None:
    """Without a change 304 comes at the end; with one the new document comes soon."""
    registrar = Registrar()
    registrar.put(pod_target("a"))
    server = HttpSdServer(port=0, view=registrar)
    async with collecting(server) as collector:
        first = await collector.ask(wait="20s")
        assert (first.status, first.cluster) == (200, "lab")
        assert first.seconds < SLACK, "without If-None-Match there is nothing to wait for"
        ended = await collector.ask(first.etag, wait="0.3s")
        assert (ended.status, ended.etag) == (304, first.etag)
        assert ended.seconds >= 0.3
        waiting = asyncio.create_task(collector.ask(first.etag, wait="60s"))
        await until(lambda: waiting_at(server) == 1)
        registrar.put(pod_target("b"))
        changed = await waiting
        assert changed.status == 200
        assert len(json.loads(changed.body)) == 2
        assert (await collector.ask(first.etag, wait="60s")).status == 200, "what changed before is no wait"
        assert waiting_at(server) == 0


async def test_change_of_other_targets_does_not_end_the_wait() -> None:
    """A request for one namespace is not answered for the sake of another."""
    registrar = Registrar()
    registrar.put(pod_target("a"))
    server = HttpSdServer(port=0, view=registrar)
    async with collecting(server) as collector:
        first = await collector.ask(more="namespace=shop")
        waiting = asyncio.create_task(collector.ask(first.etag, "60s", "namespace=shop"))
        await until(lambda: waiting_at(server) == 1)
        registrar.put(pod_target("b", "search"))
        await until(lambda: registrar.walks >= 2)
        await asyncio.sleep(0.2)
        assert not waiting.done()
        registrar.put(pod_target("c"))
        assert len(json.loads((await waiting).body)) == 2


async def test_place_is_taken_from_the_request_that_has_waited_longest() -> None:
    """At the bound the longest waiting request is answered, no other is, and requests without a wait are served."""
    registrar = Registrar()
    server = HttpSdServer(port=0, view=registrar)
    async with collecting(server) as collector:
        etag = (await collector.ask()).etag
        longest = asyncio.create_task(collector.ask(etag, "60s"))
        await until(lambda: waiting_at(server) == 1)
        others = [asyncio.create_task(collector.ask(etag, "60s")) for _ in range(MOST_WAITING - 1)]
        await until(lambda: waiting_at(server) == MOST_WAITING)
        assert not longest.done()
        newest = asyncio.create_task(collector.ask(etag, "60s"))
        assert (await longest).status == 304
        assert waiting_at(server) <= MOST_WAITING
        assert (await collector.ask()).status == 200
        registrar.put(pod_target("a"))
        assert {answer.status for answer in await asyncio.gather(*others, newest)} == {200}


async def test_end_of_the_server_answers_those_that_wait() -> None:
    """A registrar that ends, and its rollout, wait for no poll."""
    server = HttpSdServer(port=0, view=Registrar())
    async with collecting(server) as collector:
        etag = (await collector.ask()).etag
        waiting = asyncio.create_task(collector.ask(etag, "60s"))
        await until(lambda: waiting_at(server) == 1)
        await server.__aexit__()
        assert (await waiting).status == 304


async def test_client_that_goes_away_gives_its_place_back() -> None:
    """Hundreds that ask and go leave nothing behind."""
    server = HttpSdServer(port=0, view=Registrar())
    async with collecting(server) as collector:
        etag = (await collector.ask()).etag
        going = [asyncio.create_task(collector.ask(etag, "60s")) for _ in range(20)]
        await until(lambda: waiting_at(server) == 20)
        for one in going:
            one.cancel()
        await until(lambda: waiting_at(server) == 0)


async def test_many_changes_are_rendered_once_a_second_for_those_that_wait() -> None:
    """A storm of changes is not a storm of documents, and its last change arrives."""
    registrar = Registrar()
    server = HttpSdServer(port=0, view=registrar)
    async with collecting(server) as collector:
        etag, begun, seen = (await collector.ask()).etag, time.monotonic(), 0

        async def change() -> None:
            for number in range(100):
                registrar.put(pod_target(f"web-{number}"))
                await asyncio.sleep(0.01)

        changing = asyncio.create_task(change())
        while seen < 100:
            answer = await collector.ask(etag, "20s")
            assert answer.status == 200
            etag, seen = answer.etag, len(json.loads(answer.body))
        await changing
        assert registrar.walks <= time.monotonic() - begun + 2


async def test_stale_targets_are_followed_by_those_that_were_listed() -> None:
    """A client that waits with the targets of an earlier process gets those of this one as soon as they are known."""
    before = Registrar()
    before.put(pod_target("a"))
    saved: SavedState | None = decode_state(encoded(before.targets(), at=time.time()), ORIGIN, time.time())
    registrar = Registrar(missing="pods are not listed yet")
    server = HttpSdServer(port=0, view=registrar, saved=lambda: saved)
    async with collecting(server) as collector:
        etag = (await collector.ask()).etag
        assert (await collector.ask(etag, "0.2s")).status == 304
        waiting = asyncio.create_task(collector.ask(etag, "60s"))
        await until(lambda: waiting_at(server) == 1)
        registrar.put(pod_target("b"))
        registrar.missing = ""
        (group,) = json.loads((await waiting).body)
        assert group["labels"]["__meta_consul_service_id"] == "pod--shop--b"


async def test_wrong_wait_is_a_400_with_words() -> None:
    """As every other mistake in a query."""
    async with collecting(HttpSdServer(port=0, view=Registrar())) as collector:
        for query in ("wait=1h", "wait=61s", "wait=1s&wait=2s", "labels=all", "shard=2&of=2"):
            answer = await collector.ask(more=query)
            assert answer.status == 400
            assert len(answer.body) > 20
