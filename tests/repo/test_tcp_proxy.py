"""The proxy that tests put before servers: each fault looks to a client as the real one does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from support.doors import TcpProxy
from support.processes import LOOPBACK
from support.waiting import PATIENCE, until


@contextlib.asynccontextmanager
async def an_echo_behind_a_door() -> AsyncIterator[TcpProxy]:
    """Serve an echo, and yield a door before it."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, LOOPBACK, 0)
    async with server, TcpProxy(LOOPBACK, server.sockets[0].getsockname()[1]) as door:
        yield door


async def say(door: TcpProxy, *words: bytes) -> bytes:
    """Send words on a new connection, end it, and return all that comes back."""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection(LOOPBACK, door.port)
        try:
            writer.writelines(words)
            writer.write_eof()
            return await reader.read()
        finally:
            writer.close()


async def test_bytes_and_ends_are_carried() -> None:
    """Bytes arrive, and the end of one side reaches the other."""
    async with an_echo_behind_a_door() as door:
        assert await say(door, b"one ", b"two") == b"one two"


async def test_refusing_is_a_refused_connection_and_an_end_to_open_ones() -> None:
    """The port stays the door's own meanwhile, and works again afterwards."""
    async with an_echo_behind_a_door() as door:
        reader, writer = await asyncio.open_connection(LOOPBACK, door.port)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        for _ in range(2):
            door.refuse()
            with pytest.raises(ConnectionResetError):
                await reader.read()
            with pytest.raises(ConnectionRefusedError):
                await say(door, b"hello")
        await door.heal()
        assert await say(door, b"hello") == b"hello"
        writer.close()


async def test_cut_is_a_reset() -> None:
    """A connection that is cut never looks like a clean end; new ones are welcome."""
    async with an_echo_behind_a_door() as door:
        reader, writer = await asyncio.open_connection(LOOPBACK, door.port)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        door.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert await say(door, b"hello") == b"hello"
        writer.close()


async def test_stall_holds_back_until_it_is_healed() -> None:
    """Connections are accepted, nothing is carried, and nothing is lost."""
    async with an_echo_behind_a_door() as door:
        door.stall()
        answer = asyncio.create_task(say(door, b"hello"))
        await until(lambda: door.is_held)
        assert not answer.done()
        await door.heal()
        assert await answer == b"hello"


async def test_server_that_is_not_there_is_an_end() -> None:
    """Where nothing listens behind the door, the connection ends without an answer."""
    async with TcpProxy(LOOPBACK, 1) as door:
        with contextlib.suppress(ConnectionResetError):
            assert await say(door, b"hello") == b""


async def test_black_hole_swallows_for_good() -> None:
    """An open connection hears nothing more, healed or not; a new one works once it is healed."""
    async with an_echo_behind_a_door() as door:
        reader, writer = await asyncio.open_connection(LOOPBACK, door.port)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        door.black_hole()
        writer.write(b"lost")
        await asyncio.sleep(0.05)
        await door.heal()
        assert await say(door, b"hello") == b"hello"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.read(1)
        writer.close()


async def test_rate_bounds_what_is_carried() -> None:
    """A thousand bytes at ten thousand a second take a tenth of a second each way."""
    async with an_echo_behind_a_door() as door:
        door.rate = 10_000
        began = asyncio.get_running_loop().time()
        assert await say(door, b"x" * 1000) == b"x" * 1000
        assert asyncio.get_running_loop().time() - began > 0.15
