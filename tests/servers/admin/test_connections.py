"""The ports of collectors and operators under callers that are many, slow or silent, over raw sockets."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import trustme
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.connections import Bounds
from k8s_consul_registrar.admin.http_sd import SD_PATH, HttpSdServer
from k8s_consul_registrar.admin.server import AdminServer
from k8s_consul_registrar.tls import server_tls
from support.seen import Healthy, Registrar, many_targets
from support.waiting import PATIENCE

pytestmark = pytest.mark.both_loops

HOST = "127.0.0.1"


def server(kind: str, bounds: Bounds) -> HttpSdServer | AdminServer:
    """Return the server of one of the two ports."""
    if kind == "http_sd":
        return HttpSdServer(port=0, view=Registrar(many_targets(10)), bounds=bounds)
    return AdminServer(port=0, health=Healthy(), registry=CollectorRegistry(), bounds=bounds)


def path(kind: str) -> str:
    """Return what such a server serves."""
    return SD_PATH if kind == "http_sd" else "/healthz"


either = pytest.mark.parametrize("kind", ["http_sd", "admin"])


@contextlib.asynccontextmanager
async def connected(port: int, receive: int = 0) -> AsyncIterator[socket.socket]:
    """Connect, with a receive buffer of this many bytes if given, and close at the end."""
    with socket.socket() as raw:
        raw.setblocking(False)
        if receive:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        await asyncio.get_running_loop().sock_connect(raw, (HOST, port))
        yield raw


async def received(raw: socket.socket) -> bytes:
    """Read until the other side ends the connection, and return what came."""
    loop, whole = asyncio.get_running_loop(), bytearray()
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(ConnectionError):
            while piece := await loop.sock_recv(raw, 65536):
                whole += piece
    return bytes(whole)


async def status_of(url: str, session: aiohttp.ClientSession) -> int:
    """Ask and return the status, over a connection of its own."""
    async with session.get(url, headers={"Connection": "close"}) as response:
        await response.read()
        return response.status


@either
async def test_head_that_never_ends_is_cut(kind: str) -> None:
    """A slow-loris, who sends a byte now and then, is ended after the time that a head may take."""
    async with server(kind, Bounds(request=0.5)) as served, connected(served.port) as raw:
        began = asyncio.get_running_loop().time()

        async def drip() -> None:
            for byte in f"GET {path(kind)} HTTP/1.1\r\nHost: a\r\nX-Slow: {'y' * 1000}".encode():
                await asyncio.get_running_loop().sock_sendall(raw, bytes([byte]))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert await received(raw) == b""
        assert 0.4 < asyncio.get_running_loop().time() - began < PATIENCE
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


@either
async def test_kept_connection_that_asks_no_more_is_ended(kind: str) -> None:
    """After an answer the next request has its own time; one that comes within it is answered."""
    request = f"GET {path(kind)} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    async with server(kind, Bounds(request=1.0, idle=4.0)) as served, connected(served.port) as raw:
        loop = asyncio.get_running_loop()
        for _ in range(2):
            await loop.sock_sendall(raw, request)
            assert (await loop.sock_recv(raw, 65536)).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(1.5)
        await received(raw)


@either
async def test_five_hundred_idle_connections_keep_no_caller_out(kind: str) -> None:
    """Each newcomer takes the place of the one waited for longest, so a client that asks at once is answered."""
    async with (
        server(kind, Bounds(connections=32, request=120)) as served,
        contextlib.AsyncExitStack() as stack,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session,
    ):
        held = []
        for number in range(500):
            held.append(await stack.enter_async_context(connected(served.port)))
            if number % 50 == 0:
                url = f"http://{HOST}:{served.port}{path(kind)}"
                assert await status_of(url, session) == 200
        assert await status_of(url, session) == 200
        ended = await asyncio.gather(*(received(raw) for raw in held[:400]))
        assert set(ended) == {b""}


async def test_caller_that_reads_no_answer_is_cut_off() -> None:
    """An answer of megabytes that is not read ends in its time; a reader beside it gets it whole."""
    request = f"GET {SD_PATH} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
    view = Registrar(many_targets(6_000))
    async with (
        HttpSdServer(port=0, view=view, bounds=Bounds(answer=4.0)) as served,
        connected(served.port, receive=4096) as lazy,
        connected(served.port) as eager,
    ):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(lazy, request)
        await loop.sock_sendall(eager, request)
        whole = await received(eager)
        await asyncio.sleep(6)
        part = await received(lazy)
    assert whole.endswith(b"}]\n")
    assert 0 < len(part) < len(whole)


async def test_answer_under_way_is_not_ended_for_a_newcomer() -> None:
    """While all places are taken by answers a newcomer is turned away, and the answers come whole."""
    request = f"GET {SD_PATH} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
    view = Registrar(many_targets(6_000))
    async with (
        HttpSdServer(port=0, view=view, bounds=Bounds(connections=2)) as served,
        connected(served.port, receive=16384) as one,
        connected(served.port, receive=16384) as other,
    ):
        loop = asyncio.get_running_loop()
        for raw in (one, other):
            await loop.sock_sendall(raw, request)
            assert (await loop.sock_recv(raw, 12)) == b"HTTP/1.1 200"
        async with connected(served.port) as late:
            assert await received(late) == b""
        assert (await received(one)).endswith(b"}]\n")
        assert (await received(other)).endswith(b"}]\n")


async def test_silence_instead_of_a_handshake(tmp_path: Path) -> None:
    """With TLS those who never shake hands give their place to who does, and are cut in time."""
    authority = trustme.CA()
    ours = authority.issue_cert("localhost")
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    ours.cert_chain_pems[0].write_to_path(str(certificate))
    ours.private_key_pem.write_to_path(str(key))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    bounds = Bounds(connections=8, request=1.0)
    tls = server_tls(certificate, key, setting="HTTP_SD_TLS")
    async with (
        HttpSdServer(port=0, view=Registrar(many_targets(10)), tls=tls, bounds=bounds) as served,
        contextlib.AsyncExitStack() as stack,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
    ):
        held = [await stack.enter_async_context(connected(served.port)) for _ in range(40)]
        assert await status_of(f"https://localhost:{served.port}{SD_PATH}", session) == 200
        assert set(await asyncio.gather(*(received(raw) for raw in held))) == {b""}


@either
async def test_heads_beyond_measure_are_refused(kind: str) -> None:
    """A line of 100 KB, or a thousand fields, is a 400 and the end of its connection."""
    heads = (f"X: {'y' * 100_000}\r\n", "".join(f"X-{number}: y\r\n" for number in range(1000)))
    async with server(kind, Bounds()) as served:
        for head in heads:
            async with connected(served.port) as raw:
                request = f"GET {path(kind)} HTTP/1.1\r\nHost: a\r\n{head}\r\n".encode()
                with contextlib.suppress(ConnectionError):
                    await asyncio.get_running_loop().sock_sendall(raw, request)
                assert (await received(raw))[:12] in {b"HTTP/1.0 400", b""}
        async with aiohttp.ClientSession() as session:
            assert await status_of(f"http://{HOST}:{served.port}{path(kind)}", session) == 200


async def test_fault_of_a_caller_is_not_logged_as_our_error(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a request that is none nor a caller who leaves fills the log with tracebacks."""
    view = Registrar(many_targets(6_000))
    async with HttpSdServer(port=0, view=view) as served:
        async with connected(served.port) as raw:
            await asyncio.get_running_loop().sock_sendall(raw, b"\x16\x03\x01 what\r\n\r\n")
            assert (await received(raw)).startswith(b"HTTP/1.0 400")
        async with connected(served.port) as raw:
            request = f"GET {SD_PATH} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
            await asyncio.get_running_loop().sock_sendall(raw, request)
            assert (await asyncio.get_running_loop().sock_recv(raw, 12)) == b"HTTP/1.1 200"
        await asyncio.sleep(0.5)
    assert caplog.records == []


async def test_caller_that_left_is_not_counted() -> None:
    """Places come free with every kind of end, before and after a request."""
    async with (
        server("admin", Bounds(connections=4)) as served,
        aiohttp.ClientSession() as session,
    ):
        for _ in range(20):
            async with connected(served.port):
                pass
            assert await status_of(f"http://{HOST}:{served.port}/healthz", session) == 200
        held = [await session.get(f"http://{HOST}:{served.port}/healthz") for _ in range(3)]
        assert [await one.text() for one in held] == ["ok\n"] * 3
