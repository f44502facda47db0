"""Callers over TLS: certificates of both sides, their replacement under load, and what is no handshake."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trustme

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.proxy.config import ProxyTiming
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.tls_stream import RECEIVE_SIZE
from k8s_consul_registrar.rotating import BearerTokens, Rotating, bearer_tokens
from support.proxy_lab import (
    METRICS,
    PLAIN,
    TOKEN,
    Answer,
    Caller,
    Files,
    Kubelet,
    Proxy,
    always,
    answer,
    cadvisor,
    caller_context,
    connect,
    get,
    get_request,
    parse_answer,
    proxying,
    transport_of,
)
from support.waiting import PATIENCE, until

pytestmark = pytest.mark.both_loops

AUTHORITY = trustme.CA()
CLIENTS = trustme.CA()
OTHER_CLIENTS = trustme.CA()
QUICK = ProxyTiming(tick=0.02, linger=0.2)


@contextlib.asynccontextmanager
async def secured(
    files: Files, kubelet: Kubelet, timing: ProxyTiming = QUICK, inbound: Rotating[BearerTokens] | None = None
) -> AsyncIterator[Proxy]:
    """Run a kubelet and a proxy of these files in front of it."""
    async with (
        kubelet.serving(),
        proxying(kubelet.node(), tls=files.tls(), timing=timing, inbound=inbound) as proxy,
    ):
        yield proxy


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_scrapes_over_tls(tmp_path: Path, newest: ssl.TLSVersion) -> None:
    """Answers scrapes and refusals one after the other on one connection, in both versions of TLS."""
    kubelet = Kubelet()
    async with secured(Files(tmp_path, AUTHORITY), kubelet) as proxy:
        caller = await connect(proxy, caller_context(AUTHORITY, newest=newest))
        for target, status in ((cadvisor(kubelet), 200), ("/nothing", 404), (cadvisor(kubelet), 200)):
            got = await caller.get(target)
            assert got.status == status
        assert got.body == METRICS
        assert proxy.server.stats().callers == 1


@pytest.mark.parametrize("size", [16_000, 16 * 1024, 100_000, 3_000_000])
async def test_bodies_of_any_size(tmp_path: Path, size: int) -> None:
    """Every byte arrives, however many records it takes."""
    body = os.urandom(size)
    kubelet = Kubelet(always(answer(body)))
    async with secured(Files(tmp_path, AUTHORITY), kubelet) as proxy:
        assert (await get(proxy, caller_context(AUTHORITY), cadvisor(kubelet))).body == body


async def test_slow_caller_holds_the_kubelet_back(tmp_path: Path) -> None:
    """Bytes that the socket does not take are kept, the kubelet is read no further, and in the end all arrive."""
    body = os.urandom(1_000_000) * 30  # more than the sockets of loopback hold
    kubelet = Kubelet(always(answer(body)))
    async with secured(Files(tmp_path, AUTHORITY), kubelet) as proxy:
        caller = await connect(proxy, caller_context(AUTHORITY))
        transport_of(caller.writer).pause_reading()
        caller.writer.write(get_request(cadvisor(kubelet)))
        (downstream,) = proxy.server._clients
        transport = downstream._transport
        assert transport is not None
        await until(lambda: transport.get_write_buffer_size() > 0)
        await asyncio.sleep(0.3)
        assert 0 < proxy.server.stats().body_bytes < len(body)
        assert 0 < transport.get_write_buffer_size() < 2 * RECEIVE_SIZE
        transport_of(caller.writer).resume_reading()
        await caller.reader.readuntil(b"\r\n\r\n")
        assert await caller.reader.readexactly(len(body)) == body


async def test_cut_answer_looks_cut(tmp_path: Path) -> None:
    """Where the kubelet breaks off the caller gets a reset, not the end that TLS announces."""
    kubelet = Kubelet(always(PLAIN + b"Content-Length: 100\r\n\r\nhalf", then_close=True))
    async with secured(Files(tmp_path, AUTHORITY), kubelet) as proxy:
        caller = await connect(proxy, caller_context(AUTHORITY))
        caller.writer.write(get_request(cadvisor(kubelet)))
        with pytest.raises(ConnectionResetError):
            await caller.reader.read(-1)


async def test_end_is_announced(tmp_path: Path) -> None:
    """A connection that is closed on purpose ends with TLS's own farewell."""
    kubelet = Kubelet()
    async with secured(Files(tmp_path, AUTHORITY), kubelet) as proxy:
        sock = socket.create_connection(("127.0.0.1", proxy.port))
        sock.setblocking(False)
        context = caller_context(AUTHORITY)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        loop = asyncio.get_running_loop()

        async def run(step: Callable[[], object]) -> object:
            while True:
                try:
                    done = step()
                except ssl.SSLWantReadError:
                    await loop.sock_sendall(sock, outgoing.read())
                    came = await asyncio.wait_for(loop.sock_recv(sock, 65536), PATIENCE)
                    assert came, "the connection ended without a farewell"
                    incoming.write(came)
                else:
                    await loop.sock_sendall(sock, outgoing.read())
                    return done

        with sock:
            await run(tls.do_handshake)
            await run(lambda: tls.write(get_request(cadvisor(kubelet), "Connection: close")))
            got = b""
            while piece := await run(lambda: tls.read(65536)):
                assert isinstance(piece, bytes)
                got += piece
        assert parse_answer(got).body == METRICS


async def test_byte_by_byte(tmp_path: Path) -> None:
    """A handshake and a request are taken in however their bytes are cut up."""
    kubelet = Kubelet()
    async with secured(Files(tmp_path, AUTHORITY), kubelet) as proxy:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = caller_context(AUTHORITY).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        reader, writer = await proxy.connect()

        async def send() -> None:
            for byte in outgoing.read():
                writer.write(bytes([byte]))
                await asyncio.sleep(0)

        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await send()
                incoming.write(await reader.read(65536))
        tls.write(get_request(cadvisor(kubelet)))
        await send()
        incoming.write(await reader.read(65536))
        assert tls.read(20).startswith(b"HTTP/1.1 200 OK")


async def test_certificate_is_asked_for(tmp_path: Path) -> None:
    """With an authority for clients only who shows a certificate of it is served, by a bearer token as well."""
    kubelet = Kubelet()
    files = Files(tmp_path, AUTHORITY, CLIENTS)
    (tmp_path / "token").write_text("inbound")
    inbound = bearer_tokens(tmp_path / "token", "PROXY_BEARER_TOKEN_FILE")
    async with secured(files, kubelet, inbound=inbound) as proxy:
        target, token = cadvisor(kubelet), "Authorization: Bearer inbound"
        assert (await get(proxy, caller_context(AUTHORITY, CLIENTS), target, token)).status == 200
        assert (await get(proxy, caller_context(AUTHORITY, CLIENTS), target)).status == 401
        for wrong in (None, OTHER_CLIENTS):
            with pytest.raises(OSError):  # noqa: PT011 - which one depends on the moment of the alert
                await get(proxy, caller_context(AUTHORITY, wrong), target, token)
        assert proxy.server.stats().outcomes[Outcome.HANDSHAKE] == 2
        assert len(kubelet.requests) == 1


async def test_removed_token_and_authority_count_from_the_next_request_on(tmp_path: Path) -> None:
    """Without waiting for the proxy to look at its files now and then, which it does once an hour here."""
    kubelet = Kubelet()
    files = Files(tmp_path, AUTHORITY, CLIENTS)
    token = tmp_path / "token"
    token.write_text("old-token\nnew-token\n")
    inbound = bearer_tokens(token, "PROXY_BEARER_TOKEN_FILE")
    async with secured(files, kubelet, ProxyTiming(tick=3600.0), inbound) as proxy:
        caller = await connect(proxy, caller_context(AUTHORITY, CLIENTS))
        for sent in ("old-token", "new-token"):
            assert (await caller.get(cadvisor(kubelet), f"Authorization: Bearer {sent}")).status == 200
        token.write_text("new-token\n")
        for sent, status in (("old-token", 401), ("new-token", 200)):
            assert (await caller.get(cadvisor(kubelet), f"Authorization: Bearer {sent}")).status == status
        files.trust(OTHER_CLIENTS)
        with pytest.raises(OSError):  # noqa: PT011 - which one depends on the moment of the alert
            await get(
                proxy,
                caller_context(AUTHORITY, CLIENTS),
                cadvisor(kubelet),
                "Authorization: Bearer new-token",
            )
        assert await caller.ends()
        got = await get(
            proxy,
            caller_context(AUTHORITY, OTHER_CLIENTS),
            cadvisor(kubelet),
            "Authorization: Bearer new-token",
        )
        assert got.status == 200


async def test_certificate_that_cannot_be_used_does_not_keep_a_removed_authority(tmp_path: Path) -> None:
    """Each file has its own last good value: clients are judged by the new authority, the old certificate is shown."""
    kubelet = Kubelet()
    files = Files(tmp_path, AUTHORITY, CLIENTS)
    async with secured(files, kubelet) as proxy:
        files.certificate.write_text("half-way")
        files.trust(OTHER_CLIENTS)
        assert (await get(proxy, caller_context(AUTHORITY, OTHER_CLIENTS), cadvisor(kubelet))).status == 200
        with pytest.raises(OSError):  # noqa: PT011 - which one depends on the moment of the alert
            await get(proxy, caller_context(AUTHORITY, CLIENTS), cadvisor(kubelet))


async def test_no_context_is_made_for_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a client's nor for one to a kubelet: loading certificates takes longer than a handshake."""
    kubelet = Kubelet()
    calling = caller_context(AUTHORITY, CLIENTS)
    async with secured(Files(tmp_path, AUTHORITY, CLIENTS), kubelet) as proxy:
        made: list[object] = []
        make = ssl.SSLContext.__new__

        def count(kind: type[ssl.SSLContext], protocol: int) -> ssl.SSLContext:
            made.append(protocol)
            return make(kind, protocol)

        monkeypatch.setattr(ssl.SSLContext, "__new__", count)
        for _ in range(5):
            assert (await get(proxy, calling, cadvisor(kubelet))).status == 200
        assert made == []


async def test_client_of_the_old_authority_is_refused(tmp_path: Path) -> None:
    """After a change the new one's client is served and the old one's is not, on no new and on no kept connection."""
    kubelet = Kubelet()
    files = Files(tmp_path, AUTHORITY, CLIENTS)
    async with secured(files, kubelet) as proxy:
        old, new = caller_context(AUTHORITY, CLIENTS), caller_context(AUTHORITY, OTHER_CLIENTS)
        kept = await connect(proxy, old)
        assert (await kept.get(cadvisor(kubelet))).status == 200
        files.trust(OTHER_CLIENTS)
        assert await kept.ends()
        assert (await get(proxy, new, cadvisor(kubelet))).status == 200
        with pytest.raises(OSError):  # noqa: PT011 - which one depends on the moment of the alert
            await get(proxy, old, cadvisor(kubelet))
        assert len(kubelet.requests) == 2


async def test_scrape_under_way_outlives_its_authority(tmp_path: Path) -> None:
    """The answer under way comes whole, with the word that the connection ends, and no request follows it."""
    release = asyncio.Event()

    async def wait(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await release.wait()
        writer.write(answer())

    kubelet = Kubelet(wait)
    files = Files(tmp_path, AUTHORITY, CLIENTS)
    async with secured(files, kubelet) as proxy:
        caller = await connect(proxy, caller_context(AUTHORITY, CLIENTS))
        scrape = asyncio.create_task(caller.get(cadvisor(kubelet)))
        await until(lambda: bool(kubelet.requests))
        files.trust(OTHER_CLIENTS)

        async def is_replaced() -> bool:
            try:
                await get(proxy, caller_context(AUTHORITY, CLIENTS), "/nothing")
            except OSError:
                return True
            return False

        await until(is_replaced)
        release.set()
        got = await scrape
        assert (got.status, got.body, got.fields["connection"]) == (200, METRICS, "close")
        assert await caller.ends()


Scrape = Callable[[], Awaitable[Answer]]


@contextlib.asynccontextmanager
async def load(*scrapes: Scrape) -> AsyncIterator[list[int]]:
    """Scrape on and on by all of these ways; fails where one scrape does. Yields how many were done."""
    done = [0] * len(scrapes)
    is_over = asyncio.Event()

    async def one(place: int, scrape: Scrape) -> None:
        while not is_over.is_set():
            got = await scrape()
            assert (got.status, got.body) == (200, METRICS)
            done[place] += 1

    async with asyncio.TaskGroup() as group:
        for place, scrape in enumerate(scrapes):
            group.create_task(one(place, scrape))
        yield done
        await asyncio.sleep(0.05)
        is_over.set()


async def more(done: list[int], count: int = 5) -> None:
    """Wait until each way was gone this many times more."""
    wanted = [was + count for was in done]
    await until(lambda: all(now >= want for now, want in zip(done, wanted, strict=True)))


async def test_certificates_are_replaced_under_load(tmp_path: Path) -> None:
    """No scrape fails, on kept and on fresh connections, and fresh ones soon meet the new certificate."""
    kubelet = Kubelet()
    files = Files(tmp_path, AUTHORITY)
    async with secured(files, kubelet) as proxy:
        context = caller_context(AUTHORITY)
        kept: Caller = await connect(proxy, context)

        def shown(caller: Caller) -> bytes:
            certificate = caller.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            assert isinstance(certificate, bytes)
            return certificate

        first = shown(kept)
        target = cadvisor(kubelet)
        async with load(lambda: kept.get(target), lambda: get(proxy, context, target)) as done:
            for _ in range(3):
                await more(done)
                files.issue(AUTHORITY)
            await more(done, 20)

        async def is_new() -> bool:
            return shown(await connect(proxy, context)) != first

        await until(is_new)
        assert proxy.server.stats().outcomes[Outcome.OK] == sum(done)


async def test_tokens_are_replaced_under_load(tmp_path: Path) -> None:
    """No scrape fails while both tokens change: kubelets' at once, callers' by a time in which both are good."""
    tokens = ["kubelet-token-1"]
    asked: list[bytes] = []

    async def check(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        asked.append(request)
        writer.write(answer())

    kubelet = Kubelet(check)
    file = tmp_path / "inbound"
    file.write_text("old\n")
    shown = ["old"]
    async with (
        kubelet.serving(),
        proxying(
            kubelet.node(),
            token=lambda: tokens[-1],
            inbound=bearer_tokens(file, "PROXY_BEARER_TOKEN_FILE"),
            timing=QUICK,
        ) as proxy,
    ):
        target = cadvisor(kubelet)

        async def scrape() -> Answer:
            return await proxy.get(target, f"Authorization: Bearer {shown[-1]}")

        async def accepts(token: str, status: int) -> bool:
            return (await proxy.get(target, f"Authorization: Bearer {token}")).status == status

        async with load(scrape, scrape, scrape) as done:
            await more(done)
            tokens.append("kubelet-token-2")
            file.write_text("old\nnew\n")
            await until(lambda: accepts("new", 200))
            await more(done)
            shown.append("new")
            await more(done)
            file.write_text("new\n")
            await until(lambda: accepts("old", 401))
            await more(done)
    assert b"kubelet-token-1" in asked[0]
    assert b"kubelet-token-2" in asked[-1]
    assert TOKEN.encode() not in b"".join(asked)


@pytest.mark.parametrize("broken", ["certificate", "key", "client_ca"])
async def test_files_caught_half_way(tmp_path: Path, broken: str) -> None:
    """The pair that was read last is served until the files fit together again."""
    kubelet = Kubelet()
    files = Files(tmp_path, AUTHORITY, CLIENTS)
    async with secured(files, kubelet) as proxy:
        context = caller_context(AUTHORITY, CLIENTS)
        path: Path = getattr(files, broken)
        for keep in (0.5, 0):
            files.cut(path, keep)
            await asyncio.sleep(0.1)
            assert (await get(proxy, context, cadvisor(kubelet))).status == 200
        files.lose(path)
        await asyncio.sleep(0.1)
        assert (await get(proxy, context, cadvisor(kubelet))).status == 200
        files.issue(AUTHORITY)
        files.trust(OTHER_CLIENTS)
        others = caller_context(AUTHORITY, OTHER_CLIENTS)

        async def are_others_served() -> bool:
            with contextlib.suppress(OSError):
                return (await get(proxy, others, cadvisor(kubelet))).status == 200
            return False

        await until(are_others_served)


def test_files_that_cannot_be_used_at_the_start(tmp_path: Path) -> None:
    """Names the setting and quotes nothing of the file."""
    files = Files(tmp_path, AUTHORITY, CLIENTS)
    files.key.write_text("no key at all")
    with pytest.raises(AccessError, match="TLS_KEY_FILE") as raised:
        files.tls()
    assert "no key at all" not in str(raised.value)
    files.issue(AUTHORITY)
    files.client_ca.write_text("no certificate")
    with pytest.raises(AccessError, match="TLS_CLIENT_CA_FILE"):
        files.tls()


async def test_bytes_that_are_no_handshake_end_the_connection(tmp_path: Path) -> None:
    """Plain HTTP gets an answer in plain text, other bytes end the connection, and nothing reaches the kubelet."""
    kubelet = Kubelet()
    timing = ProxyTiming(tick=0.02, request_head=2.0, linger=0.1)
    async with secured(Files(tmp_path, AUTHORITY), kubelet, timing) as proxy:
        got = await proxy.exchange(get_request(cadvisor(kubelet)))
        assert parse_answer(got[got.index(b"HTTP/1.1") :]).status == 400
        assert b"https" in got
        for raw in (b"\x00" * 100, b"\x16\x03\x01\x00\x05hello", b"\x80\x2e\x01", os.urandom(500)):
            assert len(await proxy.attack(raw)) < 100
        assert kubelet.connections == 0
        assert proxy.server.stats().outcomes[Outcome.HANDSHAKE] >= 3
        await until(lambda: proxy.server.stats().callers == 0)
        assert (await get(proxy, caller_context(AUTHORITY), cadvisor(kubelet))).status == 200


async def test_handshake_that_does_not_come(tmp_path: Path) -> None:
    """A caller that says nothing, or half of a hello, is dropped in the time for a request's head."""
    kubelet = Kubelet()
    timing = ProxyTiming(tick=0.02, request_head=0.2, linger=0.1)
    async with secured(Files(tmp_path, AUTHORITY), kubelet, timing) as proxy:
        for raw in (b"", b"\x16\x03\x01\x02\x00\x01"):
            reader, writer = await proxy.connect()
            writer.write(raw)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(-1), PATIENCE) == b""
        await until(lambda: proxy.server.stats().callers == 0)


async def test_caller_that_leaves(tmp_path: Path) -> None:
    """The call to the kubelet ends at once, whether the caller says farewell or resets."""

    async def hang(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.read()

    kubelet = Kubelet(hang)
    async with secured(Files(tmp_path, AUTHORITY), kubelet) as proxy:
        for count, leave in enumerate(("close", "abort"), 1):
            kubelet.left.clear()
            caller = await connect(proxy, caller_context(AUTHORITY))
            caller.writer.write(get_request(cadvisor(kubelet)))
            await until(lambda count=count: len(kubelet.requests) == count)  # type: ignore[misc]  # early bound
            getattr(caller.writer.transport, leave)()
            await asyncio.wait_for(kubelet.left.wait(), PATIENCE)
        await until(lambda: proxy.server.stats().running == 0)


async def test_second_request_at_once(tmp_path: Path) -> None:
    """The rules for requests are the plain connection's: two in one record are refused."""
    kubelet = Kubelet()
    async with secured(Files(tmp_path, AUTHORITY), kubelet) as proxy:
        for raw, status in (
            (get_request(cadvisor(kubelet)) * 2, 400),
            (b"GET /" + b"a" * 70_000, 414),
            (get_request(cadvisor(kubelet)).replace(b"GET", b"POST"), 405),
        ):
            caller = await connect(proxy, caller_context(AUTHORITY))
            caller.writer.write(raw)
            assert (await caller.reader.readline()).split()[1] == str(status).encode()
            caller.writer.transport.abort()
        assert kubelet.connections == 0


async def test_draining_over_tls(tmp_path: Path) -> None:
    """Scrapes under way finish, idle connections end, and nothing new begins."""
    release = asyncio.Event()

    async def wait(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await release.wait()
        writer.write(answer())

    kubelet = Kubelet(wait)
    async with secured(Files(tmp_path, AUTHORITY), kubelet) as proxy:
        context = caller_context(AUTHORITY)
        busy, idle = await connect(proxy, context), await connect(proxy, context)
        scrape = asyncio.create_task(busy.get(cadvisor(kubelet)))
        await until(lambda: bool(kubelet.requests))
        draining = asyncio.create_task(proxy.server.drain(5))
        assert await idle.ends()
        release.set()
        assert (await scrape).body == METRICS
        await asyncio.wait_for(draining, PATIENCE)
