"""Accepts connections for an HTTP server, bounded: how many, and how long each may keep the server waiting."""

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import cast

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

# Seconds between two looks at who has been waited for too long.
_LOOK_EVERY = 1.0
# Seconds to let pass when no connection can be accepted, for want of file descriptors.
_REST = 0.2


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many connections there may be at once, and for how many seconds each may make us wait.

    `request` is for a TLS handshake, and for the head of the first request; `idle` for that of each further
    one; `answer` for an answer to be made and read to its end.
    """

    connections: int = 128
    request: float = 10.0
    idle: float = 30.0
    answer: float = 120.0


class _OurFaults(logging.Filter):
    """Leaves out what callers do wrong, which aiohttp tells as errors, each with a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, ConnectionError | HttpProcessingError)


def server_log() -> logging.Logger:
    """Return the log for a server's own faults."""
    log = logging.getLogger("k8s_consul_registrar.http")
    if not log.filters:
        log.addFilter(_OurFaults())
    return log


class _Connection(asyncio.Protocol):
    """One connection: passes everything on to the HTTP protocol, and knows what it waits for and since when."""

    def __init__(self, http: asyncio.Protocol, now: float) -> None:
        self._http = http
        self.transport: asyncio.Transport | None = None
        self.serving: asyncio.Task[None] | None = None
        self.closed = asyncio.Event()
        self.since = now
        self.is_answering = self.is_handled = self.has_asked = False

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

    def begins_answer(self, now: float) -> None:
        """Note that the head of a request is there."""
        self.is_answering, self.is_handled, self.has_asked, self.since = True, False, True, now

    def catch_up(self, now: float) -> None:
        """Note where an answer was made and sent to its end: from here on the next request is waited for."""
        is_sent = self.transport is not None and not self.transport.get_write_buffer_size()
        if self.is_answering and self.is_handled and is_sent:
            self.is_answering, self.since = False, now

    def is_overdue(self, now: float, bounds: Bounds) -> bool:
        """Whether it has made us wait for too long."""
        if self.is_answering:
            return now - self.since > bounds.answer
        return now - self.since > (bounds.idle if self.has_asked else bounds.request)

    def cut(self) -> None:
        """End it at once, whatever is under way."""
        if self.transport is not None:
            self.transport.abort()
        elif self.serving is not None:
            self.serving.cancel()


class Acceptor:
    """Accepts on a listening socket; its `middleware` belongs in front of all others of the application.

    Where there are as many connections as may be, a new one takes the place of the one that has been waited for
    longest, so that nobody who only connects keeps others out; while all are being answered it is turned away.
    """

    def __init__(self, bounds: Bounds | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._open: dict[_Connection, None] = {}
        self._context: ssl.SSLContext | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        """Return how many connections there are."""
        return len(self._open)

    @property
    def middleware(self) -> Middleware:
        """What tells us when a request is there, and when it was handled."""

        @web.middleware
        async def watched(request: web.Request, handler: Handler) -> web.StreamResponse:
            connection = next((one for one in self._open if one.transport is request.transport), None)
            if connection is None:
                return await handler(request)
            connection.begins_answer(self._clock())
            try:
                return await handler(request)
            finally:
                connection.is_handled = True

        return watched

    def start(
        self, listening: socket.socket, http: Callable[[], asyncio.Protocol], context: ssl.SSLContext | None
    ) -> None:
        """Accept from here on; `http` makes the protocol of each connection."""
        self._context = context
        listening.settimeout(0)
        self._tasks = [
            asyncio.create_task(self._accept(listening, http)),
            asyncio.create_task(self._look()),
        ]

    def renew(self, context: ssl.SSLContext | None) -> None:
        """Accept with another context from here on; who is still shaking hands by the old one is cut."""
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
                await asyncio.sleep(_REST)
                continue
            if not self._has_room():
                accepted.close()
                continue
            connection = _Connection(http(), self._clock())
            self._open[connection] = None
            connection.serving = asyncio.create_task(self._serve(connection, accepted))
            connection.serving.add_done_callback(partial(self._ended, connection, accepted))

    def _ended(self, connection: _Connection, accepted: socket.socket, _: asyncio.Task[None]) -> None:
        self._open.pop(connection, None)
        if connection.transport is None:
            accepted.close()  # a task that was cancelled before its first step closed nothing

    def _has_room(self) -> bool:
        """Make room for one more by ending the one that has been waited for longest; say whether there is any."""
        if len(self._open) < self._bounds.connections:
            return True
        self._catch_up()
        waited_for = [one for one in self._open if not one.is_answering]
        if not waited_for:
            return False
        longest = min(waited_for, key=lambda one: one.since)
        self._open.pop(longest)
        longest.cut()
        return True

    async def _serve(self, connection: _Connection, accepted: socket.socket) -> None:
        # Whoever connects and goes, or speaks no TLS, is nobody's business.
        with suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self._bounds.request if self._context else None,
            )
            await connection.closed.wait()

    def _catch_up(self) -> float:
        now = self._clock()
        for connection in self._open:
            connection.catch_up(now)
        return now

    async def _look(self) -> None:
        """Cut off, now and then, who has made us wait for too long."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            now = self._catch_up()
            for connection in [one for one in self._open if one.is_overdue(now, self._bounds)]:
                connection.cut()
