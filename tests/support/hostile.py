"""Hostile peers of a proxy, each a program of its own: `python -m support.hostile` with a Peer as JSON.

An upstream misbehaves towards scrapes that the program asks for itself; a client misbehaves by itself. The
program prints a line once it is in place, and goes on until it is killed.
"""

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable
from enum import StrEnum

import msgspec

from support.tls_flood import KeyUpdater

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
LINE = b"a_metric 1\n"
BIG = LINE * (8_000_000 // len(LINE))
PACE = 0.1  # seconds between the pieces of what drips, and between the scrapes of one client
LESS_IMPORTANT = 10  # niceness: what is measured is the proxy, not who gets the processor


class Kind(StrEnum):
    """Kinds of hostile peers."""

    INTERIM = "interim answers without end"
    CLIENT_RECORDS = "TLS records without data, from a client"
    KUBELET_RECORDS = "TLS records without data, from a kept kubelet connection"
    ANONYMOUS = "anonymous connections"
    NEVER_READ = "clients that never read"
    SLOW_READ = "clients that read slowly"
    DRIP = "a byte of the body at a time"
    HANG = "nothing after the head"
    EARLY_CLOSE = "the end before the end of the body"
    HUGE_HEAD = "a head without end"
    GARBAGE = "garbage instead of an answer"
    ENDLESS = "a body without end"


class Peer(msgspec.Struct):
    """A hostile peer: the upstream listens on `host` and `port`, the proxy on loopback."""

    kind: Kind
    proxy_port: int
    target: str  # of the upstream, at the proxy
    host: str
    port: int
    certificate: str  # a file with the upstream's key and chain
    token: str = ""  # what the proxy asks clients for
    is_secure: bool = False  # the proxy speaks TLS to clients
    clients: int = 8

    @property
    def arguments(self) -> list[str]:
        """The program's command line; `support` must be importable."""
        return [sys.executable, "-m", "support.hostile", msgspec.json.encode(self).decode()]


Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter


async def repeat(writer: Writer, what: bytes, pause: float = 0.0) -> None:
    """Send the same again and again until the other side leaves."""
    while not writer.is_closing():
        writer.write(what)
        await writer.drain()
        if pause:
            await asyncio.sleep(pause)


async def interim(reader: Reader, writer: Writer) -> None:
    """Send interim answers."""
    await repeat(writer, b"HTTP/1.1 100 Continue\r\n\r\n" * 4000)


async def drip(reader: Reader, writer: Writer) -> None:
    """Send a body byte by byte."""
    writer.write(OK + b"Content-Length: 1000000\r\n\r\n")
    await repeat(writer, b"a", PACE)


async def hang_after_head(reader: Reader, writer: Writer) -> None:
    """Send a head, and then nothing until the other side leaves."""
    writer.write(OK + b"Content-Length: 1000000\r\n\r\n")
    await reader.read()


async def early_close(reader: Reader, writer: Writer) -> None:
    """Break off within the body."""
    writer.write(OK + b"Content-Length: 1000000\r\n\r\n" + LINE)
    await writer.drain()
    writer.transport.abort()


async def huge_head(reader: Reader, writer: Writer) -> None:
    """Send a head that never ends."""
    writer.write(OK)
    await repeat(writer, b"X-Padding: " + b"x" * 8000 + b"\r\n")


async def garbage(reader: Reader, writer: Writer) -> None:
    """Send random bytes."""
    await repeat(writer, os.urandom(1 << 16))


async def endless(reader: Reader, writer: Writer) -> None:
    """Send a body as fast as it is taken."""
    writer.write(OK + b"Content-Length: 99999999999\r\n\r\n")
    await repeat(writer, b"a" * (1 << 16))


async def big(reader: Reader, writer: Writer) -> None:
    """Answer as an honest kubelet with much to tell."""
    writer.write(OK + b"Content-Length: %d\r\n\r\n" % len(BIG) + BIG)
    await writer.drain()


UPSTREAMS: dict[Kind, Callable[[Reader, Writer], Awaitable[None]]] = {
    Kind.INTERIM: interim,
    Kind.DRIP: drip,
    Kind.HANG: hang_after_head,
    Kind.EARLY_CLOSE: early_close,
    Kind.HUGE_HEAD: huge_head,
    Kind.GARBAGE: garbage,
    Kind.ENDLESS: endless,
    Kind.NEVER_READ: big,
    Kind.SLOW_READ: big,
}


class Running:
    """A peer at work."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.context: ssl.SSLContext | None = None
        if peer.is_secure:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE
        fields = f"Authorization: Bearer {peer.token}\r\n" if peer.token else ""
        self.request = (
            f"GET {peer.target} HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n{fields}\r\n"
        ).encode()

    async def run(self) -> None:
        """Be hostile until cancelled."""
        peer = self.peer
        async with asyncio.TaskGroup() as group:
            if peer.kind in UPSTREAMS:
                await self.listen(UPSTREAMS[peer.kind])
            match peer.kind:
                case Kind.ANONYMOUS:
                    await self.connect_all(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
                case Kind.NEVER_READ:
                    await self.connect_all(self.request, receive=4096)
                case Kind.CLIENT_RECORDS:
                    threading.Thread(target=self.flood_proxy, daemon=True).start()
                case Kind.KUBELET_RECORDS:
                    threading.Thread(target=self.flood_scrapes, daemon=True).start()
                    group.create_task(self.scrape())
                case _:
                    pace = PACE / 5 if peer.kind is Kind.SLOW_READ else 0.0
                    for _ in range(peer.clients):
                        group.create_task(self.scrape(pace))
            print("in place", flush=True)  # noqa: T201 - for the program that started this one
            await asyncio.Event().wait()

    async def listen(self, behave: Callable[[Reader, Writer], Awaitable[None]]) -> None:
        """Be an upstream that answers each request like this."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.peer.certificate)

        async def converse(reader: Reader, writer: Writer) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while not writer.is_closing():
                    await reader.readuntil(b"\r\n\r\n")
                    await behave(reader, writer)
            writer.transport.abort()

        await asyncio.start_server(converse, self.peer.host, self.peer.port, ssl=context, backlog=1024)

    async def connect(self, receive: int = 0) -> tuple[Reader, Writer]:
        """Connect to the proxy."""
        sock = socket.socket()
        if receive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.peer.proxy_port))
        return await asyncio.open_connection(
            sock=sock, ssl=self.context, server_hostname="localhost" if self.context else None, limit=1 << 17
        )

    async def connect_all(self, request: bytes, receive: int = 0) -> None:
        """Send a request on each of many connections, which stay open, and read nothing."""
        self.kept: list[Writer] = []
        for _ in range(self.peer.clients):
            with contextlib.suppress(OSError):
                _, writer = await self.connect(receive)
                if receive:
                    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a stream's transport has it
                writer.write(request)
                self.kept.append(writer)

    async def scrape(self, pause: float = 0.0) -> None:
        """Scrape the upstream again and again, and read what comes, a little at a time with a `pause`."""
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await self.connect(32_000 if pause else 0)
                writer.write(self.request)
                while data := await reader.read(32_000 if pause else 1 << 20):
                    await asyncio.sleep(pause)
                    if self.peer.kind is not Kind.KUBELET_RECORDS and data.startswith(b"HTTP/1.1 50"):
                        break
                writer.transport.abort()
            await asyncio.sleep(PACE)

    def flood_proxy(self) -> None:
        """Send KeyUpdates to the proxy, on one connection after another."""
        while True:
            with contextlib.suppress(OSError, EOFError):
                sock = socket.create_connection(("127.0.0.1", self.peer.proxy_port), timeout=30)
                client = KeyUpdater(sock)
                client.write(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
                client.flood(1 << 40)
                client.close()

    def flood_scrapes(self) -> None:
        """Answer a request, and send KeyUpdates on the connection that is kept."""
        with socket.create_server((self.peer.host, self.peer.port)) as listening:
            while True:
                sock, _ = listening.accept()
                sock.settimeout(30)
                with contextlib.suppress(OSError, EOFError):
                    kubelet = KeyUpdater(sock, self.peer.certificate)
                    kubelet.read()
                    kubelet.write(OK + b"Content-Length: %d\r\n\r\n" % len(LINE) + LINE)
                    kubelet.flood(1 << 40)
                    kubelet.close()


def be_hostile() -> None:
    """Be the peer of the command line."""
    os.nice(LESS_IMPORTANT)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(Running(msgspec.json.decode(sys.argv[1], type=Peer)).run())


if __name__ == "__main__":
    be_hostile()
