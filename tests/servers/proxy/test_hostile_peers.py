"""Peers that repeat without end: interim answers, TLS records without data, answers that are never read."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
import uvloop

from k8s_consul_registrar.model import Node
from k8s_consul_registrar.proxy.tls_stream import MAX_EMPTY_RECORDS
from k8s_consul_registrar.proxy.upstream import BULK_READS, MAX_READS
from support.proxy_lab import (
    METRICS,
    Files,
    Kubelet,
    Proxy,
    always,
    answer,
    authority,
    cadvisor,
    get_request,
    proxying,
)
from support.tls_flood import KeyUpdater
from support.waiting import PATIENCE, SLACK, until

pytestmark = pytest.mark.both_loops

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
EVIL_HOST = "127.0.0.3"


async def flood(
    kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Send interim answers until the other side leaves."""
    while not writer.is_closing():
        writer.write(INTERIM * 2000)
        await writer.drain()


async def slowest(proxy: Proxy, target: str, times: int = 20) -> float:
    """Scrape a few times, and return the longest that one took."""
    longest = 0.0
    for _ in range(times):
        began = time.monotonic()
        assert (await proxy.get(target)).body == METRICS
        longest = max(longest, time.monotonic() - began)
    return longest


@pytest.mark.parametrize(
    ("before", "status"),
    [
        (INTERIM, 200),
        (INTERIM * 5, 200),
        (INTERIM * 6, 502),
        (b"HTTP/1.1 103 Early Hints\r\nLink: " + b"x" * 6000 + b"\r\n\r\n", 200),
        ((b"HTTP/1.1 103 Early Hints\r\nLink: " + b"x" * 6000 + b"\r\n\r\n") * 3, 502),
        # Whatever follows an interim head is the next one: such an answer has no body (RFC 9110, 15.2).
        (b"HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\nhello", 502),
        (b"HTTP/1.1 099 Odd\r\n\r\n", 502),
        (b"HTTP/1.1 000 Odd\r\n\r\n", 502),
    ],
)
@pytest.mark.parametrize("piece", [1 << 20, 900])
async def test_interim_answers_are_bounded(before: bytes, status: int, piece: int) -> None:
    """Skips five interim answers of 16 KB in all, and fails the scrape beyond that, or below status 100."""

    async def behave(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        whole = before + answer()
        for start in range(0, len(whole), piece):
            writer.write(whole[start : start + piece])
            await asyncio.sleep(0)

    async with Kubelet(behave).serving() as kubelet, proxying(kubelet.node()) as proxy:
        for _ in range(2):  # on a kept connection the count begins again
            assert (await proxy.get(cadvisor(kubelet))).status == status


async def test_endless_interim_answers_end_the_scrape_and_stall_no_other() -> None:
    """Gives up on a kubelet that sends interim answers forever, and scrapes of another go on beside it."""
    evil, good = Kubelet(flood, host=EVIL_HOST, names=(EVIL_HOST,)), Kubelet()
    async with (
        evil.serving(),
        good.serving(),
        proxying(good.node(), evil.node("evil")) as proxy,
    ):
        bad, took = await asyncio.gather(proxy.get(cadvisor(evil)), slowest(proxy, cadvisor(good)))
        assert bad.status == 502
        assert b"interim answers" in bad.body
        assert took < SLACK
        await until(lambda: evil.open_now == 0)


@pytest.mark.parametrize(
    "banner", [b"5.7.44-MySQL banner\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"-ERR unknown\r\n"]
)
async def test_a_banner_ends_the_scrape_at_once(banner: bytes) -> None:
    """Does not wait for the end of a head that begins unlike one of HTTP."""
    async with Kubelet(always(banner)).serving() as kubelet, proxying(kubelet.node()) as proxy:
        got = await proxy.get(cadvisor(kubelet))
        assert got.status == 502
        assert b"does not speak HTTP" in got.body


async def test_a_head_of_bare_line_feeds_ends_the_scrape_at_once() -> None:
    """Does not wait for an end that such a head never has."""
    head = b"HTTP/1.1 200 OK\nContent-Length: 3\n\na 1"
    async with Kubelet(always(head)).serving() as kubelet, proxying(kubelet.node()) as proxy:
        got = await proxy.get(cadvisor(kubelet))
        assert got.status == 502
        assert b"without a carriage return" in got.body


# TLS records without data


@contextlib.contextmanager
def key_updating_kubelet(folder: Path, *, body_first: bool) -> Iterator[tuple[Node, "list[int]"]]:
    """Run a kubelet that answers, wholly or half, and then sends KeyUpdates; the list gets the bytes it sent."""
    certificate = folder / "evil.pem"
    issued = authority().issue_cert(EVIL_HOST)
    chain = b"".join(each.bytes() for each in issued.cert_chain_pems)
    certificate.write_bytes(chain + issued.private_key_pem.bytes())
    sent: list[int] = []
    listening = socket.create_server((EVIL_HOST, 0))

    def serve() -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                sock, _ = listening.accept()
                sock.settimeout(PATIENCE)
                peer = KeyUpdater(sock, str(certificate))
                peer.read()
                peer.write(answer() if body_first else answer()[:-5])
                time.sleep(0.2)
                sent.append(peer.flood())
                peer.close()

    thread = threading.Thread(target=serve)
    thread.start()
    port = listening.getsockname()[1]
    try:
        yield Kubelet(host=EVIL_HOST, port=port).node("evil"), sent
    finally:
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


@pytest.mark.parametrize("body_first", [True, False])
async def test_key_updates_of_a_kubelet_end_its_connection(tmp_path: Path, body_first: bool) -> None:
    """Closes a connection, idle or amid an answer, on which a kubelet sends KeyUpdates forever."""
    with key_updating_kubelet(tmp_path, body_first=body_first) as (evil, sent):
        good = Kubelet()
        async with good.serving(), proxying(good.node(), evil) as proxy:
            target = f"/api/v1/nodes/{EVIL_HOST}:{evil.kubelet_port}/metrics/cadvisor"
            reader, writer = await proxy.connect()
            writer.write(get_request(target))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            if not body_first:
                with contextlib.suppress(ConnectionResetError):
                    await reader.read()
            await until(lambda: bool(sent))
            assert sent[0] < 16 << 20  # what the system's buffers took, not what the proxy read
            assert await slowest(proxy, cadvisor(good), times=3) < SLACK
            await until(lambda: proxy.server.stats().kept == 1)


async def test_key_updates_of_a_client_end_its_connection(tmp_path: Path) -> None:
    """Closes the connection of an anonymous client that sends KeyUpdates forever and reads nothing."""
    files = Files(tmp_path, trustme.CA())
    kubelet = Kubelet()
    async with kubelet.serving(), proxying(kubelet.node(), tls=files.tls()) as proxy:

        def attack() -> int:
            sock = socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE)
            client = KeyUpdater(sock)
            try:
                client.write(get_request("/nothing"))
                return client.flood()
            finally:
                client.close()

        assert await asyncio.to_thread(attack) < 16 << 20
        await until(lambda: proxy.server.stats().callers == 0)


@pytest.mark.parametrize("tickets", [2, MAX_EMPTY_RECORDS, MAX_EMPTY_RECORDS + 1])
async def test_session_tickets_are_bounded(tickets: int) -> None:
    """Accepts the tickets of an honest server, and fails a scrape of one that sends too many."""
    kubelet = Kubelet(tickets=tickets)
    async with kubelet.serving(), proxying(kubelet.node()) as proxy:
        got = await proxy.get(cadvisor(kubelet))
        assert got.status == (200 if tickets <= MAX_EMPTY_RECORDS else 502)


async def test_a_kubelet_that_is_not_read_is_read_no_further() -> None:
    """Reads nothing from an upstream while what it must be sent waits in memory."""
    kubelet = Kubelet()
    async with kubelet.serving(), proxying(kubelet.node()) as proxy:
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        connection = next(iter(proxy.server._relay.kubelets.pool._in_order))
        transport = connection._transport
        assert transport is not None
        connection.pause_writing()
        assert not transport.is_reading()
        connection.resume()  # the client is not what it waits for
        assert not transport.is_reading()
        connection.resume_writing()
        assert transport.is_reading()


async def test_a_connection_that_always_has_more_lets_others_have_their_turn() -> None:
    """Stops reading after a few full buffers, and goes on in the loop's next turn."""
    if not isinstance(asyncio.get_running_loop(), uvloop.Loop):
        pytest.skip("asyncio's own loop reads once a turn")
    kubelet = Kubelet()
    async with kubelet.serving(), proxying(kubelet.node()) as proxy:
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        connection = next(iter(proxy.server._relay.kubelets.pool._in_order))
        transport = connection._transport
        assert transport is not None
        await asyncio.sleep(0)
        for _ in range(MAX_READS):
            assert transport.is_reading()
            connection._take_turns()
        assert not transport.is_reading()
        await until(transport.is_reading)


async def test_a_body_without_end_is_paced_after_its_first_megabytes() -> None:
    """Pauses after each full buffer of a long answer; the next answer on the connection begins again."""
    kubelet = Kubelet()
    async with kubelet.serving(), proxying(kubelet.node()) as proxy:
        for _ in range(2):
            assert (await proxy.get(cadvisor(kubelet))).status == 200
            connection = next(iter(proxy.server._relay.kubelets.pool._in_order))
            transport = connection._transport
            assert transport is not None
            connection._take_turns()
            assert transport.is_reading()
            connection._full_reads = BULK_READS
            connection._take_turns()
            await asyncio.sleep(0)
            assert not transport.is_reading()
            await until(transport.is_reading)
