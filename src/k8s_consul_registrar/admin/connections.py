"""Connections to an HTTP server, bounded in number and in how long each may keep the server waiting."""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import cast

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

# Seconds between two looks for connections that are overdue.
_LOOK_EVERY = 1.0
# Seconds to wait when no connection can be accepted, for lack of file descriptors.
_ACCEPT_RETRY = 0.2


@dataclass(frozen=True, slots=True)
class Bounds:
    """The number of connections at once, and the seconds that each may take.

    `request` is for a TLS handshake, and for the head of the first request; `idle` for the head of each
    further one; `answer` for making an answer and for reading it to its end.
    """

    connections: int = 128
    request: float = 10.0
    idle: float = 30.0
    answer: float = 120.0


class _State(Enum):
    NEW = "waiting for the handshake and the first request"
    ANSWERING = "making an answer"
    SENDING = "sending an answer"
    IDLE = "waiting for another request"


class _Connection(asyncio.Protocol):
    """One connection: passes everything on to the HTTP protocol, and knows its state since when."""

    def __init__(self, http: asyncio.Protocol, now: float) -> None:
        self._http = http
        self.transport: asyncio.Transport | None = None
        self.serving: asyncio.Task[None] | None = None
        self.closed = asyncio.Event()
        self.state = _State.NEW
        self.since = now

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._http.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._http.data_received(data)

    def eof_received(self) -> bool | None:
        return self._http.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._http.connection_lost(exc)

    @property
    def is_waited_for(self) -> bool:
        """True if the client has to act next."""
        return self.state in (_State.NEW, _State.IDLE)

    def update(self, now: float) -> None:
        """Note that an answer was sent to its end: from now on the next request is waited for."""
        is_sent = self.transport is not None and not self.transport.get_write_buffer_size()
        if self.state is _State.SENDING and is_sent:
            self.state, self.since = _State.IDLE, now

    def is_overdue(self, now: float, bounds: Bounds) -> bool:
        """Return True if it has kept the server waiting for too long."""
        limits = {_State.NEW: bounds.request, _State.IDLE: bounds.idle}
        return now - self.since > limits.get(self.state, bounds.answer)

    def cut(self) -> None:
        """End it at once, whatever is under way."""
        if self.transport is not None:
            self.transport.abort()
        elif self.serving is not None:
            self.serving.cancel()


class Connections:
    """The connections of a listening socket; `middleware` must come before all others of the application.

    At the limit a new connection takes the place of the one that has been waited for longest, so that clients
    which only connect keep no other client out; while all are being answered it is turned away. The sockets
    are accepted here, because `loop.create_server` offers no way to end a connection during its TLS handshake.
    """

    def __init__(self, bounds: Bounds | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._open: dict[_Connection, None] = {}
        self._context: ssl.SSLContext | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def middleware(self) -> Middleware:
        """The middleware that reports when a request arrives, and when it was handled."""

        @web.middleware
        async def report(request: web.Request, handler: Handler) -> web.StreamResponse:
            connection = next((one for one in self._open if one.transport is request.transport), None)
            if connection is None:
                return await handler(request)
            connection.state, connection.since = _State.ANSWERING, self._clock()
            try:
                return await handler(request)
            finally:
                connection.state = _State.SENDING

        return report

    def start(
        self, listening: socket.socket, http: Callable[[], asyncio.Protocol], context: ssl.SSLContext | None
    ) -> None:
        """Accept from now on; `http` makes the protocol of each connection."""
        self._context = context
        listening.settimeout(0)
        self._tasks = [
            asyncio.create_task(self._accept(listening, http)),
            asyncio.create_task(self._cut_overdue()),
        ]

    def renew(self, context: ssl.SSLContext | None) -> None:
        """Accept with another context from now on; handshakes under the old one are cut."""
        self._context = context
        for connection in list(self._open):
            if connection.transport is None:
                connection.cut()

    async def stop(self) -> None:
        """Accept no more; connections that were made stay, for the server to end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.renew(None)

    async def _accept(self, listening: socket.socket, http: Callable[[], asyncio.Protocol]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError:
                await asyncio.sleep(_ACCEPT_RETRY)
                continue
            if not self._make_room():
                accepted.close()
                continue
            connection = _Connection(http(), self._clock())
            self._open[connection] = None
            connection.serving = asyncio.create_task(self._serve(connection, accepted))
            connection.serving.add_done_callback(partial(self._ended, connection, accepted))

    async def _serve(self, connection: _Connection, accepted: socket.socket) -> None:
        # Ignore aborted connections and failed handshakes.
        with suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self._bounds.request if self._context else None,
            )
            await connection.closed.wait()

    def _ended(self, connection: _Connection, accepted: socket.socket, _: asyncio.Task[None]) -> None:
        self._open.pop(connection, None)
        if connection.transport is None:
            accepted.close()  # a task that was cancelled before its first step closed nothing

    def _make_room(self) -> bool:
        """Cut the connection that has been waited for longest if there is no place; return False if there is none."""
        if len(self._open) < self._bounds.connections:
            return True
        self._update()
        waited_for = [one for one in self._open if one.is_waited_for]
        if not waited_for:
            return False
        longest = min(waited_for, key=lambda one: one.since)
        self._open.pop(longest)
        longest.cut()
        return True

    def _update(self) -> float:
        now = self._clock()
        for connection in self._open:
            connection.update(now)
        return now

    async def _cut_overdue(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            now = self._update()
            for connection in [one for one in self._open if one.is_overdue(now, self._bounds)]:
                connection.cut()
