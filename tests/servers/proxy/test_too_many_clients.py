"""More clients than there is room for, and clients that read nothing: who keeps a connection and a place."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from k8s_consul_registrar.proxy.config import ProxyTiming
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.rotating import bearer_tokens
from support.proxy_lab import (
    PLAIN,
    Answer,
    Connection,
    Kubelet,
    Proxy,
    always,
    answer,
    cadvisor,
    get_request,
    parse_answer,
    proxying,
    transport_of,
)
from support.waiting import PATIENCE, SLACK, unless_late, until

pytestmark = pytest.mark.both_loops

TOKEN = "Authorization: Bearer secret"
TIMEOUT = "X-Prometheus-Scrape-Timeout-Seconds"
BIG = b"a 1\n" * 2_000_000


@contextlib.asynccontextmanager
async def guarded(
    folder: Path, most: int, timing: ProxyTiming | None = None
) -> AsyncIterator[tuple[Kubelet, Proxy]]:
    """Run a kubelet and a proxy that asks for a token and has room for `most` connections."""
    file = folder / "token"
    file.write_text("secret\n")
    inbound = bearer_tokens(file, "PROXY_BEARER_TOKEN_FILE")
    async with (
        Kubelet().serving() as kubelet,
        proxying(kubelet.node(), inbound=inbound, max_clients=most, timing=timing) as proxy,
    ):
        yield kubelet, proxy


async def ask(connection: Connection, target: str, *headers: str) -> Answer:
    """Ask over a connection that stays open."""
    reader, writer = connection
    writer.write(get_request(target, *headers))
    async with asyncio.timeout(PATIENCE):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return parse_answer(head + await reader.readexactly(length))


@pytest.mark.parametrize(
    ("room", "attackers"), [(40, 60), pytest.param(4096, 4200, marks=[pytest.mark.long])]
)
@pytest.mark.parametrize("asks", [True, False])
async def test_authorized_scrapes_beside_too_many_anonymous_connections(
    tmp_path: Path, room: int, attackers: int, asks: bool
) -> None:
    """Serves 12 of 12 authorized scrapes of the attackers' own address, and keeps its kept connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < 2 * attackers + 500:
        pytest.skip("the system allows too few open files")
    try:
        async with guarded(tmp_path, room) as (kubelet, proxy):
            with capture_logs() as logs:
                kept = await proxy.connect()
                assert (await ask(kept, cadvisor(kubelet), TOKEN)).status == 200
                for _ in range(attackers):
                    _, writer = await proxy.connect()
                    if asks:
                        writer.write(get_request("/x"))
                for _ in range(12):
                    assert (await proxy.get(cadvisor(kubelet), TOKEN)).status == 200
                assert (await ask(kept, cadvisor(kubelet), TOKEN)).status == 200
                stats = proxy.server.stats()
                assert stats.evicted >= attackers - room
                assert stats.denied == 0
                assert stats.callers <= room + 100  # those given way are still on their way out
                await until(lambda: any("too many connections" in entry["event"] for entry in logs))
                assert len([entry for entry in logs if "too many" in entry["event"]]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_on_an_open_port_a_connection_that_scraped_outlasts_others() -> None:
    """Lets connections that never had a 200 give way first where no client has credentials."""
    async with Kubelet().serving() as kubelet, proxying(kubelet.node(), max_clients=10) as proxy:
        kept = await proxy.connect()
        assert (await ask(kept, cadvisor(kubelet))).status == 200
        others = [await proxy.connect() for _ in range(30)]
        assert (await ask(kept, cadvisor(kubelet))).status == 200
        assert (await ask(others[-1], cadvisor(kubelet))).status == 200


async def test_connections_with_scrapes_under_way_do_not_give_way() -> None:
    """Denies a connection, and counts that, only where every other one has a scrape under way."""
    gate = asyncio.Event()

    async def wait(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await gate.wait()
        writer.write(answer())

    async with Kubelet(wait).serving() as kubelet, proxying(kubelet.node(), max_clients=3) as proxy:
        scrapes = [asyncio.create_task(proxy.get(cadvisor(kubelet))) for _ in range(3)]
        await until(lambda: len(kubelet.requests) == 3)
        assert await proxy.attack(get_request(cadvisor(kubelet))) == b""
        assert proxy.server.stats().denied == 1
        gate.set()
        assert [scrape.status for scrape in await asyncio.gather(*scrapes)] == [200] * 3


@pytest.mark.parametrize(("target", "headers"), [("/nothing", (TOKEN,)), ("/nothing", ())])
async def test_denied_connection_is_closed_soon_unless_it_ever_scraped(
    tmp_path: Path, target: str, headers: tuple[str, ...]
) -> None:
    """Closes a connection some seconds after a 401 or 404, and one that had a 200 not before it is idle for long."""
    timing = ProxyTiming(tick=0.05, denied_keep_alive=0.3)
    async with guarded(tmp_path, 10, timing) as (kubelet, proxy):
        kept, denied = await proxy.connect(), await proxy.connect()
        assert (await ask(kept, cadvisor(kubelet), TOKEN)).status == 200
        for connection in (kept, denied):
            assert (await ask(connection, target, *headers)).status in (401, 404)
        async with asyncio.timeout(PATIENCE):
            assert await denied[0].read() == b""
        assert (await ask(kept, cadvisor(kubelet), TOKEN)).status == 200


async def test_a_replaced_token_ends_the_trust_in_a_connection(tmp_path: Path) -> None:
    """Lets a connection whose token no longer counts give way like an anonymous one."""
    async with guarded(tmp_path, 3) as (kubelet, proxy):
        kept = await proxy.connect()
        assert (await ask(kept, cadvisor(kubelet), TOKEN)).status == 200
        assert (await ask(kept, cadvisor(kubelet), "Authorization: Bearer old")).status == 401
        for _ in range(5):
            await proxy.connect()
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionResetError):
                assert await kept[0].read() == b""


# Clients that read nothing


async def big(
    kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer with more than the system's buffers hold."""
    writer.write(PLAIN + b"Content-Length: %d\r\n\r\n" % len(BIG) + BIG)
    await writer.drain()


async def never_reading(proxy: Proxy, kubelet: Kubelet) -> None:
    """Ask for a big answer and read none of it."""
    _, writer = await proxy.connect()
    transport_of(writer).pause_reading()
    writer.write(get_request(cadvisor(kubelet), f"{TIMEOUT}: 100"))


@pytest.mark.parametrize(
    ("places", "clients"),
    [(Concurrency(per_node=2), 10), pytest.param(Concurrency(), 40, marks=[pytest.mark.long])],
)
async def test_scrapes_beside_clients_that_never_read(places: Concurrency, clients: int) -> None:
    """Serves 5 of 5 scrapes of a node whose places were all taken by clients that read nothing."""
    async with Kubelet(big).serving() as kubelet, proxying(kubelet.node(), concurrency=places) as proxy:
        for _ in range(clients):
            await never_reading(proxy, kubelet)
        await asyncio.sleep(2)
        for _ in range(5):
            got = await proxy.get(cadvisor(kubelet), f"{TIMEOUT}: {10 + SLACK:g}")
            assert (got.status, len(got.body)) == (200, len(BIG))
        assert proxy.server.stats().outcomes[Outcome.CALLER_STALLED] > 0


async def drip(proxy: Proxy, kubelet: Kubelet) -> None:
    """Ask for a big answer and read it in small pieces, several a second, until it is cut."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock, contextlib.suppress(ConnectionError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_000)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", proxy.port))
        await loop.sock_sendall(sock, get_request(cadvisor(kubelet), f"{TIMEOUT}: 100"))
        while await loop.sock_recv(sock, 32_000):
            await asyncio.sleep(0.05)


async def test_scrapes_beside_clients_that_read_slowly() -> None:
    """Serves 5 of 5 scrapes of a node whose places were taken by clients that read a little again and again.

    The system takes a third of its buffer before it reports room, so a client that drips is stalled for long.
    """
    places = Concurrency(per_node=2)
    async with Kubelet(big).serving() as kubelet, proxying(kubelet.node(), concurrency=places) as proxy:
        drips = [asyncio.create_task(drip(proxy, kubelet)) for _ in range(10)]
        await until(lambda: proxy.server.stats().waiting == 8)
        await asyncio.sleep(2)
        for _ in range(5):
            got = await proxy.get(cadvisor(kubelet), f"{TIMEOUT}: {10 + SLACK:g}")
            assert (got.status, len(got.body)) == (200, len(BIG))
        assert proxy.server.stats().outcomes[Outcome.CALLER_STALLED] > 0
        for each in drips:
            each.cancel()
        await asyncio.gather(*drips, return_exceptions=True)


async def test_an_answer_that_is_not_read_gives_way_once_its_scrape_is_done() -> None:
    """Makes room for another client at the limit while the end of a closing connection's answer waits unread."""
    body = b"a 1\n" * 15_000
    async with (
        Kubelet(always(answer(body))).serving() as kubelet,
        proxying(kubelet.node(), max_clients=1) as proxy,
    ):
        (_, writer), _ = await proxy.connect_slow()
        writer.write(get_request(cadvisor(kubelet), "Connection: close"))
        await until(lambda: proxy.server.stats().outcomes[Outcome.OK] == 1)
        assert (await proxy.get(cadvisor(kubelet))).body == body
        assert proxy.server.stats().evicted == 1


async def test_a_client_that_reads_nothing_is_aborted() -> None:
    """Gives the place of a scrape back once its client has read nothing for some seconds, though none waits for it."""
    timing = ProxyTiming(tick=0.05, unread=0.5)
    async with Kubelet(big).serving() as kubelet, proxying(kubelet.node(), timing=timing) as proxy:
        await never_reading(proxy, kubelet)
        await kubelet.left.wait()
        stats = proxy.server.stats()
        assert (stats.running, stats.outcomes[Outcome.CALLER_STALLED]) == (0, 1)
        assert proxy.server.failures() == []  # the kubelet did nothing wrong


async def test_a_slow_client_that_reads_is_not_aborted() -> None:
    """Goes on with a client that takes longer in all, as long as it takes what waits for it in time."""

    async def attempt(stretch: int) -> None:
        timing = ProxyTiming(tick=0.05, unread=1.0 * stretch)
        async with Kubelet(big).serving() as kubelet, proxying(kubelet.node(), timing=timing) as proxy:
            (reader, writer), _ = await proxy.connect_slow(tiny_buffers=False)
            writer.write(get_request(cadvisor(kubelet), f"{TIMEOUT}: 100"))
            transport_of(writer).resume_reading()
            await reader.readuntil(b"\r\n\r\n")
            left = len(BIG)
            while left:
                left -= len(piece := await reader.read(min(left, 400_000)))
                assert piece, "it was cut"
                await asyncio.sleep(0.1 * stretch)

    await unless_late(attempt, by=0.3)
