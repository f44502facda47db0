"""The client of Consul: who is at fault when something goes wrong, and what is sent."""

import asyncio
import contextlib
import dataclasses
import ssl
from pathlib import Path

import pytest
import trustme
from aiohttp import web
from structlog.testing import capture_logs

from k8s_consul_registrar.consul import client as client_module
from k8s_consul_registrar.consul.access import (
    ConsulAccess,
    ConsulAddress,
    ConsulTokenFile,
)
from k8s_consul_registrar.consul.client import ConsulClient, Fence
from k8s_consul_registrar.consul.health import RequestOutcome
from k8s_consul_registrar.errors import (
    AccessError,
    ConsulBusy,
    ConsulError,
    ConsulFenced,
    ConsulForbidden,
    ConsulRefused,
    ConsulUnreachable,
)
from k8s_consul_registrar.rotating import Derived
from k8s_consul_registrar.tls import CONSUL, Trust, client_tls
from support.scripted import IMPATIENT, QUICK, client_of, serving
from support.waiting import unless_late


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, ConsulRefused),
        (403, ConsulForbidden),
        (404, ConsulRefused),
        (413, ConsulRefused),
        (429, ConsulBusy),
        (500, ConsulBusy),
        (503, ConsulBusy),
        (301, ConsulRefused),
    ],
)
async def test_status_becomes_an_error(status: int, error: type[ConsulError]) -> None:
    """Each status says who is at fault; the text is cut short and printable."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text="bad\x1b[31m\n" + "x" * 5000)

    async with serving(answer) as url, client_of(url) as client:
        with pytest.raises(error) as raised:
            await client.request("GET", "/v1/agent/services")
    assert type(raised.value) is error
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400


async def test_retry_after_is_passed_on() -> None:
    """The wait that Consul asks for is part of the error."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": "7"})

    async with serving(answer) as url, client_of(url) as client:
        with pytest.raises(ConsulBusy) as raised:
            await client.request("GET", "/v1/x")
    assert raised.value.retry_after == 7


async def test_unreachable() -> None:
    """A refused connection, a hang and a cut answer are all `ConsulUnreachable`."""
    async with client_of("http://127.0.0.1:9") as client:
        with pytest.raises(ConsulUnreachable, match=r"http://127\.0\.0\.1:9: (?!.*ssl)"):
            await client.request("GET", "/v1/x")

    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        raise AssertionError

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"{")
        assert request.transport is not None
        request.transport.abort()
        return response

    for answer in (hang, cut):
        async with serving(answer) as url, client_of(url, timing=IMPATIENT) as client:
            with pytest.raises(ConsulUnreachable):
                await client.request("GET", "/v1/x")


async def test_request_carries_token_namespace_and_partition() -> None:
    """The token, namespace and partition go with every request; a redirect is not followed."""
    seen: list[web.Request] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request)
        return web.Response(text="{}")

    async with (
        serving(answer) as url,
        client_of(f"{url}/prefix", token="t0p", namespace="n", partition="p") as client,
    ):
        await client.request("PUT", "/v1/agent/service/deregister/a%2Fb", params={"x": "1"})
    (request,) = seen
    assert request.headers["X-Consul-Token"] == "t0p"
    assert request.headers["Accept-Encoding"] == "identity"
    assert request.headers["Content-Type"] == "application/json"
    assert request.raw_path == "/prefix/v1/agent/service/deregister/a%2Fb?ns=n&partition=p&x=1"


async def test_blocking_query_is_waited_for() -> None:
    """The wait of a blocking query, and its sixteenth more, is not taken for a hang; a stream's pause is."""

    async def attempt(stretch: int) -> None:
        async def late(_: web.Request) -> web.Response:
            await asyncio.sleep(1.3 * stretch)
            return web.Response(headers={"X-Consul-Index": "9"})

        timing = dataclasses.replace(IMPATIENT, read_timeout=stretch)
        async with serving(late) as url, client_of(url, timing=timing) as client:
            assert (await client.request("GET", "/v1/x", wait=stretch)).index == 9
            with pytest.raises(ConsulUnreachable, match="no answer in time"):
                await client.request("GET", "/v1/x")
            with pytest.raises(ConsulUnreachable, match="no answer in time"):
                async with client.stream("/v1/x"):
                    pass

    await unless_late(attempt, by=0.2)


@pytest.mark.parametrize(
    ("begins", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Odd: ", b"a"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n", b"1\r\n \r\n"),
    ],
    ids=["head", "body"],
)
async def test_stream_that_drips_without_end_breaks_off(begins: bytes, drop: bytes) -> None:
    """Each byte ends the wait for the next, so only a bound on the whole lets a resync go on."""
    ended = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(begins)
            while not writer.is_closing():
                writer.write(drop)
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        ended.set()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    timing = dataclasses.replace(IMPATIENT, read_timeout=0.1)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        async with client_of(url, timing=timing) as client:
            with pytest.raises(ConsulUnreachable, match="no answer in time"):
                await _read_on(client)
            assert client.health.reads is RequestOutcome.FAILURE
        await ended.wait()


async def _read_on(client: ConsulClient) -> None:
    async with client.stream("/v1/x") as answer:
        async for _ in answer.chunks:
            pass


async def test_answer_without_end_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill the memory within the time that an answer may take."""
    monkeypatch.setattr(client_module, "MOST_BODY", 1 << 20)

    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(bytes(1 << 16))
        return response

    async with serving(flood) as url, client_of(url) as client:
        with pytest.raises(ConsulUnreachable, match="longer than any"):
            await client.request("GET", "/v1/x")


@pytest.mark.parametrize("status", [0, 504], ids=["cut", "504"])
async def test_blocking_query_that_a_balancer_ends_is_no_outage(status: int) -> None:
    """It says nothing of Consul; a look does."""

    async def end(request: web.Request) -> web.Response:
        if "index" not in request.query:
            return web.Response(headers={"X-Consul-Index": "7"})
        if not status:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=504, text="upstream request timeout")

    async with serving(end) as url, client_of(url) as client:
        await client.request("GET", "/v1/x")
        for _ in range(3):
            with pytest.raises(ConsulError):
                await client.request("GET", "/v1/x", params={"index": "7"}, wait=45)
            assert client.health.is_up
        assert client.health.open_at == float("-inf")


async def test_blocking_query_ends_with_the_client() -> None:
    """A query that still waits neither outlives the client nor holds it up."""

    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        raise AssertionError

    async with serving(hang) as url:
        async with client_of(url) as client:
            task = client.start(client.request("GET", "/v1/x", wait=60))
            await asyncio.sleep(0.05)
        assert task.cancelled()


async def test_fence_is_asked_for_each_write_and_for_no_read() -> None:
    """A replica that does not lead sends no write; one that loses its lead breaks off what is under way."""
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.method)
        if request.path == "/v1/slow":
            await asyncio.sleep(5)
        return web.Response(text="{}")

    left = [0.0]
    async with serving(answer) as url:
        access = ConsulAccess(ConsulAddress(url))
        async with ConsulClient(access, QUICK, fence=Fence(lambda: left[0], 5.0)) as client:
            with pytest.raises(ConsulFenced):
                await client.request("PUT", "/v1/x")
            await client.request("GET", "/v1/x")
            assert seen == ["GET"]
            left[0] = 10.0
            await client.request("PUT", "/v1/x")
            assert client.health.writes is RequestOutcome.SUCCESS
            left[0] = 0.1
            asyncio.get_running_loop().call_later(0.05, left.__setitem__, 0, 0.0)
            with pytest.raises(ConsulFenced):
                await client.request("PUT", "/v1/slow")
            assert client.health.writes is RequestOutcome.SUCCESS


async def test_write_that_hangs_while_we_lead_is_an_outage() -> None:
    """The lead is renewed while the write hangs, so Consul is at fault, and that shows."""

    async def hang(request: web.Request) -> web.Response:
        if request.method == "PUT":
            await asyncio.sleep(5)
        return web.Response(text="{}")

    async with serving(hang) as url:
        fence = Fence(lambda: 0.1, 1.0)
        async with ConsulClient(ConsulAccess(ConsulAddress(url)), QUICK, fence=fence) as client:
            with pytest.raises(ConsulUnreachable, match="no answer in time"):
                await client.request("PUT", "/v1/x", body=b"{}")
            assert client.health.writes is RequestOutcome.FAILURE
            await client.request("GET", "/v1/x")
            assert not client.health.is_up
            assert "no answer in time" in client.health.problem


async def test_unix_socket(tmp_path: Path) -> None:
    """Consul may listen on a Unix socket."""
    path = tmp_path / "consul.sock"

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="here")

    app = web.Application()
    app.router.add_get("/v1/x", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    access = ConsulAccess(ConsulAddress("http://consul", str(path)))
    async with ConsulClient(access, QUICK) as client:
        assert (await client.request("GET", "/v1/x")).body == b"here"
    await runner.cleanup()


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    """Return an authority whose certificate is in `ca.pem`, with one for 127.0.0.1 in `server.pem`."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    return ca


async def test_tls(tmp_path: Path, authority: trustme.CA) -> None:
    """Consul's certificate is verified by the given authority, under the expected name."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("server.dc1.consul").configure_cert(server)

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_get("/v1/x", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server)
    await site.start()
    address = ConsulAddress(f"https://127.0.0.1:{runner.addresses[0][1]}")
    trusting = client_tls(CONSUL, str(tmp_path / "ca.pem"))

    async def body(tls: Derived[Trust], name: str = "") -> bytes:
        async with ConsulClient(ConsulAccess(address, tls=tls, tls_server_name=name), QUICK) as client:
            return (await client.request("GET", "/v1/x")).body

    assert await body(trusting, "server.dc1.consul") == b"ok"
    assert await body(client_tls(CONSUL, is_verified=False)) == b"ok"
    with pytest.raises(ConsulUnreachable, match="CONSUL_TLS_SERVER_NAME"):
        await body(trusting)
    with pytest.raises(ConsulUnreachable, match="CONSUL_CACERT"):
        await body(client_tls(CONSUL), "server.dc1.consul")
    await runner.cleanup()


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files looked at whenever what they hold is asked for."""
    monkeypatch.setattr("k8s_consul_registrar.rotating.LOOK_EVERY", 0.0)


@pytest.mark.usefixtures("looks_at_once")
async def test_certificates_are_renewed_while_we_run(tmp_path: Path, authority: trustme.CA) -> None:
    """A new authority and a new client certificate count for the next connection, without a restart."""
    shown: list[str] = []
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(server)
    authority.issue_cert("127.0.0.1").configure_cert(server)

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        shown.append(request.transport.get_extra_info("peercert")["subjectAltName"][0][1])
        return web.Response(text="ok", headers={"Connection": "close"})

    def issue(name: str, by: trustme.CA) -> None:
        by.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")

    app = web.Application()
    app.router.add_get("/v1/x", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server).start()
    issue("first.example", authority)
    tls = client_tls(CONSUL, str(tmp_path / "ca.pem"), str(tmp_path / "own.pem"))
    access = ConsulAccess(ConsulAddress(f"https://127.0.0.1:{runner.addresses[0][1]}"), tls=tls)
    async with ConsulClient(access, QUICK) as client:
        await client.request("GET", "/v1/x")
        issue("second.example", authority)
        await client.request("GET", "/v1/x")
        other = trustme.CA()
        other.issue_cert("127.0.0.1").configure_cert(server)
        other.configure_trust(server)
        with pytest.raises(ConsulUnreachable, match="CONSUL_CACERT"):
            await client.request("GET", "/v1/x")
        (tmp_path / "ca.pem").write_text("half-way")
        with pytest.raises(ConsulUnreachable, match="CONSUL_CACERT"):
            await client.request("GET", "/v1/x")
        other.cert_pem.write_to_path(tmp_path / "ca.pem")
        await client.request("GET", "/v1/x")
        issue("third.example", other)
        await client.request("GET", "/v1/x")
    await runner.cleanup()
    assert shown == ["first.example", "second.example", "second.example", "third.example"]


def test_unusable_tls_files_are_named(tmp_path: Path) -> None:
    """The setting and the file are in the error."""
    (tmp_path / "bad.pem").write_text("nonsense")
    with pytest.raises(AccessError, match=r"CONSUL_CACERT: cannot read .*none\.pem"):
        client_tls(CONSUL, str(tmp_path / "none.pem"))
    with pytest.raises(AccessError, match=r"CONSUL_CLIENT_CERT .*bad\.pem"):
        client_tls(CONSUL, certificate=str(tmp_path / "bad.pem"))


def test_token_file_is_read_again_as_it_changes(tmp_path: Path) -> None:
    """A rotated token is used; a file that is missing for a moment leaves the last one; never shown."""
    now = [0.0]
    file = tmp_path / "token"
    access = ConsulAccess(ConsulAddress("http://x"), token="given-secret", token_file=str(file))
    assert "given-secret" not in repr(access)
    token = ConsulTokenFile(access.token_file, clock=lambda: now[0])
    with pytest.raises(AccessError, match="CONSUL_HTTP_TOKEN_FILE"):
        token.current()
    file.write_text("one\n")
    assert (token.current(), token.version) == ("one", 0)
    file.write_text("two\n")
    assert token.current() == "one"
    now[0] += 5
    assert (token.current(), token.version) == ("two", 1)
    file.unlink()
    now[0] += 5
    assert (token.current(), token.version) == ("two", 1)


BROKEN_TOKENS = [
    b"",
    b" \n",
    b"a b\nc\x7f\n",
    b"two\nlines\n",
    b"\xff\xfe",
    "tök".encode(),
    b"secret-tok",
    b"x" * (5 << 20),
]


@pytest.mark.parametrize("content", BROKEN_TOKENS, ids=range(len(BROKEN_TOKENS)))
def test_token_file_that_holds_no_token_leaves_the_last_one(tmp_path: Path, content: bytes) -> None:
    """Truncated for a moment it was the anonymous token, and two changes of the token."""
    now = [0.0]
    file = tmp_path / "token"
    file.write_text("secret-token\n")
    access = ConsulAccess(ConsulAddress("http://x"), token_file=str(file))
    token = ConsulTokenFile(access.token_file, clock=lambda: now[0])
    assert (token.current(), token.version) == ("secret-token", 0)
    file.write_bytes(content)
    with capture_logs() as logs:
        for _ in range(3):
            now[0] += 6
            assert (token.current(), token.version) == ("secret-token", 0)
        file.write_text("secret-token\n")
        now[0] += 6
        assert (token.current(), token.version) == ("secret-token", 0)
        file.write_text("another-token\n")
        now[0] += 6
        assert (token.current(), token.version) == ("another-token", 1)
    assert [line["event"] for line in logs][:2] == [
        "changed files cannot be used; those before stay in use",
        "changed files are in use",
    ]
    assert "CONSUL_HTTP_TOKEN_FILE" in logs[0]["problem"]
    if content != b"secret-tok":
        file.write_bytes(content)
        with pytest.raises(AccessError, match="CONSUL_HTTP_TOKEN_FILE"):
            ConsulTokenFile(access.token_file).current()
