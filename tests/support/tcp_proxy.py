"""A TCP proxy to stand before any server of a test: it cuts, refuses, stalls and delays from outside."""

import asyncio
import contextlib
import socket
import struct
from typing import Self

from support.ports import reserve_ports
from support.real_process import LOOPBACK

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
        self._upstream = (host, port)
        self._host = listen_on
        (self.port,) = reserve_ports(1)  # it is bound again after each refusal
        self._bound = self._bind(self.port)
        self._listens_in: asyncio.AbstractEventLoop | None = None
        self._flowing, self._hearing = asyncio.Event(), asyncio.Event()
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
            answers, forth = await asyncio.open_connection(*self._upstream)
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
                # A stream with a gap would be garbage: this connection is dead and nobody is told.
                await asyncio.Event().wait()
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()


def _reset(one: socket.socket) -> None:
    """Have the close to come send a RST: a cut connection must look cut."""
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
