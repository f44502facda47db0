"""The proxy in the process of a test: kubelets and Pods behind it, callers before it, TLS on both sides."""

import asyncio
import contextlib
import functools
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import trustme

from k8s_consul_registrar.model import ContainerPort, Node, NodeAddress, Pod
from k8s_consul_registrar.proxy.client_connection import ClientConnection
from k8s_consul_registrar.proxy.config import ProxyConfig, ProxyTiming
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.nodes import Nodes, NodeTable
from k8s_consul_registrar.proxy.routes import Pods, proxied_pod
from k8s_consul_registrar.proxy.server import ProxyServer, listen
from k8s_consul_registrar.rotating import BearerTokens, Rotating
from k8s_consul_registrar.tls import ServerTls, Trust, server_tls
from support.waiting import PATIENCE, until

TOKEN = "the-proxys-own-token"
METRICS = (
    b"# TYPE container_cpu_usage_seconds_total counter\ncontainer_cpu_usage_seconds_total 1 1795344097000\n"
)
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n"


@functools.cache
def authority() -> trustme.CA:
    """Return the CA every kubelet of the tests is signed by, unless it says otherwise."""
    return trustme.CA()


def authority_pem() -> str:
    """Return its certificate."""
    return authority().cert_pem.bytes().decode()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Behaviour = Callable[["Kubelet", bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = METRICS, head: bytes = PLAIN) -> bytes:
    """Return a whole answer with a length."""
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def serve_metrics(
    kubelet: "Kubelet", request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer as a kubelet does."""
    writer.write(answer())
    await writer.drain()


async def hang(
    kubelet: "Kubelet", request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Say nothing until the other side leaves."""
    await reader.read()


def always(payload: bytes, *, then_close: bool = False) -> Behaviour:
    """Return the behaviour that answers every request with these bytes."""

    async def behave(
        kubelet: "Kubelet", request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(payload)
        await writer.drain()
        if then_close:
            writer.close()

    return behave


@dataclass
class Kubelet:
    """A server, of TLS unless asked otherwise, that counts what comes and answers as `behave` says."""

    behave: Behaviour = serve_metrics
    host: str = "127.0.0.1"
    names: tuple[str, ...] = ("127.0.0.1", "::1")
    signed_by: trustme.CA = field(default_factory=authority)
    is_secure: bool = True
    tickets: int = 2
    port: int = 0
    connections: int = 0
    open_now: int = 0
    resets: int = 0
    requests: list[bytes] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Kubelet"]:
        """Serve until the block ends."""
        context = None
        if self.is_secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.num_tickets = self.tickets
            self.signed_by.issue_cert(*self.names).configure_cert(context)
        server = await asyncio.start_server(self._converse, self.host, self.port, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self.writers:
                writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_now += 1
        self.writers.append(writer)
        try:
            while not writer.is_closing():
                request = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(request)
                await self.behave(self, request, reader, writer)
        except ConnectionResetError:
            self.resets += 1
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.open_now -= 1
            self.left.set()
            writer.transport.abort()

    def node(self, name: str = "node-1", **changes: object) -> Node:
        """Return the Node this kubelet belongs to."""
        values = {
            "name": name,
            "uid": f"uid-of-{name}",
            "created": "2026-01-01T00:00:00Z",
            "addresses": (NodeAddress("InternalIP", self.host),),
            "kubelet_port": self.port,
            "ready": True,
        }
        return Node(**(values | changes))  # type: ignore[arg-type]  # the tests' own keywords


@dataclass
class Proxy:
    """A proxy under test and where it listens."""

    server: ProxyServer
    nodes: Nodes
    port: int
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self, host: str = "127.0.0.1") -> Connection:
        """Open a raw connection to it, closed at the end at the latest."""
        reader, writer = await asyncio.open_connection(host, self.port)
        self.writers.append(writer)
        return reader, writer

    async def connect_slow(self, *, tiny_buffers: bool = True) -> tuple[Connection, ClientConnection]:
        """Open a connection of a caller that takes nothing yet, and return the proxy's side of it too.

        With tiny buffers on both sides a few kilobytes are more than the socket takes.
        """
        sock = socket.socket()
        if tiny_buffers:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock)
        self.writers.append(writer)
        transport_of(writer).pause_reading()
        await until(lambda: any(client._fd >= 0 for client in self.server._clients))
        (client,) = self.server._clients
        if tiny_buffers:
            client._socket().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        return (reader, writer), client

    async def exchange(self, request: bytes) -> bytes:
        """Send raw bytes on a connection of their own and return all that comes until it ends."""
        reader, writer = await self.connect()
        try:
            writer.write(request)
            async with asyncio.timeout(PATIENCE):
                return await reader.read(-1)
        finally:
            writer.transport.abort()

    async def attack(self, raw: bytes, *, piece: int = 0) -> bytes:
        """Send raw bytes, `piece` at a time, and return all that comes before the end, a reset included.

        The server need not read all of an attack: what it answered counts although the rest finds no reader.
        """
        loop, got = asyncio.get_running_loop(), bytearray()

        async def send() -> None:
            size = piece or len(raw) or 1
            with contextlib.suppress(OSError):
                for start in range(0, len(raw), size):
                    await loop.sock_sendall(sock, raw[start : start + size])
                    await asyncio.sleep(0)

        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", self.port))
            sending = asyncio.create_task(send())
            try:
                async with asyncio.timeout(PATIENCE):
                    with contextlib.suppress(ConnectionError):
                        while data := await loop.sock_recv(sock, 65536):
                            got += data
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        return bytes(got)

    async def get(self, target: str, *headers: str) -> "Answer":
        """Send one GET and read the answer, the connection closed after it."""
        return parse_answer(await self.exchange(get_request(target, *headers, "Connection: close")))


def get_request(target: str, *headers: str, host: str = "proxy.example:31112") -> bytes:
    """Return a GET as Prometheus writes it."""
    return "\r\n".join([f"GET {target} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode()


@dataclass(frozen=True)
class Answer:
    """An HTTP answer taken apart."""

    status: int
    fields: dict[str, str]
    body: bytes


def parse_answer(raw: bytes) -> Answer:
    """Take an answer apart that ends with the connection; the body of chunks is put together."""
    head, _, body = raw.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if fields.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    elif "content-length" in fields:
        assert int(fields["content-length"]) == len(body)
    return Answer(int(line.split(" ")[1]), fields, body)


def unchunked(body: bytes) -> bytes:
    """Put chunks together; raises where they do not end."""
    whole = b""
    while True:
        size, _, rest = body.partition(b"\r\n")
        count = int(size.split(b";")[0], 16)
        if not count:
            return whole
        assert rest[count : count + 2] == b"\r\n"
        whole += rest[:count]
        body = rest[count + 2 :]


@dataclass(frozen=True)
class PodAccess:
    """The Pods that a proxy relays, the trust in them, and their limits."""

    pods: Pods
    trusted: ssl.SSLContext
    concurrency: Concurrency | None = None

    def context(self) -> ssl.SSLContext:
        """Return the context for Pods."""
        return self.trusted


@dataclass(frozen=True)
class ProxyCredentials:
    """The proxy's credentials for kubelets, from functions."""

    current_token: Callable[[], str]
    current_context: Callable[[], ssl.SSLContext]

    def token(self) -> str:
        """Return the token."""
        return self.current_token()

    def context(self) -> ssl.SSLContext:
        """Return the context."""
        return self.current_context()


@contextlib.asynccontextmanager
async def proxying(
    *nodes: Node,
    known: bool = True,
    allow_loopback: bool = True,
    verify_node_name: bool = False,
    paths: tuple[str, ...] = (),
    token: Callable[[], str] = lambda: TOKEN,
    context: ssl.SSLContext | list[ssl.SSLContext] | None = None,
    contexts: Callable[[], ssl.SSLContext] | None = None,
    concurrency: Concurrency | None = None,
    inbound: Rotating[BearerTokens] | None = None,
    tls: ServerTls | None = None,
    pods: PodAccess | None = None,
    max_clients: int = 100,
    kept_connections: int = 100,
    pod_content_type: str = "",
    timing: ProxyTiming | None = None,
) -> AsyncIterator[Proxy]:
    """Run a proxy for these Nodes, loopback allowed since the kubelets are there.

    Of a list of contexts the first counts at each moment. Fails where anything was left to the event loop's
    own handling of exceptions.
    """
    holder = Nodes()
    if known:
        holder.replace(NodeTable.of(nodes, allow_loopback=allow_loopback, verify_node_name=verify_node_name))
    given = context if isinstance(context, list) else [context or Trust(authority_pem()).context]
    config = ProxyConfig(
        paths=frozenset({"/metrics/cadvisor", *paths}),
        has_pods=pods is not None,
        concurrency=concurrency or (pods and pods.concurrency) or Concurrency(),
        max_clients=max_clients,
        kept_connections=kept_connections,
        pod_content_type=pod_content_type,
        timing=timing or ProxyTiming(tick=0.05),
    )
    server = ProxyServer(
        config,
        holder,
        ProxyCredentials(token, contexts or (lambda: given[0])),
        pods=None if pods is None else pods.pods,
        pod_context=None if pods is None else pods.context,
        inbound=inbound,
        tls=tls,
    )
    sockets = listen(0)
    await server.start(sockets)
    proxy = Proxy(server, holder, sockets[0].getsockname()[1])
    problems: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context)))
    try:
        yield proxy
    finally:
        await server.stop()
        for writer in proxy.writers:
            writer.transport.abort()
    assert problems == []


def cadvisor(kubelet: Kubelet) -> str:
    """Return the path by which a kubelet is registered."""
    host = f"[{kubelet.host}]" if ":" in kubelet.host else kubelet.host
    return f"/api/v1/nodes/{host}:{kubelet.port}/metrics/cadvisor"


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    """Make a connection end in a reset, as a cut network does."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(1, 13, struct.pack("ii", 1, 0))
    writer.transport.abort()


def transport_of(writer: asyncio.StreamWriter) -> asyncio.Transport:
    """Return a connection's transport, which can also stop reading."""
    return cast("asyncio.Transport", writer.transport)


PREFIX = "prometheus.io/"
POD_HOST = "127.0.0.2"  # not a Node's: those of the tests are at 127.0.0.1


@dataclass
class PodServer(Kubelet):
    """A container's port, in plain HTTP unless `is_secure`."""

    host: str = POD_HOST
    names: tuple[str, ...] = (POD_HOST,)
    is_secure: bool = False

    def pod(self, name: str = "web-1", namespace: str = "shop", **changes: object) -> Pod:
        """Return the Pod this server belongs to; `annotations` are without their prefix."""
        given = {"scrape": "true", "port": str(self.port), "scheme": "https" if self.is_secure else "http"}
        given |= changes.pop("annotations", {})  # type: ignore[call-overload]  # the tests' own keyword
        values = {
            "uid": f"uid-of-{name}",
            "created": "2026-01-01T00:00:00Z",
            "phase": "Running",
            "ip": self.host,
            "annotations": {f"{PREFIX}{key}": value for key, value in given.items()},
        }
        return Pod(namespace, name, **(values | changes))  # type: ignore[arg-type]  # the tests' own keywords


def declared(*numbers: int) -> tuple[ContainerPort, ...]:
    """Return containers' ports."""
    return tuple(ContainerPort("", number, "TCP") for number in numbers)


def put(pods: Pods, *those: Pod) -> None:
    """Take Pods in as the proxy's feed does."""
    for pod in those:
        pods.put(pod.namespace, pod.name, proxied_pod(pod, PREFIX, allow_loopback=True))


def known(*those: Pod) -> Pods:
    """Return the Pods as they are after the first complete list."""
    pods = Pods()
    put(pods, *those)
    pods.known = True
    return pods


def access(
    pods: Pods, *, context: ssl.SSLContext | None = None, concurrency: Concurrency | None = None
) -> PodAccess:
    """Return how the proxy reaches them, trusting the tests' authority."""
    trusted = context or Trust(authority_pem()).context
    return PodAccess(pods, trusted, concurrency)


def pod_path(name: str = "web-1", namespace: str = "shop", ports: Sequence[int] = ()) -> str:
    """Return the path by which a Pod is registered."""
    port = f":{ports[0]}" if ports else ""
    return f"/api/v1/namespaces/{namespace}/pods/{name}{port}/metrics"


class Files:
    """The files of one proxy, replaced as a test wants them."""

    def __init__(self, folder: Path, authority: trustme.CA, client_ca: trustme.CA | None = None) -> None:
        self.folder = folder
        self.certificate, self.key, self.client_ca = folder / "crt", folder / "key", folder / "ca"
        self.issue(authority)
        if client_ca is not None:
            self.trust(client_ca)
        self._has_client_ca = client_ca is not None

    def issue(self, authority: trustme.CA) -> None:
        """Put a new certificate and key in place."""
        leaf = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        self.key.write_bytes(leaf.private_key_pem.bytes())

    def trust(self, *authorities: trustme.CA) -> None:
        """Put these authorities of clients in place."""
        self.client_ca.write_bytes(b"".join(one.cert_pem.bytes() for one in authorities))

    def cut(self, path: Path, keep: float) -> None:
        """Leave this part of a file."""
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * keep)])

    def lose(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def tls(self) -> ServerTls:
        """Return the proxy's side."""
        client_ca = self.client_ca if self._has_client_ca else None
        return server_tls(self.certificate, self.key, client_ca, setting="TLS")


def caller_context(
    authority: trustme.CA,
    client_ca: trustme.CA | None = None,
    *,
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> ssl.SSLContext:
    """Return a caller's context that trusts one authority and shows a certificate of another."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.maximum_version = newest
    if client_ca is not None:
        client_ca.issue_cert("prometheus.example", key_type=trustme.KeyType.ECDSA).configure_cert(context)
    return context


class Caller:
    """One connection of a caller over TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def get(self, target: str, *headers: str) -> Answer:
        """Send one GET and read its answer, the connection kept."""
        self.writer.write(get_request(target, *headers))
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return parse_answer(head + await self.reader.readexactly(length))

    async def ends(self) -> bool:
        """Return whether the proxy closes the connection before it says anything more."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self.reader.read(1) == b""
        except (TimeoutError, OSError) as error:
            return not isinstance(error, TimeoutError)


async def connect(proxy: Proxy, context: ssl.SSLContext) -> Caller:
    """Open a connection over TLS, closed at the proxy's end at the latest."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", proxy.port, ssl=context, server_hostname="127.0.0.1"
    )
    proxy.writers.append(writer)
    return Caller(reader, writer)


async def get(proxy: Proxy, context: ssl.SSLContext, target: str, *headers: str) -> Answer:
    """Send one GET on a connection of its own; raises OSError where the handshake or the connection fails."""
    caller = await connect(proxy, context)
    try:
        return await caller.get(target, *headers)
    except asyncio.IncompleteReadError:
        raise ConnectionResetError from None
    finally:
        caller.writer.transport.abort()
