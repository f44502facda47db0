"""The machine a benchmark runs on: its cores, its programs, and what a process of it has used."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Self

LOOPBACK = "127.0.0.1"
STARTS_WITHIN = 15.0  # seconds
TICKS = os.sysconf("SC_CLK_TCK")
SYSTEM_PROGRAMS = "/usr/sbin:/usr/local/sbin:/sbin"


class Missing(Exception):
    """Something the benchmark needs is not on this machine; the text says what to do."""


def program(name: str, package: str) -> str:
    """Return the path of a program; raises Missing naming the Debian package that has it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PROGRAMS}")
    if found is None:
        raise Missing(f"{name} is not on this machine: apt-get install -y {package}")
    return found


def free_port() -> int:
    """Return a port that was free on every IPv4 address a moment ago."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])


class Cores:
    """Which cores do what: the first is the proxy's alone, all others are the load's and the kubelets'."""

    def __init__(self) -> None:
        available = sorted(os.sched_getaffinity(0))
        if len(available) < 2:
            raise Missing("two cores are needed: one for the proxy under test and one for everything else")
        self.proxy = str(available[0])
        self.others = ",".join(str(core) for core in available[1:])

    def keep_off(self) -> None:
        """Leave the proxy's core, for this process and what it starts."""
        os.sched_setaffinity(0, {int(core) for core in self.others.split(",")})


class Process:
    """A program on chosen cores, with its log; an asynchronous context manager that leaves nothing behind."""

    def __init__(
        self, argv: Sequence[str], *, cores: str, log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self._argv = ("taskset", "-c", cores, *argv)
        self._environment = {**os.environ, **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None
        self.log = log

    async def __aenter__(self) -> Self:
        with self.log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv, stdout=output, stderr=output, env=self._environment, start_new_session=True
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        process = self._process
        assert process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def until_listening(self, port: int, host: str = LOOPBACK) -> None:
        """Wait until it accepts connections; raises with the end of its log where it does not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STARTS_WITHIN):
                while self._process is not None and self._process.returncode is None:
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_connection(host, port)
                        writer.close()
                        return
                    await asyncio.sleep(0.05)
        raise RuntimeError(f"{self._argv[3]} does not listen: {self.log.read_text(errors='replace')[-2000:]}")

    def family(self) -> list[int]:
        """Return the process and all below it."""
        assert self._process is not None
        found = [self._process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
        return found

    def cpu_seconds(self) -> float:
        """Return the user and system time all of them have taken."""
        total = 0
        for pid in self.family():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def resident(self) -> int:
        """Return the memory all of them hold, in bytes; what they share is counted in each."""
        total = 0
        for pid in self.family():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) * 1024
        return total
