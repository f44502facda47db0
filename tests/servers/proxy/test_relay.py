"""Scrapes through the whole relay: what passes, what each failure is answered, what is kept."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import pytest
import trustme

from k8s_consul_registrar.errors import AccessError
from k8s_consul_registrar.proxy.config import ProxyTiming
from k8s_consul_registrar.proxy.nodes import NodeTable
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.tls import Trust
from support.processes import reserve_ports
from support.proxy_lab import (
    METRICS,
    PLAIN,
    TOKEN,
    Behaviour,
    Kubelet,
    Proxy,
    always,
    answer,
    authority_pem,
    cadvisor,
    get_request,
    hang,
    proxying,
)
from support.waiting import until

pytestmark = pytest.mark.both_loops


@contextlib.asynccontextmanager
async def relaying(behave: Behaviour | None = None) -> AsyncIterator[tuple[Kubelet, Proxy]]:
    """Run one kubelet, of this behaviour, and a proxy in front of it."""
    kubelet = Kubelet(behave) if behave is not None else Kubelet()
    async with kubelet.serving(), proxying(kubelet.node()) as proxy:
        yield kubelet, proxy


async def test_scrape() -> None:
    """Relays a kubelet's answer, with what a scrape needs of its head and nothing else."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Encoding: gzip\r\n"
        b"Set-Cookie: a=b\r\nConnection: keep-alive, X-Secret\r\nX-Secret: 1\r\nTrailer: X\r\n"
        b"Process-Start-Time-Unix: 1\r\n"
    )
    async with relaying(always(answer(b"\x1f\x8b bytes untouched \x00\xff", head))) as (kubelet, proxy):
        got = await proxy.get(
            cadvisor(kubelet) + "?match=x",
            "Accept: application/openmetrics-text",
            "Accept-Encoding: gzip",
            "Authorization: Bearer the-callers-own",
            "Cookie: a=b",
            "X-Forwarded-For: 192.0.2.1",
            "Proxy-Authorization: Basic eA==",
            "TE: trailers",
        )
        assert got.status == 200
        assert got.body == b"\x1f\x8b bytes untouched \x00\xff"
        assert got.fields == {
            "content-type": "text/plain; version=0.0.4",
            "content-encoding": "gzip",
            "content-length": str(len(got.body)),
            "connection": "close",
        }
        (sent,) = kubelet.requests
        line, *fields = sent.decode().split("\r\n")
        assert line == "GET /metrics/cadvisor HTTP/1.1"
        assert {field.split(":")[0] for field in fields if field} == {
            "Host",
            "User-Agent",
            "Accept",
            "Accept-Encoding",
            "Authorization",
        }
        assert f"Host: 127.0.0.1:{kubelet.port}" in fields
        assert f"Authorization: Bearer {TOKEN}" in fields
        assert "Accept: application/openmetrics-text" in fields


async def test_scrape_by_name_and_over_ipv6() -> None:
    """Relays by the Node's name in the API server's form, and by an IPv6 address on both sides."""
    kubelet = Kubelet(host="::1")
    try:
        async with kubelet.serving(), proxying(kubelet.node("worker-1")) as proxy:
            assert (await proxy.get("/api/v1/nodes/worker-1/proxy/metrics/cadvisor")).body == METRICS
            escaped = f"/api/v1/nodes/%5B::1%5D:{kubelet.port}/metrics/cadvisor"
            reader, writer = await proxy.connect("::1")
            writer.write(get_request(escaped, "Connection: close"))
            assert METRICS in await reader.read()
            writer.close()
    except OSError as error:
        pytest.skip(f"no ::1 on this machine: {error}")


async def test_many_scrapes_on_kept_connections() -> None:
    """Keeps both sides' connections between scrapes."""
    async with relaying() as (kubelet, proxy):
        reader, writer = await proxy.connect()
        for _ in range(20):
            writer.write(get_request(cadvisor(kubelet)))
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"connection" not in head.lower()
            assert await reader.readexactly(len(METRICS)) == METRICS
        writer.close()
        assert kubelet.connections == 1
        assert len(kubelet.requests) == 20
        stats = proxy.server.stats()
        assert (stats.outcomes[Outcome.OK], stats.dials, stats.reuses, stats.kept) == (20, 1, 19, 1)
        assert stats.body_bytes == 20 * len(METRICS)


@pytest.mark.parametrize("piece", [1, 7, 100_000])
async def test_big_bodies(piece: int) -> None:
    """Relays a megabyte byte for byte, with a length and in chunks of any size."""
    body = bytes(range(256)) * (4096 if piece > 7 else 64)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in split(body, piece)) + b"0\r\n\r\n"
    for payload in (answer(body), PLAIN + b"Transfer-Encoding: chunked\r\n\r\n" + chunks):
        async with relaying(always(payload)) as (kubelet, proxy):
            for _ in range(2):
                assert (await proxy.get(cadvisor(kubelet))).body == body
            assert kubelet.connections == 1


def split(body: bytes, piece: int) -> list[bytes]:
    """Cut a body into pieces."""
    return [body[start : start + piece] for start in range(0, len(body), piece)]


async def test_head_and_chunks_in_pieces() -> None:
    """Puts an answer together that comes a few bytes at a time, interim answers before it skipped."""
    payload = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        + PLAIN
        + b"Transfer-Encoding: chunked\r\n\r\n5;ext=1\r\nhello\r\n1\r\n!\r\n0\r\n\r\n"
    )

    async def trickle(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for start in range(0, len(payload), 3):
            writer.write(payload[start : start + 3])
            await asyncio.sleep(0.001)

    async with relaying(trickle) as (kubelet, proxy):
        for _ in range(2):
            assert (await proxy.get(cadvisor(kubelet))).body == b"hello!"
        assert kubelet.connections == 1


async def test_trailers() -> None:
    """Passes a body with trailers whole, and lets no other answer follow on either connection."""
    chunks = b"5\r\nhello\r\n0\r\nX-Checksum: 1\r\n\r\n"
    payload = PLAIN + b"Trailer: X-Checksum\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    async with relaying(always(payload)) as (kubelet, proxy):
        raw = await proxy.exchange(get_request(cadvisor(kubelet)))
        head, _, body = raw.partition(b"\r\n\r\n")
        assert b"trailer" not in head.lower()
        assert body.startswith(b"5\r\nhello\r\n0\r\n")
        assert proxy.server.stats().kept == 0


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 12\r\n\r\nUnauthorized", "401"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", "get on nodes/metrics"),
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\nno", "500"),
        (b"HTTP/1.1 301 Moved\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n", "301"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "204"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\nno", "206"),
        (b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", "999"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "protocol"),
        (PLAIN + b"\r\nuntil the end", "neither a length nor chunks"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", "neither a length nor chunks"),
        (PLAIN + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "transfer encoding"),
        (PLAIN + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", "does not parse"),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "transfer encoding"),
        (PLAIN + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", "does not parse"),
        (PLAIN + b"Content-Length: -1\r\n\r\n", "does not parse"),
        (PLAIN + b"Content-Length: 5\r\n\r\nhello and more", "more than the length"),
        (PLAIN + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "chunks do not parse"),
        (
            PLAIN + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
            "more than its chunks",
        ),
        (b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n", "does not speak HTTP/1.1"),
        (b"RTSP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "does not speak HTTP/1.1"),
        (b"garbage\r\n\r\n", "does not speak HTTP/1.1"),
        (PLAIN + b"X: " + b"y" * 70_000 + b"\r\n\r\n", "too long"),
        (PLAIN + b"X: a\r\n folded\r\nContent-Length: 0\r\n\r\n", "does not parse"),
        (PLAIN.replace(b"\r\n", b"\n") + b"Content-Length: 0\n\n\r\n\r\n", "does not parse"),
    ],
)
async def test_bad_answers(payload: bytes, words: str) -> None:
    """Answers 502 in words to whatever is no 200 with a body that can be relayed, and keeps no connection."""
    async with relaying(always(payload)) as (kubelet, proxy):
        got = await proxy.get(cadvisor(kubelet))
        assert got.status == 502
        assert got.fields["content-type"] == "text/plain; charset=utf-8"
        assert words in got.body.decode()
        assert len(kubelet.requests) == 1
        await until(lambda: kubelet.open_now == 0)


@pytest.mark.parametrize(
    "payload",
    [
        PLAIN + b"Content-Length: 1000\r\n\r\nnot all of it",
        PLAIN + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        PLAIN + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
    ],
)
async def test_cut_midway(payload: bytes) -> None:
    """Resets the caller's connection where the kubelet's answer is cut, so that it does not look complete."""
    async with relaying(always(payload, then_close=True)) as (kubelet, proxy):
        reader, writer = await proxy.connect()
        writer.write(get_request(cadvisor(kubelet)))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        await until(lambda: proxy.server.stats().outcomes[Outcome.CUT] == 1)
        assert len(kubelet.requests) == 1


async def test_bad_chunk_after_the_first_byte() -> None:
    """Resets the caller's connection where the framing breaks after the answer began."""

    async def break_off(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(PLAIN + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"nonsense\r\n")

    async with relaying(break_off) as (kubelet, proxy):
        with pytest.raises(ConnectionResetError):
            await proxy.exchange(get_request(cadvisor(kubelet)))


async def test_refused_connection_is_502_with_the_reason() -> None:
    """Answers 502 with the reason where the connection is refused."""
    kubelet = Kubelet(port=reserve_ports(1)[0])
    async with proxying(kubelet.node()) as proxy:
        got = await proxy.get(cadvisor(kubelet))
        assert got.status == 502
        assert "connection refused" in got.body.decode()


async def test_unverifiable_certificates() -> None:
    """Names both settings where a kubelet's certificate is signed by another CA or names another host."""
    stranger = Kubelet(signed_by=trustme.CA())
    misnamed = Kubelet(names=("worker-1", "192.0.2.1"))
    for kubelet in (stranger, misnamed):
        async with kubelet.serving(), proxying(kubelet.node()) as proxy:
            got = await proxy.get(cadvisor(kubelet))
            assert got.status == 502
            assert "KUBELET_CA_FILE" in got.body.decode()
            assert "KUBELET_INSECURE_SKIP_TLS_VERIFY" in got.body.decode()
            assert kubelet.requests == []
            assert proxy.server.stats().outcomes[Outcome.UNVERIFIED] == 1


async def test_kubelet_identity_by_choice() -> None:
    """Verifies the Node's name where that is chosen, and nothing where the operator says so."""
    by_name = Kubelet(names=("worker-1",))
    async with by_name.serving(), proxying(by_name.node("worker-1"), verify_node_name=True) as proxy:
        assert (await proxy.get(cadvisor(by_name))).status == 200
    async with by_name.serving(), proxying(by_name.node("worker-2"), verify_node_name=True) as proxy:
        assert (await proxy.get(cadvisor(by_name))).status == 502
    stranger = Kubelet(signed_by=trustme.CA())
    blind = Trust(is_verified=False).context
    async with stranger.serving(), proxying(stranger.node(), context=blind) as proxy:
        assert (await proxy.get(cadvisor(stranger))).status == 200


def test_kubelet_certificate_is_verified_as_go_does() -> None:
    """Verifies as Go does on every Python: by subject alternative names, without the strictness of RFC 5280."""
    context = Trust(authority_pem()).context
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert not context.hostname_checks_common_name
    assert not context.verify_flags & ssl.VerifyFlags.VERIFY_X509_STRICT
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


async def test_plain_http_kubelet() -> None:
    """Answers 502 where the kubelet's port speaks no TLS, and sends it no token."""
    heard = bytearray()

    async def speak_plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.read(100))
        writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n")
        writer.close()

    server = await asyncio.start_server(speak_plain, "127.0.0.1", 0)
    kubelet = Kubelet(port=server.sockets[0].getsockname()[1])
    async with proxying(kubelet.node()) as proxy:
        got = await proxy.get(cadvisor(kubelet))
        assert got.status == 502
        assert "TLS" in got.body.decode()
        assert TOKEN.encode() not in heard
    server.close()


async def test_credentials() -> None:
    """Sends each scrape the token of its moment, none where there is none, and says where none can be had."""
    tokens = ["first", "second", "", "line\r\nbreak"]
    async with Kubelet().serving() as kubelet, proxying(kubelet.node(), token=lambda: tokens[0]) as proxy:
        for _ in range(3):
            assert (await proxy.get(cadvisor(kubelet))).status == 200
            tokens.pop(0)
        assert [b"Bearer" in request for request in kubelet.requests] == [True, True, False]
        assert b"Bearer second" in kubelet.requests[1]
        got = await proxy.get(cadvisor(kubelet))
        assert got.status == 503
        assert b"break" not in got.body
        assert len(kubelet.requests) == 3

    def unreadable() -> str:
        raise AccessError("the token file is gone")

    async with kubelet.serving(), proxying(kubelet.node(), token=unreadable) as proxy:
        assert (await proxy.get(cadvisor(kubelet))).status == 503


async def test_client_certificate_to_the_kubelet(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shows a client certificate where one is given."""
    folder = tmp_path_factory.mktemp("client")
    ca = trustme.CA()
    issued = ca.issue_cert("proxy.example")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(server_context)
    ca.configure_trust(server_context)
    server_context.verify_mode = ssl.CERT_REQUIRED

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context)
    kubelet = Kubelet(port=server.sockets[0].getsockname()[1])
    pem = ca.cert_pem.bytes().decode()
    known = Trust(pem).context
    known.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    async with proxying(kubelet.node(), context=known, token=lambda: "") as proxy:
        assert (await proxy.get(cadvisor(kubelet))).status == 200
    async with proxying(kubelet.node(), context=Trust(pem).context) as proxy:
        assert (await proxy.get(cadvisor(kubelet))).status == 502
    server.close()


async def test_closed_idle_connection() -> None:
    """Dials once more where the kubelet closed a kept connection, also just as it is used."""

    async def close_after(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if kubelet.requests.count(request) % 2:
            writer.write(answer())
            await writer.drain()
        else:
            writer.transport.abort()

    async with relaying(close_after) as (kubelet, proxy):
        for _ in range(3):
            # Each second request is swallowed by the kubelet, which closes; the retry is the odd one again.
            assert (await proxy.get(cadvisor(kubelet))).status == 200
        stats = proxy.server.stats()
        assert stats.retries == 2
        assert stats.dials == kubelet.connections == 3

    async with relaying(always(answer(), then_close=True)) as (kubelet, proxy):
        for count in range(1, 4):
            assert (await proxy.get(cadvisor(kubelet))).status == 200
            await until(lambda: kubelet.open_now == 0)
            assert kubelet.connections == count
        assert proxy.server.stats().retries <= 3


async def test_cut_on_a_kept_connection() -> None:
    """Does not ask again where the answer on a kept connection has begun and is cut."""

    async def cut_the_second(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(answer() if len(kubelet.requests) == 1 else PLAIN + b"Content-Length: 9\r\n\r\nhalf")
        await writer.drain()
        if len(kubelet.requests) > 1:
            writer.close()

    async with relaying(cut_the_second) as (kubelet, proxy):
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        with pytest.raises(ConnectionResetError):
            await proxy.exchange(get_request(cadvisor(kubelet)))
        assert len(kubelet.requests) == 2
        assert proxy.server.stats().retries == 0


async def test_close_announced() -> None:
    """Keeps no connection the kubelet means to close."""
    async with relaying(always(answer(head=PLAIN + b"Connection: close\r\n"))) as (kubelet, proxy):
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        assert proxy.server.stats().kept == 0
    async with relaying(always(answer(head=b"HTTP/1.0 200 OK\r\n"))) as (kubelet, proxy):
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        assert proxy.server.stats().kept == 0


async def test_idle_connections_end() -> None:
    """Closes a kept connection that is idle for too long, and one that speaks unasked."""
    timing = ProxyTiming(tick=0.02, upstream_idle=2.0)
    async with Kubelet().serving() as kubelet, proxying(kubelet.node(), timing=timing) as proxy:
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        assert proxy.server.stats().kept == 1
        await until(lambda: kubelet.open_now == 0)
        assert proxy.server.stats().kept == 0

    async def speak_twice(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(answer())
        await asyncio.sleep(0.05)
        writer.write(answer(b"unasked"))

    async with relaying(speak_twice) as (kubelet, proxy):
        for _ in range(2):
            assert (await proxy.get(cadvisor(kubelet))).body == METRICS
            await until(lambda: kubelet.open_now == 0)


async def test_node_leaves() -> None:
    """Answers 404 and closes the kept connection once a Node has left the table or was replaced by another."""
    async with relaying() as (kubelet, proxy):
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        proxy.nodes.replace(NodeTable.of([kubelet.node("node-1", uid="another")], allow_loopback=True))
        proxy.server.notice_nodes()
        await until(lambda: kubelet.open_now == 0)
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        assert kubelet.connections == 2
        proxy.nodes.replace(NodeTable())
        assert (await proxy.get(cadvisor(kubelet))).status == 404
        await until(lambda: kubelet.open_now == 0)
        proxy.nodes.forget()
        assert (await proxy.get(cadvisor(kubelet))).status == 503


async def test_node_leaves_during_its_scrape() -> None:
    """Lets a scrape under way finish when its Node leaves, and keeps its connection no longer."""
    gate = asyncio.Event()

    async def wait_for_gate(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await gate.wait()
        writer.write(answer())

    async with relaying(wait_for_gate) as (kubelet, proxy):
        scrape = asyncio.create_task(proxy.get(cadvisor(kubelet)))
        await until(lambda: len(kubelet.requests) == 1)
        proxy.nodes.replace(NodeTable())
        proxy.server.notice_nodes()
        gate.set()
        assert (await scrape).body == METRICS
        await until(lambda: kubelet.open_now == 0)
        assert proxy.server.stats().kept == 0


async def test_too_many_kept_connections() -> None:
    """Closes the connection idle for the longest where there are too many."""
    kubelets = [Kubelet(host=host, names=(host,)) for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3")]
    async with contextlib.AsyncExitStack() as stack:
        for kubelet in kubelets:
            await stack.enter_async_context(kubelet.serving())
        nodes = [kubelet.node(f"node-{number}") for number, kubelet in enumerate(kubelets)]
        proxy = await stack.enter_async_context(proxying(*nodes, kept_connections=2))
        for kubelet in (*kubelets[:2], kubelets[0], kubelets[2]):
            assert (await proxy.get(cadvisor(kubelet))).status == 200
        await until(lambda: [kubelet.open_now for kubelet in kubelets] == [1, 0, 1])
        assert proxy.server.stats().kept == 2


async def test_replaced_context() -> None:
    """Uses no connection made under a CA that was replaced since."""
    contexts = [Trust(authority_pem()).context for _ in range(2)]
    async with Kubelet().serving() as kubelet, proxying(kubelet.node(), context=contexts) as proxy:
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        contexts.pop(0)
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        assert kubelet.connections == 2


async def test_nodes_not_yet_known() -> None:
    """Answers 503 until the Nodes are known, and then relays."""
    async with Kubelet().serving() as kubelet, proxying(known=False) as proxy:
        assert (await proxy.get(cadvisor(kubelet))).status == 503
        proxy.nodes.replace(NodeTable.of([kubelet.node()], allow_loopback=True))
        assert (await proxy.get(cadvisor(kubelet))).status == 200


async def test_loopback_is_not_dialled() -> None:
    """Dials no loopback address unless allowed, whatever a Node claims."""
    async with Kubelet().serving() as kubelet, proxying(kubelet.node(), allow_loopback=False) as proxy:
        assert (await proxy.get(cadvisor(kubelet))).status == 404
        assert kubelet.connections == 0


async def test_environment_proxies_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dials the kubelet itself whatever proxies the environment names."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with relaying() as (kubelet, proxy):
        assert (await proxy.get(cadvisor(kubelet))).status == 200


@pytest.mark.parametrize("seconds", ["0.00001", "0.5"])
async def test_a_timeout_that_is_too_short_is_no_failure_of_the_kubelet(seconds: str) -> None:
    """A client that announces one gets a 504, and neither the list of failures nor the alert's outcomes grow."""
    kubelet = Kubelet(hang)
    async with kubelet.serving(), proxying(kubelet.node()) as proxy:
        got = await proxy.get(cadvisor(kubelet), f"X-Prometheus-Scrape-Timeout-Seconds: {seconds}")
        assert got.status == 504
        assert proxy.server.failures() == []
        outcomes = proxy.server.stats().outcomes
        assert (outcomes[Outcome.CALLER_LEFT], outcomes[Outcome.TIMEOUT]) == (1, 0)
        await proxy.get(cadvisor(kubelet), "X-Prometheus-Scrape-Timeout-Seconds: 1")
        assert [one.outcome for one in proxy.server.failures()] == [Outcome.TIMEOUT]


@pytest.mark.parametrize(
    "banner", [b"J\x00\x00\x00\n8.0.36\x00", b"SSH-2.0-OpenSSH_9.2\r\n", b"H", b"HTTP/2"]
)
async def test_an_answer_that_is_no_http_is_refused_at_its_first_bytes(banner: bytes) -> None:
    """A port that greets and then waits holds no place until the deadline."""
    kubelet = Kubelet(always(banner))
    async with kubelet.serving(), proxying(kubelet.node()) as proxy:
        asking = asyncio.create_task(proxy.get(cadvisor(kubelet), "X-Prometheus-Scrape-Timeout-Seconds: 2"))
        got = await asking
        # A prefix of HTTP may still become an answer.
        assert got.status == (504 if banner == b"H" else 502)
        expected = Outcome.TIMEOUT if banner == b"H" else Outcome.MALFORMED
        assert [one.outcome for one in proxy.server.failures()] == [expected]


@pytest.mark.parametrize("is_cut", [False, True], ids=["close_notify", "cut"])
async def test_client_of_http_1_0_reads_a_kubelet_that_ends_its_answer_by_close(is_cut: bool) -> None:
    """Go's server sends an answer to HTTP/1.0 that is over 2 KB so; one that is cut does not look complete."""
    body = b"a 1\n" * 10_000

    async def behave(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        assert b" HTTP/1.0\r\n" in request
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n" + body)
        await writer.drain()
        if is_cut:
            writer.transport.abort()
        writer.close()

    async with relaying(behave) as (kubelet, proxy):
        reader, writer = await proxy.connect()
        writer.write(b"GET %b HTTP/1.0\r\n\r\n" % cadvisor(kubelet).encode())
        if is_cut:
            with pytest.raises(ConnectionResetError):
                await reader.read()
        else:
            head, _, got = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"chunked" not in head
            assert got == body


@pytest.mark.parametrize("is_verified", [True, False])
async def test_expiry_of_a_kubelets_certificate_is_noted_with_its_scrape(is_verified: bool) -> None:
    """Knows when the certificate expires that a kubelet showed, on a kept connection too; not without verification."""
    context = Trust(authority_pem()).context
    if not is_verified:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with Kubelet().serving() as kubelet, proxying(kubelet.node(), context=context) as proxy:
        for _ in range(2):
            assert (await proxy.get(cadvisor(kubelet))).status == 200
            ((_, last),) = proxy.server.take_last_scrapes().items()
            if is_verified:
                assert last.expires_at is not None
                assert last.expires_at > last.at
            else:
                assert last.expires_at is None
        assert kubelet.connections == 1
