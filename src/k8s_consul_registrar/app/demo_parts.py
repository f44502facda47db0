"""What the demo is made of beside its story: processes of the modes, a real Consul, a table."""

import asyncio
import os
import re
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp

START_LIMIT = 15.0
STOP_LIMIT = 10.0


class DemoError(Exception):
    """A step of the demo did not come out as it should."""


class FoundConsul(NamedTuple):
    """A real Consul that runs for the demo."""

    address: str
    version: str


class Mode:
    """One mode of the daemon as a process, its log in a file."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.environment = dict(environment)

    @asynccontextmanager
    async def running(self, session: aiohttp.ClientSession, admin_port: int) -> AsyncIterator[None]:
        """Run it until the context ends; it is ready when this begins."""
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        command = (sys.executable, "-m", "k8s_consul_registrar", self.name)
        async with _process(command, self.log, {**inherited, **self.environment}) as process:
            await _until_ready(session, f"http://127.0.0.1:{admin_port}/readyz", process, self.log)
            yield


@asynccontextmanager
async def consul_on_path(folder: Path) -> AsyncIterator[FoundConsul | None]:
    """Run the `consul` found on PATH as a server of its own, or yield None where there is none."""
    program = shutil.which("consul")
    if program is None:
        yield None
        return
    http, server, serf = free_port(), free_port(), free_port()
    command = (
        program, "agent", "-dev", "-bind=127.0.0.1", "-client=127.0.0.1", "-log-level=warn",
        f"-http-port={http}", f"-server-port={server}", f"-serf-lan-port={serf}",
        "-serf-wan-port=-1", "-dns-port=-1", "-grpc-port=-1",
    )  # fmt: skip
    version = await asyncio.create_subprocess_exec(program, "version", stdout=asyncio.subprocess.PIPE)
    said, _ = await version.communicate()
    log = folder / "consul.log"
    async with (
        _process(command, log, dict(os.environ)) as process,
        aiohttp.ClientSession(trust_env=False) as session,
    ):
        leader = f"http://127.0.0.1:{http}/v1/status/leader"
        await _until_ready(session, leader, process, log, pattern=r'"[^"]+:\d+"')
        yield FoundConsul(f"127.0.0.1:{http}", said.decode(errors="replace").splitlines()[0])


@asynccontextmanager
async def _process(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C is the demo's to hear: it ends its processes in order.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_LIMIT):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _until_ready(
    session: aiohttp.ClientSession,
    url: str,
    process: asyncio.subprocess.Process,
    log: Path,
    pattern: str = "",
) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + START_LIMIT
    while loop.time() < until and process.returncode is None:
        try:
            async with session.get(url) as response:
                text = await response.text()
                if response.status == 200 and re.search(pattern, text):
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.05)
    raise DemoError(f"{url} is not ready; the end of its log:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-10:])


def free_port() -> int:
    """Return a port of loopback that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(f"  {line}" for line in lines)
