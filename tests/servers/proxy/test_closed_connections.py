"""Closed connections of the proxy, whatever ended them: reference counts free everything, and no cycle waits for the collector."""

import asyncio
import contextlib
import gc
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import trustme

from k8s_consul_registrar.proxy.config import ProxyTiming
from k8s_consul_registrar.proxy.nodes import POD, Endpoint
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.relay import Routed
from k8s_consul_registrar.proxy.response import HeadCache
from k8s_consul_registrar.proxy.tls_stream import Buffers
from k8s_consul_registrar.proxy.upstream import Exchange, UpstreamConnection
from k8s_consul_registrar.rotating import bearer_tokens
from support.processes import reserve_ports
from support.proxy_lab import (
    METRICS,
    PLAIN,
    Connection,
    Files,
    Kubelet,
    PodServer,
    Proxy,
    access,
    always,
    answer,
    caller_context,
    get_request,
    hang,
    known,
    pod_path,
    proxying,
    reset_on_close,
    transport_of,
)
from support.waiting import PATIENCE, until

pytestmark = pytest.mark.both_loops

AUTHORITY = trustme.CA()
TOKEN = "Authorization: Bearer secret"
BRIEFLY = "X-Prometheus-Scrape-Timeout-Seconds: 0.2"
QUICK = ProxyTiming(
    tick=0.02, connect=0.5, request_head=0.5, denied_keep_alive=0.3, unread=0.5, linger=0.1, upstream_idle=0.1
)
MADE_BY = ("k8s_consul_registrar.proxy.", "httptools.")
ROOM = 12
TIMES = 2
IN_CHUNKS = PLAIN + b"Transfer-Encoding: chunked\r\n\r\n4\r\na 1\n\r\n0\r\n\r\n"
NOT_ALL = PLAIN + b"Content-Length: 100\r\n\r\nhalf"
KUBELETS: dict[str, Callable[[], Kubelet]] = {
    "honest": Kubelet,
    "hanging": partial(Kubelet, hang),
    "long": partial(Kubelet, always(answer(b"a 1\n" * 2_000_000))),
    "chunking": partial(Kubelet, always(IN_CHUNKS)),
    "closing": partial(Kubelet, always(answer(), then_close=True)),
    "cutting": partial(Kubelet, always(NOT_ALL, then_close=True)),
    "denying": partial(Kubelet, always(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")),
    "malformed": partial(Kubelet, always(b"\0" * 100)),
    "repeating": partial(Kubelet, always(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)),
    "strange": partial(Kubelet, signed_by=trustme.CA()),
    "plain": partial(Kubelet, is_secure=False),
}


@dataclass(frozen=True)
class Site:
    """A proxy that asks for a token, and the context of its clients, None without TLS."""

    proxy: Proxy
    context: ssl.SSLContext | None = None

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Connection]:
        """Open a connection, and abort it at the end."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.proxy.port,
            ssl=self.context,
            server_hostname=None if self.context is None else "127.0.0.1",
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def told(self, request: bytes) -> bytes:
        """Send something on a connection of its own, and return all that comes before the end, a reset included."""
        async with self.connected() as (reader, writer):
            writer.write(request)
            return await everything(reader)

    def is_quiet(self) -> bool:
        """Return True if no connection is open and no scrape under way."""
        now = self.proxy.server.stats()
        return not (now.callers or now.kept or now.running or now.waiting)


def node(name: str, *headers: str) -> bytes:
    """Return an authorized scrape of a Node that ends the connection."""
    return get_request(f"/api/v1/nodes/{name}/proxy/metrics/cadvisor", TOKEN, "Connection: close", *headers)


async def everything(reader: asyncio.StreamReader) -> bytes:
    """Return all that comes before the end, a reset included."""
    got = b""
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                got += piece
    return got


@contextlib.asynccontextmanager
async def running(folder: Path, *names: str, is_secure: bool = False, **nodes: int) -> AsyncIterator[Site]:
    """Run these kubelets and a proxy before them and before Nodes of which only the port is given."""
    file = folder / "token"
    file.write_text("secret\n")
    files = Files(folder, AUTHORITY)
    async with contextlib.AsyncExitStack() as stack:
        kubelets = {name: KUBELETS[name]() for name in names}
        for kubelet in kubelets.values():
            await stack.enter_async_context(kubelet.serving())
        kubelets |= {name: Kubelet(port=port) for name, port in nodes.items()}
        proxy = await stack.enter_async_context(
            proxying(
                *(kubelet.node(name) for name, kubelet in kubelets.items()),
                inbound=bearer_tokens(file, "PROXY_BEARER_TOKEN_FILE"),
                tls=files.tls() if is_secure else None,
                max_clients=ROOM,
                timing=QUICK,
            )
        )
        yield Site(proxy, caller_context(AUTHORITY) if is_secure else None)


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    """Let only reference counts free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def objects() -> Counter[str]:
    """Count what the proxy and its parser made, by type, except for values that are remembered: tuples and routes."""
    return Counter(
        kind.__qualname__
        for kind in map(type, gc.get_objects())
        if str(kind.__module__).startswith(MADE_BY) and not issubclass(kind, (tuple, Routed))
    )


async def nothing_is_left(site: Site, what: str, step: Callable[[], Awaitable[None]]) -> None:
    """Open and close connections again and again, and wait until each object is gone that was not there before."""
    before = objects()
    for _ in range(TIMES):
        with contextlib.suppress(OSError, EOFError):  # on a busy machine the proxy's short times pass early
            await step()
        await until(site.is_quiet)
    await until(lambda: objects() <= before, f"all is freed: {what}", context=lambda: objects() - before)


def ended(site: Site) -> set[Outcome]:
    """Return how requests to a proxy ended."""
    return {outcome for outcome, count in site.proxy.server.stats().outcomes.items() if count}


# What a client does


async def scrape_once(site: Site) -> None:
    """Scrape, and end the connection with it."""
    await site.told(node("honest"))


async def scrape_again_and_again(site: Site) -> None:
    """Scrape over a kept connection, and close it."""
    async with site.connected() as (reader, writer):
        for _ in range(3):
            writer.write(get_request("/api/v1/nodes/honest/proxy/metrics/cadvisor", TOKEN))
            await reader.readuntil(METRICS)


async def reset_amid_an_answer(site: Site) -> None:
    """Reset the connection while the answer is on its way."""
    async with site.connected() as (reader, writer):
        writer.write(node("long"))
        await reader.readuntil(b"\r\n\r\n")
        reset_on_close(writer)


async def read_nothing(site: Site) -> None:
    """Ask for a long answer and read nothing of it until the proxy gives up."""
    async with site.connected() as (_, writer):
        transport_of(writer).pause_reading()
        writer.write(node("long"))
        await until(lambda: site.proxy.server.stats().running)
        await until(lambda: not site.proxy.server.stats().running)


async def leave_amid_a_scrape(site: Site) -> None:
    """Leave before the kubelet answers."""
    async with site.connected() as (_, writer):
        writer.write(node("hanging"))
        await until(lambda: site.proxy.server.stats().running)


async def allow_no_time(site: Site) -> None:
    """Announce a timeout that is over before the kubelet answers."""
    await site.told(node("hanging", BRIEFLY))


async def leave_amid_a_request(site: Site) -> None:
    """Leave after a part of a request."""
    async with site.connected() as (_, writer):
        writer.write(node("honest")[:-9])
        await writer.drain()


async def ask_too_slowly(site: Site) -> None:
    """Send a part of a request, and no more."""
    await site.told(node("honest")[:-9])


async def ask_without_the_token(site: Site) -> None:
    """Ask without a token, on a connection that the proxy closes later."""
    await site.told(get_request("/api/v1/nodes/honest/proxy/metrics/cadvisor"))


async def ask_for_another_path(site: Site) -> None:
    """Ask for what is not served."""
    await site.told(get_request("/nothing", TOKEN))


async def ask_what_is_no_request(site: Site) -> None:
    """Send a malformed request."""
    await site.told(get_request("/nothing", "no colon"))


async def ask_for_an_upgrade(site: Site) -> None:
    """Ask for another protocol, which is ignored."""
    request = node("honest", "Upgrade: h2c").replace(b"Connection: close", b"Connection: close, Upgrade")
    await site.told(request)


async def crowd(site: Site) -> None:
    """Open more connections than there is room for."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2 * ROOM):
            with contextlib.suppress(OSError):
                await stack.enter_async_context(site.connected())


async def break_off_a_handshake(site: Site) -> None:
    """Send plain HTTP and leave, then a part of a handshake, then nothing; to a plain port all are no requests."""
    for beginning in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02", b""):
        _, writer = await site.proxy.connect()
        writer.write(beginning)
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.transport.abort()


CLIENTS: tuple[Callable[[Site], Awaitable[None]], ...] = (
    scrape_once,
    scrape_again_and_again,
    reset_amid_an_answer,
    read_nothing,
    leave_amid_a_scrape,
    allow_no_time,
    leave_amid_a_request,
    ask_too_slowly,
    ask_without_the_token,
    ask_for_another_path,
    ask_what_is_no_request,
    ask_for_an_upgrade,
    crowd,
    break_off_a_handshake,
)


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "tls"])
async def test_closed_connection_of_a_client_leaves_nothing(tmp_path: Path, is_secure: bool) -> None:
    """However it ends, no object of it waits for the collector."""
    async with running(tmp_path, "honest", "long", "hanging", is_secure=is_secure) as site:
        for act in CLIENTS:
            await nothing_is_left(site, act.__name__, partial(act, site))
        wanted = {Outcome.OK, Outcome.BAD_REQUEST, Outcome.UNAUTHORIZED, Outcome.UNKNOWN_PATH}
        assert {*wanted, Outcome.CALLER_LEFT, Outcome.CALLER_STALLED} <= ended(site)
        assert site.proxy.server.stats().evicted


# What an upstream does


async def test_closed_connection_to_a_kubelet_leaves_nothing(tmp_path: Path) -> None:
    """Whatever it answers, and whichever side closes: neither the connection nor its scrape waits for the collector."""
    async with running(tmp_path, *KUBELETS) as site:
        for name in KUBELETS:
            request = node(name, *([BRIEFLY] if name == "hanging" else []))
            await nothing_is_left(site, name, partial(scrape_twice, site, request))
        wanted = {Outcome.OK, Outcome.CUT, Outcome.FORBIDDEN, Outcome.MALFORMED, Outcome.UNVERIFIED}
        assert {*wanted, Outcome.CALLER_LEFT} <= ended(site)


async def scrape_twice(site: Site, request: bytes) -> None:
    """Scrape twice: the second time over the connection that the first one left, if it left one."""
    for _ in range(2):
        await site.told(request)


class ClosesAtOnce:
    """A scrape whose client leaves at the moment at which its connection is made."""

    def __init__(self, connection: UpstreamConnection) -> None:
        self.connections = [connection]

    def on_connected(self) -> None:
        """Close the connection."""
        self.connections.pop().close()


async def test_connection_that_is_closed_as_it_is_made_leaves_nothing() -> None:
    """The loop has yet to say that it is connected, and ends it without telling it so."""
    async with PodServer().serving() as pod:
        before = objects()
        scrape = ClosesAtOnce(
            UpstreamConnection(Endpoint(pod.host, pod.port, "", "", POD), None, Buffers(), HeadCache())
        )
        scrape.connections[0].connect(cast("Exchange", scrape), PATIENCE)
        await until(lambda: not scrape.connections)
        await until(lambda: objects() <= before, context=lambda: objects() - before)


async def test_connection_that_never_comes_about_leaves_nothing(tmp_path: Path) -> None:
    """A kubelet that refuses, one that never accepts and one that never speaks TLS leave no object behind."""
    (refusing,) = reserve_ports(1)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        mute = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        ports = {"refusing": refusing, "full": full.getsockname()[1], "mute": mute.getsockname()[1]}
        async with running(tmp_path, **ports) as site:

            async def step() -> None:
                await site.told(node("refusing"))
                for name in ("full", "mute"):
                    await site.told(node(name))
                    async with site.connected() as (_, writer):
                        writer.write(node(name))
                        await until(lambda: site.proxy.server.stats().running)

            await nothing_is_left(site, "never connected", step)
            assert {Outcome.UNREACHABLE, Outcome.TIMEOUT, Outcome.CALLER_LEFT} <= ended(site)


PODS = {
    "ends by close": PLAIN + b"\r\n" + METRICS,
    "in chunks": IN_CHUNKS,
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\n\r\n",
}


async def test_closed_connection_to_a_pod_leaves_nothing() -> None:
    """A body that ends with the connection, chunks and a redirect leave no object behind."""
    servers = {what: PodServer(always(payload, then_close=True)) for what, payload in PODS.items()}
    async with contextlib.AsyncExitStack() as stack:
        for server in servers.values():
            await stack.enter_async_context(server.serving())
        pods = [server.pod(f"pod-{number}") for number, server in enumerate(servers.values())]
        site = Site(await stack.enter_async_context(proxying(pods=access(known(*pods)), timing=QUICK)))
        for pod, what in zip(pods, PODS, strict=True):
            request = get_request(pod_path(pod.name), "Connection: close")
            await nothing_is_left(site, what, partial(scrape_twice, site, request))
        assert {Outcome.OK, Outcome.POD_ANSWERED} <= ended(site)
