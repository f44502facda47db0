"""Raw bytes against the open port: nothing but the allowed pair is ever connected to."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from k8s_consul_registrar.proxy.config import ProxyTiming
from k8s_consul_registrar.proxy.request import MALFORMED, ONE_AT_A_TIME, VERSION
from k8s_consul_registrar.proxy.routes import CLOSED_PATH, NO_PODS, NOT_A_PATH, UNKNOWN_NODE, UNKNOWN_PATH
from support.proxy_lab import METRICS, Kubelet, Proxy, cadvisor, get_request, proxying
from support.waiting import PATIENCE, until
from unit.proxy.test_route import ATTACKS, PIECES

pytestmark = pytest.mark.both_loops

FIXED_TEXTS = {
    refusal.reason
    for refusal in (
        UNKNOWN_PATH,
        CLOSED_PATH,
        NO_PODS,
        UNKNOWN_NODE,
        NOT_A_PATH,
        MALFORMED,
        VERSION,
        ONE_AT_A_TIME,
    )
}

QUICK = ProxyTiming(tick=0.02)  # nothing ends early, however busy the machine is
IMPATIENT = replace(QUICK, request_head=0.2)


@dataclass
class Ground:
    """A proxy with one allowed kubelet, and a bystander that must never be connected to."""

    proxy: Proxy
    kubelet: Kubelet
    bystander_port: int
    strays: list[int]

    def unharmed(self) -> None:
        """Fail where anything but the allowed path of the allowed kubelet was reached."""
        assert self.strays == []
        for request in self.kubelet.requests:
            assert request.startswith(
                (b"GET /metrics/cadvisor HTTP/1.1\r\n", b"GET /metrics/cadvisor HTTP/1.0\r\n")
            )


@contextlib.asynccontextmanager
async def standing(timing: ProxyTiming = QUICK) -> AsyncIterator[Ground]:
    """Set the ground up."""
    strays: list[int] = []

    async def stray(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        strays.append(1)
        writer.close()

    bystander = await asyncio.start_server(stray, "127.0.0.1", 0)
    port = bystander.sockets[0].getsockname()[1]
    async with Kubelet().serving() as kubelet, proxying(kubelet.node("worker-1"), timing=timing) as proxy:
        try:
            yield Ground(proxy, kubelet, port, strays)
        finally:
            bystander.close()


def status_of(raw: bytes) -> int:
    """Return the status of the first answer."""
    return int(raw.split(b" ")[1]) if raw else 0


async def test_refused_targets() -> None:
    """Refuses every target of the list without a connection to anything."""
    async with standing() as ground:
        for target in ATTACKS:
            aimed = target.replace("192.0.2.1", "127.0.0.1").replace("10250", str(ground.bystander_port))
            raw = await ground.proxy.exchange(get_request(aimed, "Connection: close").replace(b"\xc2", b""))
            assert status_of(raw) in (400, 404, 505), (target, raw)
            assert raw.partition(b"\r\n\r\n")[2].decode().strip() in FIXED_TEXTS, (target, raw)
        assert ground.kubelet.connections == 0
        ground.unharmed()


def raw_attacks(ground: Ground) -> dict[str, tuple[bytes, set[int]]]:
    """Return what may be sent beside a well-formed GET, and the statuses that may answer it (0: none)."""
    good = cadvisor(ground.kubelet).encode()
    host = b"Host: proxy.example\r\n"
    line = b"GET " + good + b" HTTP/1.1\r\n"
    aside = b"127.0.0.1:%d" % ground.bystander_port
    return {
        "CONNECT": (b"CONNECT " + aside + b" HTTP/1.1\r\n" + host + b"\r\n", {405}),
        "absolute form": (b"GET http://" + aside + b"/metrics HTTP/1.1\r\n" + host + b"\r\n", {404}),
        "absolute form without Host": (b"GET http://x" + good + b" HTTP/1.1\r\n\r\n", {400}),
        "absolute form of two hosts": (b"GET http://x,y" + good + b" HTTP/1.1\r\n" + host + b"\r\n", {400}),
        "absolute form of another scheme": (b"GET ftp://x" + good + b" HTTP/1.1\r\n" + host + b"\r\n", {400}),
        "userinfo": (b"GET http://a@" + aside + b"/ HTTP/1.1\r\n" + host + b"\r\n", {400}),
        "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", {405}),
        "POST": (b"POST " + good + b" HTTP/1.1\r\n" + host + b"Content-Length: 3\r\n\r\nabc", {405}),
        "POST chunked": (
            b"POST " + good + b" HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            {405},
        ),
        "HEAD": (b"HEAD " + good + b" HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", {405}),
        "TRACE": (b"TRACE " + good + b" HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", {405}),
        "lower case method": (b"get " + good + b" HTTP/1.1\r\n" + host + b"\r\n", {405}),
        "invented method": (b"SCRAPE " + good + b" HTTP/1.1\r\n" + host + b"\r\n", {405}),
        "GET with a length": (line + host + b"Content-Length: 3\r\n\r\nabc", {400}),
        "GET with chunks": (line + host + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
        "CL and TE": (
            line
            + host
            + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            + line
            + host
            + b"\r\n",
            {400},
        ),
        "TE hidden": (line + host + b"Transfer-Encoding: xchunked\r\n\r\n", {400}),
        "TE with a space": (line + host + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", {400}),
        "two lengths": (line + host + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\nhello", {400}),
        "smuggled request": (line + host + b"\r\n" + line + host + b"\r\n", {400}),
        "smuggled after a length of 0": (
            line + host + b"Content-Length: 0\r\n\r\n" + line + host + b"\r\n",
            {400},
        ),
        "data after close": (line + host + b"Connection: close\r\n\r\n" + line + host + b"\r\n", {400}),
        "line ends after it": (line + host + b"\r\n\r\n\r\n", {400}),
        "many line ends before it": (b"\r\n" * 9 + line + host + b"\r\n", {400}),
        "a bare line end before it": (b"\n" + line + host + b"\r\n", {400}),
        "no Host": (line + b"\r\n", {400}),
        "two Hosts": (line + host + host + b"\r\n", {400}),
        "two Hosts, different": (line + host + b"hOST: " + aside + b"\r\n\r\n", {400}),
        "empty Host": (line + b"Host:\r\n\r\n", {400}),
        "Host with a path": (line + b"Host: proxy.example/x\r\n\r\n", {400}),
        "Host with userinfo": (line + b"Host: a@proxy.example\r\n\r\n", {400}),
        "Host with a space": (line + b"Host: a b\r\n\r\n", {400}),
        "Host list": (line + b"Host: a, b\r\n\r\n", {400}),
        "HTTP/1.0 with a body": (
            b"GET " + good + b" HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc",
            {400},
        ),
        "HTTP/1.0 with two Hosts": (b"GET " + good + b" HTTP/1.0\r\n" + host + host + b"\r\n", {400}),
        "smuggled after HTTP/1.0": (
            b"GET " + good + b" HTTP/1.0\r\n\r\n" + line + host + b"\r\n",
            {400},
        ),
        "HTTP/0.9": (b"GET " + good + b"\r\n\r\n", {505}),
        "HTTP/1.2": (b"GET " + good + b" HTTP/1.2\r\n" + host + b"\r\n", {505}),
        "HTTP/2": (b"GET " + good + b" HTTP/2.0\r\n" + host + b"\r\n", {505}),
        "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {505}),
        "RTSP/1.1": (b"GET " + good + b" RTSP/1.1\r\n" + host + b"\r\n", {400, 505}),
        "smuggled after an upgrade": (
            line + host + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + line + host + b"\r\n",
            {400},
        ),
        "upgrade and a body": (
            line + host + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
            {400},
        ),
        "bare line feeds": ((line + host + b"\n").replace(b"\r\n", b"\n"), {400}),
        "bare carriage return": (line + b"Host: a\rX: y\r\n\r\n", {400}),
        "folded field": (line + host + b"Accept: a\r\n b\r\n\r\n", {400}),
        "space before colon": (line + b"Host : proxy.example\r\n\r\n", {400}),
        "NUL in a field": (line + host + b"Accept: a\x00b\r\n\r\n", {400}),
        "NUL in the target": (b"GET " + good + b"\x00 HTTP/1.1\r\n" + host + b"\r\n", {400}),
        "two spaces": (b"GET  " + good + b" HTTP/1.1\r\n" + host + b"\r\n", {400}),
        "tab for a space": (b"GET\t" + good + b" HTTP/1.1\r\n" + host + b"\r\n", {400}),
        "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),
        "binary": (bytes(range(256)), {400}),
        "long target": (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n" + host + b"\r\n", {414}),
        "endless target": (b"GET /" + b"a" * 100_000, {414}),
        "long head": (line + host + b"X: " + b"a" * 20_000 + b"\r\n\r\n", {431}),
        "many fields": (line + host + b"X: a\r\n" * 10_000 + b"\r\n", {431}),
    }


async def test_raw_attacks() -> None:
    """Answers each attack with its status, once, and connects to nothing for it."""
    async with standing() as ground:
        for name, (raw, statuses) in raw_attacks(ground).items():
            got = await ground.proxy.attack(raw)
            assert status_of(got) in statuses, (name, got)
            assert got.count(b"\r\nContent-Length: ") <= 1, (name, got)
            if b" 405 " in got:
                assert b"\r\nAllow: GET\r\n" in got
            if name == "HEAD":
                assert got.endswith(b"\r\n\r\n")
        assert ground.kubelet.connections == 0
        ground.unharmed()


@pytest.mark.parametrize(("lines", "status"), [(1, 408), (0, 0)])
async def test_head_that_does_not_end(lines: int, status: int) -> None:
    """Answers a head that stops after a line or two when its time is over, and closes where none began."""
    async with standing(IMPATIENT) as ground:
        line = b"GET " + cadvisor(ground.kubelet).encode() + b" HTTP/1.1\r\nHost: proxy.example\r\n"
        got = await ground.proxy.attack(line * lines)
        assert status_of(got) == status
        assert ground.kubelet.connections == 0


@pytest.mark.long
async def test_attacks_byte_by_byte() -> None:
    """Gives the same answer however the bytes of an attack are cut up."""
    async with standing() as ground:
        for name, (raw, statuses) in raw_attacks(ground).items():
            if len(raw) > 2000:
                continue
            got = await ground.proxy.attack(raw, piece=1)
            if "smuggled" in name or "after" in name:
                continue  # split there, the first request is sound: the next test has it
            # llhttp refuses an odd method at its first odd byte, when it is no method yet.
            assert status_of(got) in statuses | ({400} if "method" in name else set()), (name, got)
        assert all(request.startswith(b"GET /metrics/cadvisor ") for request in ground.kubelet.requests)
        ground.unharmed()


@pytest.mark.parametrize("piece", [0, 1])
async def test_odd_but_sound_requests_are_served(piece: int) -> None:
    """Serves what nginx and Go serve: an upgrade offered, the absolute form, an empty line, HTTP/1.0 without Host."""
    async with standing() as ground:
        good = cadvisor(ground.kubelet).encode()
        line, host = b"GET " + good + b" HTTP/1.1\r\n", b"Host: proxy.example\r\nConnection: close\r\n"
        h2c = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
        odd = [
            line + host + h2c + b"\r\n",
            line + host + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"GET http://elsewhere.example:80" + good + b" HTTP/1.1\r\n" + host + b"\r\n",
            b"\r\n" + line + host + b"\r\n",
            line + host + b"\r\n\r\n" if not piece else line + host + b"\r\n",
            b"GET " + good + b" HTTP/1.0\r\n\r\n",
            b"GET " + good + b" HTTP/1.0\r\nConnection: keep-alive\r\nHost: a\r\n\r\n",
        ]
        for number, raw in enumerate(odd, 1):
            got = await ground.proxy.attack(raw, piece=piece)
            assert got.startswith(b"HTTP/1.1 200"), (raw, got)
            assert got.endswith(METRICS)
            assert b"\r\nConnection: close\r\n" in got
            assert len(ground.kubelet.requests) == number
        ground.unharmed()


async def test_connection_goes_on_after_an_upgrade_that_was_ignored() -> None:
    """Serves one request after another on a connection whose client offers another protocol each time."""
    async with standing() as ground:
        reader, writer = await ground.proxy.connect()
        for _ in range(3):
            writer.write(get_request(cadvisor(ground.kubelet), "Connection: Upgrade", "Upgrade: h2c"))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(len(METRICS)) == METRICS
            writer.write(b"\r\n")  # an empty line between two requests


async def test_request_cut_off_midway_gets_one_answer() -> None:
    """Answers a request that turns bad in its second piece once, and closes."""
    async with standing() as ground:
        reader, writer = await ground.proxy.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"bad field\r\n")
        got = await reader.read()
        assert status_of(got) == 400
        assert got.count(b"\r\nContent-Length: ") == 1
        await until(lambda: ground.proxy.server.stats().callers == 0)


async def test_second_request_while_one_is_under_way() -> None:
    """Closes the connection, and ends the call under way, where a caller sends before it was answered."""

    async def hang(
        kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.read()

    kubelet = Kubelet(hang)
    async with kubelet.serving(), proxying(kubelet.node()) as proxy:
        reader, writer = await proxy.connect()
        writer.write(get_request(cadvisor(kubelet)))
        await until(lambda: kubelet.requests)
        async with asyncio.timeout(PATIENCE):
            writer.write(get_request(cadvisor(kubelet)))
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            await kubelet.left.wait()
        writer.close()
        assert len(kubelet.requests) == 1


async def test_connection_goes_on_after_refusals() -> None:
    """Keeps a connection after a refusal of a sound request, HEAD among them."""
    async with standing() as ground:
        reader, writer = await ground.proxy.connect()
        for raw, status in [
            (get_request("/nothing"), b"404"),
            (get_request(cadvisor(ground.kubelet)).replace(b"GET", b"HEAD", 1), b"405"),
            (get_request(cadvisor(ground.kubelet)).replace(b"GET", b"DELETE", 1), b"405"),
            (get_request(cadvisor(ground.kubelet)), b"200"),
        ]:
            writer.write(raw)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split(b" ")[1] == status
            if not raw.startswith(b"HEAD"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
        assert body == METRICS
        writer.close()


async def test_host_never_routes() -> None:
    """Leads to the Node the target names, whatever sound Host comes with it."""
    async with standing() as ground:
        for host in (
            f"127.0.0.1:{ground.bystander_port}",
            "[::1]:80",
            "kubernetes.default.svc",
            "169.254.169.254",
        ):
            raw = await ground.proxy.exchange(
                get_request(cadvisor(ground.kubelet), "Connection: close", host=host)
            )
            assert raw.endswith(METRICS)
        ground.unharmed()


HEADERS = st.sampled_from(
    [
        b"Host: a\r\n",
        b"Host: a\r\n",
        b"Host: 127.0.0.1:%(aside)d\r\n",
        b"Connection: close\r\n",
        b"Connection: keep-alive, Upgrade\r\n",
        b"Upgrade: h2c\r\n",
        b"Content-Length: 0\r\n",
        b"Content-Length: 7\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"X-Forwarded-Host: 127.0.0.1:%(aside)d\r\n",
        b"Accept: */*\r\n",
        b"Accept: \xff\r\n",
        b"X-Prometheus-Scrape-Timeout-Seconds: nan\r\n",
        b" folded\r\n",
        b"X: y\n",
        b"\r\n",
        b"\x00\r\n",
    ]
)
METHODS = st.sampled_from([b"GET", b"GET", b"GET", b"HEAD", b"POST", b"CONNECT", b"get", b"PRI", b""])
VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"ICE/1.1", b""])
TARGETS = st.one_of(
    st.just(b"%(good)s"),
    st.lists(PIECES, max_size=7).map(lambda pieces: "".join(pieces).encode().replace(b"%", b"%%")),
)
REQUESTS = st.tuples(METHODS, TARGETS, VERSIONS, st.lists(HEADERS, max_size=5)).map(
    lambda parts: parts[0] + b" " + parts[1] + b" " + parts[2] + b"\r\n" + b"".join(parts[3]) + b"\r\n"
)


@pytest.mark.long
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(batch=st.lists(st.lists(REQUESTS, min_size=1, max_size=3).map(b"".join), min_size=40, max_size=40))
async def test_fuzz(batch: list[bytes]) -> None:
    """Reaches nothing but the allowed path of the allowed kubelet, whatever is put together."""
    async with standing(ProxyTiming(tick=0.02, request_head=0.05, linger=0.02, keep_alive=0.05)) as ground:
        values = {b"aside": ground.bystander_port, b"good": cadvisor(ground.kubelet).encode()}
        sent = [raw % values for raw in batch]
        answers = await asyncio.gather(*(ground.proxy.attack(raw) for raw in sent))
        allowed = 0
        for raw, got in zip(sent, answers, strict=True):
            if got.startswith(b"HTTP/1.1 200"):
                allowed += 1
                is_legacy = b" HTTP/1.0\r\n" in raw.partition(b"\r\n")[0] + b"\r\n"
                version = b"1.0" if is_legacy else b"1.1"
                target = cadvisor(ground.kubelet).encode()
                assert raw.startswith(b"GET %b HTTP/%b\r\n" % (target, version))
                assert raw.count(b"\nHost:") == 1 or (is_legacy and raw.count(b"\nHost:") == 0)
        assert len(ground.kubelet.requests) == allowed
        ground.unharmed()


@pytest.mark.parametrize("head", [b"", b"GET "])
async def test_too_many_callers(head: bytes) -> None:
    """Serves a connection beyond the limit, and closes the one that was open longest without a request for it."""
    async with Kubelet().serving() as kubelet, proxying(kubelet.node(), max_clients=2) as proxy:
        held = []
        for number in range(2):
            held.append(await proxy.connect())
            held[number][1].write(head)
            await until(lambda: proxy.server.stats().callers == number + 1)  # noqa: B023 - awaited here
        assert (await proxy.get(cadvisor(kubelet))).status == 200
        assert await held[0][0].read() == b""
        assert not held[1][0].at_eof()
        for _, writer in held:
            writer.transport.abort()
        await until(lambda: proxy.server.stats().callers == 0)
        assert (await proxy.get(cadvisor(kubelet))).status == 200
