"""A TCP proxy to stand before any server of a test: it cuts, refuses, stalls and delays from outside."""

import asyncio
import contextlib
import socket
import struct
from typing import Self

from real_process import LOOPBACK

_CHUNK = 65536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 seconds
_NARROW = 2048  # bytes of a receive buffer that hardly takes more than a head


class TcpProxy:
    """Carries bytes to and from `host:port`, whatever they mean; an asynchronous context manager.

    Its own port stays the same while it refuses. `delay` (seconds) holds each piece back for so long;
    `rate` (bytes a second, 0 for no bound) is the most that each direction of a connection carries.
    """

    def __init__(self, host: str, port: int, *, listen_on: str = LOOPBACK) -> None:
        self.delay = 0.0
        self.rate = 0.0
        self._is_hole = False
        self._is_deaf = False
        self._callers: set[asyncio.StreamWriter] = set()
        self._upstream = (host, port)
        self._host = listen_on
        self._bound = self._bind(0)
        self.port: int = self._bound.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._held = 0
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Host and port, an IPv6 host in brackets."""
        return f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"

    @property
    def is_held(self) -> bool:
        """Whether a stall keeps something back right now."""
        return self._held > 0

    async def holds(self) -> bool:
        """Say the same to whoever waits for it."""
        return self.is_held

    async def __aenter__(self) -> Self:
        await self.heal()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        self._bound.close()
        # What the system had accepted a moment before reaches `_accept` by then, which turns it away.
        await asyncio.sleep(0.01)
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def heal(self) -> None:
        """Let everything through again, what was held back included."""
        self.delay = self.rate = 0.0
        self._is_hole = self._is_deaf = False
        for caller in self._callers:
            caller.transport.resume_reading()  # type: ignore[attr-defined] # a socket's transport reads, too
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, sock=self._bound)

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
        self._is_deaf = True
        self._bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NARROW)
        self.cut()

    def cut(self) -> None:
        """Reset every open connection; new ones are welcome."""
        for task in self._connections:
            task.cancel()

    def refuse(self) -> None:
        """Reset every open connection and refuse new ones: a port that is bound and does not listen."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._bound = self._bind(self.port)
        self.cut()

    def _bind(self, port: int) -> socket.socket:
        bound = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((self._host, port))
        return bound

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._relay(reader, writer))
        self._connections.add(task)
        self._callers.add(writer)

        def end(_: asyncio.Task[None]) -> None:
            # Here and not in the task: one that is cancelled before its first step runs no line of its own.
            writer.transport.abort()
            self._connections.discard(task)
            self._callers.discard(writer)

        task.add_done_callback(end)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        if self._is_deaf:
            writer.transport.pause_reading()  # type: ignore[attr-defined] # a socket's transport reads, too
        try:
            answers, upstream = await asyncio.open_connection(*self._upstream)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, upstream))
                group.create_task(self._carry(answers, writer))
        except* OSError:
            pass  # either side went away: both do
        except* asyncio.CancelledError:
            _reset(writer)
        finally:
            if upstream is not None:
                upstream.transport.abort()

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
                # A stream with a gap would be garbage: this connection is dead and nobody is told.
                await asyncio.Event().wait()
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Have the close to come send a RST: a cut connection must look cut."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
