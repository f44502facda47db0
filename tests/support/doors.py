"""Proxies that stand before a server in a test.

One of TCP carries bytes and fails as a network does. Those of HTTP answer in the place of the server, or record
what is written.
"""

import asyncio
import contextlib
import itertools
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self
from urllib.parse import unquote

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from support.processes import LOOPBACK, reserve_ports

_CHUNK = 65536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 seconds
_NARROW = 2048  # bytes of a receive buffer that hardly takes more than a head


class TcpProxy:
    """Carries bytes to and from a port of a host, whatever they mean; an asynchronous context manager.

    With several ports the connections go to each in turn, as a Kubernetes Service sends them to its Pods.
    Its own port stays the same while it refuses. `delay` (seconds) holds each piece back for so long;
    `rate` (bytes a second, 0 for no bound) is the most that each direction of a connection carries.
    """

    def __init__(self, host: str, *ports: int, listen_on: str = LOOPBACK) -> None:
        self.delay = 0.0
        self.rate = 0.0
        self._is_hole = False
        self._upstream_host = host
        self.lead_to(*ports)
        self._host = listen_on
        (self.port,) = reserve_ports(1)  # it is bound again after each refusal
        self._bound = self._bind(self.port)
        self._listens_in: asyncio.AbstractEventLoop | None = None
        self._flowing, self._hearing = asyncio.Event(), asyncio.Event()
        self._held = 0
        self._connections: set[asyncio.Task[None]] = set()

    def lead_to(self, *ports: int) -> None:
        """Carry new connections to these ports in turn; those that are open stay."""
        self._upstreams = itertools.cycle([(self._upstream_host, port) for port in ports])

    @property
    def address(self) -> str:
        """Host and port, an IPv6 host in brackets."""
        return f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"

    @property
    def is_held(self) -> bool:
        """True if a stall keeps something back right now."""
        return self._held > 0

    async def holds(self) -> bool:
        """Say the same to each task that waits for it."""
        return self.is_held

    async def __aenter__(self) -> Self:
        await self.heal()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        self._bound.close()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def heal(self) -> None:
        """Let everything through again, what was held back included."""
        self.delay = self.rate = 0.0
        self._is_hole = False
        self._hearing.set()
        self._flowing.set()
        if self._listens_in is None:
            self._listens_in = asyncio.get_running_loop()
            self._bound.listen()
            self._listens_in.add_reader(self._bound, self._accept)

    def black_hole(self) -> None:
        """Swallow what is sent from now on, both ways; what was swallowed never arrives, healed or not."""
        self._is_hole = True

    def stall(self) -> None:
        """Go on accepting and carry nothing, in either direction."""
        self._flowing.clear()

    def deafen(self) -> None:
        """Accept and read nothing: what callers send stays, but for a little, in their own systems.

        Open connections are reset: they have wide buffers already.
        """
        self._hearing.clear()
        self._bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NARROW)
        self.cut()

    def cut(self) -> None:
        """Reset every open connection; new ones are welcome."""
        for task in self._connections:
            task.cancel()

    def refuse(self) -> None:
        """Reset every open connection and refuse new ones: a port that is bound and does not listen."""
        if self._listens_in is not None:
            self._listens_in.remove_reader(self._bound)
            self._listens_in = None
            self._bound.close()
            self._bound = self._bind(self.port)
        self.cut()

    def _bind(self, port: int) -> socket.socket:
        bound = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((self._host, port))
        bound.setblocking(False)
        return bound

    def _accept(self) -> None:
        """Take a connection, in one step: asyncio's servers lose one that comes while they close."""
        try:
            caller, _ = self._bound.accept()
        except OSError:
            return  # it went away again
        caller.setblocking(False)
        task = asyncio.create_task(self._relay(caller))
        self._connections.add(task)

        def end(_: asyncio.Task[None]) -> None:
            # Here and not in the task: one that is cancelled before its first step runs no line of its own.
            caller.close()
            self._connections.discard(task)

        task.add_done_callback(end)

    async def _relay(self, caller: socket.socket) -> None:
        writers: list[asyncio.StreamWriter] = []
        try:
            await self._hearing.wait()
            requests, back = await asyncio.open_connection(sock=caller)
            writers.append(back)
            answers, forth = await asyncio.open_connection(*next(self._upstreams))
            writers.append(forth)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(requests, forth))
                group.create_task(self._carry(answers, back))
        except* OSError:
            pass  # either side went away: both do
        except* asyncio.CancelledError:
            _reset(caller)
        finally:
            for writer in writers:
                writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            if self.delay:
                await asyncio.sleep(self.delay)
            self._held += 1
            try:
                await self._flowing.wait()
            finally:
                self._held -= 1
            if self.rate:
                await asyncio.sleep(len(data) / self.rate)
            if self._is_hole:
                # A stream with a gap would be garbage: this connection stays open and carries nothing.
                await asyncio.Event().wait()
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()


def _reset(one: socket.socket) -> None:
    """Have the close to come send a RST: a cut connection must look cut."""
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


_PER_CONNECTION = frozenset({"connection", "host", "keep-alive", "transfer-encoding"})


class Refuse(NamedTuple):
    """Answer with this status in the server's place, as an API server words it."""

    status: int
    retry_after: str = ""


class CutAfter(NamedTuple):
    """Let this many bytes of the answer's body through, then reset the connection."""

    most: int


@dataclass(frozen=True, slots=True)
class Emptied:
    """Answer a list with all of its items left out."""


class Hang(NamedTuple):
    """Hold a request back for seconds, then let it through."""

    seconds: float


Fault = Refuse | CutAfter | Emptied | Hang


class HttpDoor:
    """Carries requests to the server at a base URL; an asynchronous context manager.

    With a server side of TLS it speaks https itself. `fault` chooses what becomes of a request, by its body
    too; None lets it through. `hanging` requests are held back now.
    """

    def __init__(
        self,
        upstream: str,
        *,
        server_tls: ssl.SSLContext | None = None,
        client_tls: ssl.SSLContext | None = None,
    ) -> None:
        self.fault: Callable[[web.Request], Fault | None] = lambda _: None
        self._upstream = URL(upstream)
        self._server_tls = server_tls
        self._client_tls = client_tls
        self._stack = contextlib.AsyncExitStack()
        self.port = 0
        self.hanging = 0

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, ssl=self._client_tls or True)
        self._session = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                skip_auto_headers=("Accept-Encoding", "User-Agent", "Content-Type"),
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        )
        app = web.Application(client_max_size=8 << 20)
        app.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, LOOPBACK, 0, ssl_context=self._server_tls).start()
        self.port = runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def break_lists(self, fault: Fault, *plurals: str, namespace: str = "") -> None:
        """Let a fault befall whatever is asked about these resources (of one namespace)."""
        scope = f"/namespaces/{namespace}/" if namespace else "/"

        def choose(request: web.Request) -> Fault | None:
            is_meant = any(request.path.endswith(f"{scope}{plural}") for plural in plurals)
            return fault if is_meant else None

        self.fault = choose

    def refuse(self, status: int, retry_after: str = "") -> None:
        """Answer everything with a status."""
        self.fault = lambda _: Refuse(status, retry_after)

    def heal(self) -> None:
        """Let everything through again."""
        self.fault = lambda _: None

    def turn_to(self, other: "HttpDoor") -> None:
        """Carry what comes from now on to where another door leads."""
        self._upstream, self._session = other._upstream, other._session

    def saw(self, request: web.Request, body: bytes) -> None:
        """Take note of a request before anything becomes of it."""

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.saw(request, body)
        fault = self.fault(request)
        if isinstance(fault, Emptied) and "watch" in request.query:
            fault = None
        if isinstance(fault, Refuse):
            return _refusal(fault)
        if isinstance(fault, Hang):
            self.hanging += 1
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                self.hanging -= 1
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _PER_CONNECTION}
        if isinstance(fault, Emptied):
            headers.pop("Accept-Encoding", None)
        url = self._upstream.join(URL(request.raw_path, encoded=True))
        try:
            async with self._session.request(
                request.method, url, data=body or None, headers=headers, allow_redirects=False
            ) as answer:
                return await self._relay(request, answer, fault)
        except (aiohttp.ClientError, ConnectionError):
            _abort(request)
            raise asyncio.CancelledError from None

    async def _relay(
        self, request: web.Request, answer: aiohttp.ClientResponse, fault: Fault | None
    ) -> web.StreamResponse:
        if isinstance(fault, Emptied) and answer.status == 200:
            return web.json_response({**msgspec.json.decode(await answer.read()), "items": []})
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for key, value in answer.headers.items():
            if key.lower() not in _PER_CONNECTION:
                response.headers[key] = value
        await response.prepare(request)
        left = fault.most if isinstance(fault, CutAfter) else None
        async for piece in answer.content.iter_any():
            await response.write(piece[:left])
            if left is not None and (left := left - len(piece)) <= 0:
                raise ConnectionResetError
        await response.write_eof()
        return response


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _refusal(fault: Refuse) -> web.Response:
    reasons = {401: "Unauthorized", 403: "Forbidden", 429: "TooManyRequests", 504: "Timeout"}
    status = {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": fault.status,
        "reason": reasons.get(fault.status, "InternalError"), "message": "the test says no",
    }  # fmt: skip
    headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
    return web.json_response(status, status=fault.status, headers=headers)


class ApiDoor(HttpDoor):
    """Stands before an API server and notes when a Lease was written: seconds of the monotonic clock."""

    def __init__(self, upstream: str, *, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
        super().__init__(upstream, server_tls=server_tls, client_tls=client_tls)
        self.renewals: list[float] = []

    async def _relay(
        self, request: web.Request, answer: aiohttp.ClientResponse, fault: Fault | None
    ) -> web.StreamResponse:
        if request.method != "GET" and "/leases" in request.path and answer.status < 300:
            self.renewals.append(time.monotonic())
        return await super()._relay(request, answer, fault)


@dataclass(frozen=True, slots=True)
class Write:
    """One write of one service that Consul was asked for; `at` is in seconds of the monotonic clock."""

    verb: str
    id: str
    at: float


class Recorder(HttpDoor):
    """Stands before a Consul and notes every write of a service, by whatever endpoint.

    With `loses_answers` writes are carried out and the connection is reset before the answer.
    `is_wanted` says of a service ID whether its removal would be wrongful at that very moment.
    """

    def __init__(self, upstream: str, is_wanted: Callable[[str], bool] = lambda _: False) -> None:
        super().__init__(upstream)
        self.loses_answers = False
        self.is_wanted = is_wanted
        self.writes: list[Write] = []
        self.wrongful: list[Write] = []

    async def _relay(
        self, request: web.Request, answer: aiohttp.ClientResponse, fault: Fault | None
    ) -> web.StreamResponse:
        if self.loses_answers and request.method == "PUT" and "consistent" not in request.query:
            await answer.read()
            raise ConnectionResetError
        return await super()._relay(request, answer, fault)

    def saw(self, request: web.Request, body: bytes) -> None:
        """Note the writes in a request."""
        if request.method not in {"PUT", "POST", "DELETE"}:
            return
        for verb, service_id in _writes_in(request.path, body):
            write = Write(verb, service_id, time.monotonic())
            self.writes.append(write)
            if verb == "remove" and (service_id == "" or self.is_wanted(service_id)):
                self.wrongful.append(write)

    def since(self, at: float, verb: str = "") -> list[Write]:
        """Return the writes from a moment on."""
        return [write for write in self.writes if write.at >= at and verb in {"", write.verb}]


def _writes_in(path: str, body: bytes) -> Iterator[tuple[str, str]]:
    """Yield verb (put or remove) and service ID; an empty ID is a whole node, or what we cannot read."""
    what = path.removeprefix("/v1/")
    if what == "txn":
        for operation in msgspec.json.decode(body):
            ((kind, parts),) = operation.items()
            verb = parts["Verb"]
            if kind == "Service" and not verb.startswith("get"):
                yield "remove" if verb.startswith("delete") else "put", parts["Service"]["ID"]
            elif kind == "Node" and verb.startswith("delete"):
                yield "remove", ""
    elif what.startswith("agent/service/deregister/"):
        yield "remove", unquote(what.removeprefix("agent/service/deregister/"))
    elif what == "agent/service/register":
        yield "put", msgspec.json.decode(body)["ID"]
    elif what == "catalog/deregister":
        yield "remove", msgspec.json.decode(body).get("ServiceID", "")
    elif what == "catalog/register":
        yield "put", (msgspec.json.decode(body).get("Service") or {}).get("ID", "")
