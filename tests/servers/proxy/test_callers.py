"""Callers that are slow, leave, or are many; deadlines, places, and the proxy's end."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from k8s_consul_registrar.errors import AccessError, SettingsError
from k8s_consul_registrar.proxy.config import ProxyConfig, ProxyTiming
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.nodes import NodeTable
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.server import listen
from k8s_consul_registrar.proxy.tls_stream import RECEIVE_SIZE
from k8s_consul_registrar.rotating import bearer_tokens
from support.proxy_lab import (
    METRICS,
    PLAIN,
    Behaviour,
    Kubelet,
    Proxy,
    always,
    answer,
    cadvisor,
    get_request,
    hang,
    proxying,
    reset_on_close,
    serve_metrics,
    transport_of,
)
from support.waiting import PATIENCE, SLACK, until

pytestmark = pytest.mark.both_loops

TIMEOUT = "X-Prometheus-Scrape-Timeout-Seconds"


@contextlib.asynccontextmanager
async def relaying(
    behave: Behaviour, concurrency: Concurrency | None = None
) -> AsyncIterator[tuple[Kubelet, Proxy]]:
    """Run one kubelet of this behaviour and a proxy in front of it."""
    kubelet = Kubelet(behave)
    async with kubelet.serving(), proxying(kubelet.node(), concurrency=concurrency) as proxy:
        yield kubelet, proxy


def outcomes(proxy: Proxy) -> dict[Outcome, int]:
    """Return what became of the requests so far, without the zeros."""
    return {outcome: count for outcome, count in proxy.server.stats().outcomes.items() if count}


async def test_kubelet_hangs() -> None:
    """Answers 504 slightly before the caller's own time is up, and ends the call to the kubelet."""
    async with relaying(hang) as (kubelet, proxy):
        begun = asyncio.get_running_loop().time()
        got = await proxy.get(cadvisor(kubelet), f"{TIMEOUT}: 1.5")
        took = asyncio.get_running_loop().time() - begun
        assert got.status == 504
        assert 1.3 < took < 1.5 + SLACK
        await kubelet.left.wait()
        assert outcomes(proxy) == {Outcome.TIMEOUT: 1}
        assert proxy.server.stats().running == 0


async def test_kubelet_trickles() -> None:
    """Resets the caller at the deadline where the answer has begun, however steadily it comes."""

    async def trickle(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(PLAIN + b"Content-Length: 100000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.02)

    async with relaying(trickle) as (kubelet, proxy):
        with pytest.raises(ConnectionResetError):
            await proxy.exchange(get_request(cadvisor(kubelet), f"{TIMEOUT}: 3"))
        await kubelet.left.wait()
        assert outcomes(proxy) == {Outcome.CUT: 1}


async def test_connect_timeout() -> None:
    """Answers 504 where no handshake comes about in the time for connecting, well before the deadline."""

    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(stay_silent, "127.0.0.1", 0)
    try:
        kubelet = Kubelet(port=server.sockets[0].getsockname()[1])
        async with proxying(kubelet.node(), timing=ProxyTiming(connect=0.2)) as proxy:
            got = await proxy.get(cadvisor(kubelet))
            assert got.status == 504
            assert b"no connection" in got.body
    finally:
        server.close()


async def test_connection_never_accepted() -> None:
    """Answers 504, and gives the dial up, where not even the connection's first packet is answered."""
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        kubelet = Kubelet(port=full.getsockname()[1])
        async with proxying(kubelet.node(), timing=ProxyTiming(connect=0.2)) as proxy:
            before = asyncio.all_tasks()
            got = await proxy.get(cadvisor(kubelet))
            assert got.status == 504
            assert b"no connection" in got.body
            await until(lambda: asyncio.all_tasks() <= before)


@pytest.mark.parametrize("with_reset", [True, False])
@pytest.mark.parametrize("has_begun", [True, False])
async def test_caller_leaves(with_reset: bool, has_begun: bool) -> None:
    """Ends the call to the kubelet at once when its caller leaves, before or amid the answer."""

    async def begin_and_hang(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if has_begun:
            writer.write(PLAIN + b"Content-Length: 100000\r\n\r\nx")
        await reader.read()

    async with relaying(begin_and_hang) as (kubelet, proxy):
        reader, writer = await proxy.connect()
        writer.write(get_request(cadvisor(kubelet)))
        if has_begun:
            await reader.readuntil(b"\r\n\r\n")
        await until(lambda: len(kubelet.requests) == 1)
        if with_reset:
            reset_on_close(writer)
        else:
            writer.close()
        async with asyncio.timeout(PATIENCE):
            await kubelet.left.wait()
        await until(lambda: outcomes(proxy) == {Outcome.CALLER_LEFT: 1})
        assert proxy.server.stats().running == 0


async def test_caller_leaves_while_dialling() -> None:
    """Gives the dial up with the caller that asked for it."""

    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_dialled.set()
        heard.append(await reader.read(-1))
        writer.close()

    is_dialled = asyncio.Event()
    heard: list[bytes] = []
    server = await asyncio.start_server(stay_silent, "127.0.0.1", 0)
    try:
        kubelet = Kubelet(port=server.sockets[0].getsockname()[1])
        async with proxying(kubelet.node()) as proxy:
            _, writer = await proxy.connect()
            writer.write(get_request(cadvisor(kubelet)))
            await until(lambda: proxy.server.stats().running == 1)
            await is_dialled.wait()
            writer.close()
            await until(lambda: len(heard) == 1)
            assert proxy.server.stats().running == 0
    finally:
        server.close()


async def test_slow_reader() -> None:
    """Reads from the kubelet no faster than its caller takes, and loses nothing of it."""
    body = bytes(range(256)) * 4 * 16 * 1024  # 16 MB
    handed = 0

    async def pour(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal handed
        writer.write(PLAIN + b"Content-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 65536):
            writer.write(body[start : start + 65536])
            await writer.drain()
            handed = start + 65536

    async with relaying(pour) as (kubelet, proxy):
        reader, writer = await proxy.connect()
        writer.write(get_request(cadvisor(kubelet)))
        await reader.readuntil(b"\r\n\r\n")
        transport_of(writer).pause_reading()
        (downstream,) = proxy.server._clients
        assert downstream._transport is not None
        stuck = -1

        async def is_stuck() -> bool:
            nonlocal stuck
            before, stuck = stuck, handed
            await asyncio.sleep(0.2)
            return before == stuck == handed > 0

        await until(is_stuck)
        assert 0 < downstream._transport.get_write_buffer_size() <= 2 * RECEIVE_SIZE
        assert handed == stuck < len(body)
        transport_of(writer).resume_reading()
        assert await reader.readexactly(len(body)) == body
        writer.write(get_request(cadvisor(kubelet)))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert kubelet.connections == 1
        writer.transport.abort()


async def test_kubelet_is_done_before_its_slow_caller() -> None:
    """Gives the kubelet's connection to the next scrape though the last caller has not taken everything."""
    body = b"0123456789abcdef" * 3000
    async with relaying(always(answer(body))) as (kubelet, proxy):
        (reader, writer), downstream = await proxy.connect_slow()
        writer.write(get_request(cadvisor(kubelet)))
        await until(lambda: outcomes(proxy) == {Outcome.OK: 1})
        assert downstream._is_blocked
        assert proxy.server.stats().kept == 1
        assert (await proxy.get(cadvisor(kubelet))).body == body
        assert kubelet.connections == 1
        transport_of(writer).resume_reading()
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(len(body)) == body


async def test_caller_that_asks_on_and_takes_nothing() -> None:
    """Closes a connection whose caller asks for more before it has taken the answer before."""
    async with relaying(always(answer(b"x" * 30_000_000))) as (kubelet, proxy):
        _, writer = await proxy.connect()
        transport_of(writer).pause_reading()
        writer.write(get_request(cadvisor(kubelet)))
        await until(lambda: any(caller._is_blocked for caller in proxy.server._clients))
        writer.write(get_request(cadvisor(kubelet)))
        await until(lambda: proxy.server.stats().callers == 0)
        await until(lambda: kubelet.open_now == 0)
        assert len(kubelet.requests) == 1


async def test_caller_that_asks_on_after_the_end() -> None:
    """Closes it also where the kubelet was done and only the caller is behind."""
    async with relaying(always(answer(b"x" * 40_000))) as (kubelet, proxy):
        (_, writer), _ = await proxy.connect_slow()
        writer.write(get_request(cadvisor(kubelet)))
        await until(lambda: outcomes(proxy) == {Outcome.OK: 1})
        writer.write(get_request(cadvisor(kubelet)))
        await until(lambda: proxy.server.stats().callers == 0)
        assert len(kubelet.requests) == 1


@pytest.mark.parametrize(
    ("size", "is_tiny"), [(12_000, True), (40_000, True), (4_000_000, True), (16_000_000, False)]
)
async def test_waiting_output_of_a_slow_caller_is_not_overwritten(size: int, is_tiny: bool) -> None:
    """Keeps what a slow caller has not taken apart from what is read for others meanwhile."""

    async def its_own(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        mark = request.partition(b"Accept: ")[2].partition(b"\r\n")[0]
        writer.write(answer(mark * (size // len(mark))))
        await writer.drain()

    async with relaying(its_own) as (kubelet, proxy):
        (reader, writer), downstream = await proxy.connect_slow(tiny_buffers=is_tiny)
        writer.write(get_request(cadvisor(kubelet), "Accept: slow"))
        if size > 1_000_000:
            await until(lambda: downstream._is_blocked)
        else:
            await until(lambda: outcomes(proxy) == {Outcome.OK: 1})
        for _ in range(3):
            assert downstream._is_blocked
            assert (await proxy.get(cadvisor(kubelet), "Accept: fast")).body == b"fast" * (size // 4)
        transport_of(writer).resume_reading()
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(size) == b"slow" * (size // 4)


async def test_reader_that_stops() -> None:
    """Resets a caller that takes nothing until the deadline."""

    async def pour(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(PLAIN + b"Content-Length: 100000000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x" * 65536)
            await writer.drain()

    async with relaying(pour) as (kubelet, proxy):
        reader, writer = await proxy.connect()
        writer.write(get_request(cadvisor(kubelet), f"{TIMEOUT}: 3"))
        await reader.readuntil(b"\r\n\r\n")
        transport_of(writer).pause_reading()
        await kubelet.left.wait()
        assert outcomes(proxy) == {Outcome.CUT: 1}
        assert proxy.server.stats().callers == 0
        writer.transport.abort()


async def test_many_slow_and_fast_at_once() -> None:
    """Keeps the answers of many callers apart, though all are read into one buffer."""

    async def its_own(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        mark = request.partition(b"Accept: ")[2].partition(b"\r\n")[0]
        await asyncio.sleep(0.001 * (len(kubelet.requests) % 7))
        writer.write(answer(mark * 50_000))
        await writer.drain()

    async with relaying(its_own, Concurrency(per_node=12, overall=12)) as (kubelet, proxy):

        async def scrape(number: int) -> None:
            reader, writer = await proxy.connect()
            for turn in range(5):
                mark = b"%03d-%d;" % (number, turn)
                writer.write(get_request(cadvisor(kubelet), f"Accept: {mark.decode()}"))
                await reader.readuntil(b"\r\n\r\n")
                body = b""
                while len(body) < len(mark) * 50_000:
                    body += await reader.read(10_000 if number % 2 else 1_000_000)
                assert body == mark * 50_000
            writer.close()

        await asyncio.gather(*(scrape(number) for number in range(24)))
        assert kubelet.connections <= 12
        assert outcomes(proxy) == {Outcome.OK: 120}


async def test_places_and_queue() -> None:
    """Runs as many scrapes of a node as allowed, lets four times as many wait, refuses the rest at once."""
    gate = asyncio.Event()

    async def wait_for_gate(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await gate.wait()
        await serve_metrics(kubelet, request, reader, writer)

    async with relaying(wait_for_gate, Concurrency(per_node=2, overall=10)) as (kubelet, proxy):
        other = Kubelet(host="127.0.0.2", names=("127.0.0.2",))
        async with other.serving():
            table = NodeTable.of([kubelet.node("one"), other.node("two")], allow_loopback=True)
            proxy.nodes.replace(table)
            scrapes = [asyncio.create_task(proxy.get(cadvisor(kubelet))) for _ in range(12)]
            await until(lambda: sum(task.done() for task in scrapes) == 2)
            assert {task.result().status for task in scrapes if task.done()} == {503}
            await until(lambda: len(kubelet.requests) == 2)
            stats = proxy.server.stats()
            assert (stats.running, stats.waiting) == (2, 8)
            assert (await proxy.get(cadvisor(other))).status == 200
            gate.set()
            statuses = [(await task).status for task in scrapes]
            assert sorted(statuses) == [200] * 10 + [503] * 2
            assert kubelet.connections == 2


async def test_waiting_ends_with_the_deadline_or_the_caller() -> None:
    """Answers 503 to a scrape that found no place in its time, and forgets one whose caller left."""
    async with relaying(hang, Concurrency(per_node=1, overall=1)) as (kubelet, proxy):
        _, first = await proxy.connect()
        first.write(get_request(cadvisor(kubelet)))
        await until(lambda: len(kubelet.requests) == 1)
        _, second = await proxy.connect()
        second.write(get_request(cadvisor(kubelet)))
        await until(lambda: proxy.server.stats().waiting == 1)
        got = await proxy.get(cadvisor(kubelet), f"{TIMEOUT}: 0.2")
        assert got.status == 503
        second.close()
        await until(lambda: proxy.server.stats().waiting == 0)
        first.close()
        await until(lambda: proxy.server.stats().running == 0)
        assert len(kubelet.requests) == 1
        assert outcomes(proxy) == {Outcome.BUSY: 1, Outcome.CALLER_LEFT: 2}


async def test_node_leaves_while_a_scrape_waits() -> None:
    """Asks no kubelet whose Node left the table while the scrape waited for its place."""
    async with relaying(hang, Concurrency(per_node=1, overall=1)) as (kubelet, proxy):
        _, first = await proxy.connect()
        first.write(get_request(cadvisor(kubelet)))
        await until(lambda: len(kubelet.requests) == 1)
        second = asyncio.create_task(proxy.get(cadvisor(kubelet)))
        await until(lambda: proxy.server.stats().waiting == 1)
        proxy.nodes.replace(NodeTable())
        first.close()
        assert (await second).status == 404
        assert len(kubelet.requests) == 1


async def test_idle_callers_end() -> None:
    """Closes an idle connection after its time, and one that never asks."""
    timing = ProxyTiming(tick=0.02, keep_alive=2.0, request_head=2.0)
    async with Kubelet().serving() as kubelet, proxying(kubelet.node(), timing=timing) as proxy:
        reader, writer = await proxy.connect()
        writer.write(get_request(cadvisor(kubelet)))
        await reader.readuntil(METRICS)
        silent, _ = await proxy.connect()
        async with asyncio.timeout(PATIENCE):
            assert await silent.read() == b""
            assert await reader.read() == b""
        assert proxy.server.stats().callers == 0


async def test_bearer_token(tmp_path: Path) -> None:
    """Serves callers that show the token of the file, of its latest content, and no others."""
    file = tmp_path / "token"
    file.write_text("first-token\n")
    timing = ProxyTiming(tick=0.02)
    inbound = bearer_tokens(file, "PROXY_BEARER_TOKEN_FILE")
    async with (
        Kubelet().serving() as kubelet,
        proxying(kubelet.node(), inbound=inbound, timing=timing) as proxy,
    ):
        for header, status in [
            ("X: y", 401),
            ("Authorization: Bearer second-token", 401),
            ("Authorization: Bearer first-token2", 401),
            ("Authorization: Basic first-token", 401),
            ("Authorization: Bearer", 401),
            ("Authorization: Bearer first-token", 200),
            ("authorization: bearer first-token", 200),
            ("Authorization: Bearer first-token\r\nAuthorization: Bearer first-token", 401),
        ]:
            got = await proxy.get(cadvisor(kubelet), header)
            assert got.status == status, header
            assert status == 200 or got.fields["www-authenticate"].startswith("Bearer")
        assert (await proxy.get("/nothing")).status == 401
        assert all(b"first-token" not in request for request in kubelet.requests)
        file.write_text("")
        await asyncio.sleep(0.1)
        assert (await proxy.get(cadvisor(kubelet), "Authorization: Bearer first-token")).status == 200
        assert (await proxy.get(cadvisor(kubelet), "Authorization: Bearer ")).status == 401
        file.write_text("second-token")

        async def is_first_refused() -> bool:
            return (await proxy.get(cadvisor(kubelet), "Authorization: Bearer first-token")).status == 401

        await until(is_first_refused)
        assert (await proxy.get(cadvisor(kubelet), "Authorization: Bearer second-token")).status == 200


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"nul\x00", "ümlaut".encode()])
def test_token_file_without_token(tmp_path: Path, content: bytes) -> None:
    """Refuses to start on a file that holds no token."""
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(AccessError, match="holds no token"):
        bearer_tokens(tmp_path / "token", "PROXY_BEARER_TOKEN_FILE")
    with pytest.raises(AccessError, match="cannot read"):
        bearer_tokens(tmp_path / "absent", "PROXY_BEARER_TOKEN_FILE")


async def test_drain() -> None:
    """Lets scrapes under way finish, closes idle connections at once and accepts no more."""
    gate = asyncio.Event()

    async def wait_for_gate(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await gate.wait()
        await serve_metrics(kubelet, request, reader, writer)

    async with relaying(wait_for_gate) as (kubelet, proxy):
        idle, _ = await proxy.connect()
        await asyncio.sleep(0.05)
        reader, writer = await proxy.connect()
        writer.write(get_request(cadvisor(kubelet)))
        await until(lambda: len(kubelet.requests) == 1)
        draining = asyncio.create_task(proxy.server.drain(PATIENCE))
        async with asyncio.timeout(PATIENCE):
            assert await idle.read() == b""
        with pytest.raises(ConnectionRefusedError):
            await proxy.connect()
        assert not draining.done()
        gate.set()
        raw = await reader.read()
        assert raw.endswith(METRICS)
        assert b"Connection: close\r\n" in raw
        async with asyncio.timeout(PATIENCE):
            await draining
        await until(lambda: kubelet.open_now == 0)


async def test_drain_in_the_moment_in_which_a_connection_is_accepted() -> None:
    """Ends also the connection whose transport is still to come."""
    async with relaying(serve_metrics) as (_, proxy):
        loop = asyncio.get_running_loop()
        connecting = [loop.create_task(proxy.connect()) for _ in range(20)]
        while not any(client._transport is None for client in proxy.server._clients):
            assert not all(task.done() for task in connecting), "the moment has passed"
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            await proxy.server.drain(PATIENCE)
            await asyncio.gather(*connecting, return_exceptions=True)
        assert proxy.server.stats().callers == 0


async def test_drain_ends_with_its_grace() -> None:
    """Resets what has not finished when the grace is over."""
    async with relaying(hang) as (kubelet, proxy):
        reader, writer = await proxy.connect()
        writer.write(get_request(cadvisor(kubelet)))
        await until(lambda: len(kubelet.requests) == 1)
        async with asyncio.timeout(PATIENCE):
            await proxy.server.drain(0.2)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        await until(lambda: kubelet.open_now == 0)


async def test_each_answer_before_the_end_closes_its_connection() -> None:
    """Says `Connection: close` from the announcement on, accepts until the drain, and closes idle clients last."""
    async with relaying(serve_metrics) as (kubelet, proxy):
        request = get_request(cadvisor(kubelet))
        kept, idle = await proxy.connect(), await proxy.connect()
        await until(lambda: proxy.server.stats().callers == 2)
        proxy.server.announce_end()
        for reader, writer in (kept, await proxy.connect()):
            writer.write(request)
            answered = await reader.read()
            assert b"\r\nConnection: close\r\n" in answered
            assert answered.endswith(METRICS)
        assert not idle[0].at_eof()
        await proxy.server.drain(PATIENCE)
        assert await idle[0].read() == b""  # an end, and no reset


async def test_drain_when_idle() -> None:
    """Ends at once when nothing is under way."""
    async with relaying(serve_metrics) as (kubelet, proxy):
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        async with asyncio.timeout(SLACK):
            await proxy.server.drain(2 * SLACK)


def test_listen_on_both_families() -> None:
    """Binds one port on IPv4 and IPv6."""
    sockets = listen(0)
    try:
        assert len({bound.getsockname()[1] for bound in sockets}) == 1
        assert len({bound.family for bound in sockets}) == len(sockets)
        for bound in sockets:
            bound.listen()
        with pytest.raises(OSError, match="in use"):
            listen(sockets[0].getsockname()[1])
    finally:
        for bound in sockets:
            bound.close()


def test_file_limit() -> None:
    """Raises the soft limit to what is needed, and refuses what the hard limit does not allow."""

    def needing(overall: int) -> ProxyConfig:
        limits = Concurrency(overall=overall)
        return ProxyConfig(frozenset(), concurrency=limits, max_clients=50, kept_connections=20)

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
        needing(10).fit_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 80
        if before[1] != resource.RLIM_INFINITY:
            with pytest.raises(SettingsError, match="open files"):
                needing(before[1]).fit_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
