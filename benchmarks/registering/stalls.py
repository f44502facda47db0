"""Stalls of a registrar's loop, seen from a process of its own."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from registering.stage import FOLDER, Registrar


@dataclass(frozen=True, slots=True)
class Stalls:
    """The longest answer of /healthz, and the longest delay of a mere sleep meanwhile, in seconds."""

    longest: float = 0.0
    late: float = 0.0


@contextlib.asynccontextmanager
async def stalls(run: Registrar) -> AsyncIterator[list[Stalls]]:
    """Ask a registrar's /healthz every 20 ms; the list is filled at the end."""
    found: list[Stalls] = []
    await run.until_answering()
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(FOLDER / "stall.py"), run.admin, stdin=pipe, stdout=pipe
    )
    try:
        yield found
        output, _ = await asyncio.wait_for(process.communicate(b"\n"), 30)
        said = msgspec.json.decode(output)
        found.append(Stalls(said["longest"], said["late"]))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
