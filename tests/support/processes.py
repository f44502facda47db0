"""Programs that tests start for real: loopback ports, waiting until they are ready, and no leftovers."""

import atexit
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from support.forks import Forked, can_fork, fork
from support.waiting import PATIENCE, until

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _HIGHEST = 10_000, 32_000
_BLOCK = 32  # ports


def reserve_ports(count: int) -> list[int]:
    """Return distinct ports, free for TCP and UDP, that no test is given again while this process runs."""
    return list(itertools.islice(_free, count))


def _ports() -> Iterator[int]:
    """Return ports that are free, a block at a time."""
    blocks = _candidates()
    start = int.from_bytes(os.urandom(4), "big") % len(blocks)
    reservations: list[socket.socket] = []
    for first in (*blocks[start:], *blocks[:start]):
        if (reservation := reserve_block(first)) is not None:
            reservations.append(reservation)
            yield from filter(_is_free, range(first, first + _BLOCK))
    raise AssertionError(f"no free port in {blocks}")


def _candidates() -> range:
    """Return where blocks begin: below the ports that the system hands out, or above where there are more."""
    ports = range(_LOWEST, _HIGHEST)
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, _EPHEMERAL.read_text().split())
        below, above = range(_LOWEST, min(first, _HIGHEST)), range(last + 1, 65_536)
        if max(len(below), len(above)) >= 100 * _BLOCK:
            ports = max(below, above, key=len)
    return range(ports.start, ports.stop - _BLOCK + 1, _BLOCK)


def reserve_block(first: int) -> socket.socket | None:
    """Return the socket that reserves a block of ports, None where another process has it."""
    reservation = socket.socket(socket.AF_UNIX)
    try:
        reservation.bind(f"\0k8s-consul-registrar/tests/ports/{first}")
    except OSError:
        reservation.close()
        return None
    return reservation


def _is_free(port: int) -> bool:
    """Return whether nothing uses a port, on any address."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        try:
            tcp.bind(("", port))
            udp.bind(("", port))
        except OSError:
            return False
    return True


_free = _ports()


LOOPBACK = "127.0.0.1"
STOP_WITHIN = PATIENCE / 3  # seconds a program gets to end after a signal before it is killed
TAIL = 2000  # characters of a program's log an error shows

_groups: set[int] = set()


class StartFailedError(Exception):
    """A program ended or was not ready in time; the text holds the end of its log."""


class PortTakenError(StartFailedError):
    """Something outside the tests took the program's port before the program could bind it."""


@atexit.register
def _kill_groups() -> None:
    """Leave no process behind when the interpreter ends in the middle of a test."""
    for group in tuple(_groups):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def has_ipv6() -> bool:
    """Return whether this machine has the loopback address ::1."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that ended and was not reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Program:
    """One program run as a process group of its own; it can be started again after it ended.

    A start of our own program is a fork (`support/forks.py`).
    """

    def __init__(
        self, argv: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment` replaces that of the tests."""
        self.argv = tuple(argv)
        self.log = log
        self._environment = environment
        self._process: subprocess.Popen[bytes] | Forked | None = None

    @property
    def is_running(self) -> bool:
        """True if it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process; setpriv becomes the program itself."""
        assert self._process is not None, "not started"
        return self._process.pid

    def launch(self) -> None:
        """Start it with its output appended to the log.

        Where `setpriv` is there, the kernel kills it with the thread that started it, so that not even
        a `kill -9` of the test run leaves it behind.
        """
        with self.log.open("ab") as output:
            if self._environment is not None and can_fork(self.argv, self._environment):
                self._process = fork(self.argv, self._environment, output.fileno())
            else:
                self._process = self._start(output)
        _groups.add(self._process.pid)

    def _start(self, output: BinaryIO) -> subprocess.Popen[bytes]:
        setpriv = shutil.which("setpriv")
        before = (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()
        return subprocess.Popen(
            (*before, *self.argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=self._environment,
            start_new_session=True,
        )

    def send(self, number: int) -> None:
        """Send a signal to the whole group; a group that is gone is no error."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def ended(self, within: float) -> int:
        """Wait for the end and return the exit code, below 0 for a signal; raise TimeoutError."""
        process = self._process
        assert process is not None, "not started"

        async def has_ended() -> bool:
            return process.poll() is not None

        await until(has_ended, within=within)
        assert process.returncode is not None
        return process.returncode

    async def stop(self, number: int = signal.SIGTERM) -> None:
        """Send the signal and wait for the end; whatever is left of the group is killed."""
        process = self._process
        if process is None:
            return
        self.send(number)

        async def has_ended() -> bool:
            return process.poll() is not None

        try:
            with contextlib.suppress(TimeoutError):
                await until(has_ended, within=STOP_WITHIN)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _groups.discard(process.pid)
            self._process = None

    async def ready(self, is_ready: Callable[[], Awaitable[bool]], within: float) -> None:
        """Wait until `is_ready` answers true, at most `within` seconds.

        Raises PortTakenError or StartFailedError when the program ends first or time runs out.
        """

        async def is_ready_or_ended() -> bool:
            return await is_ready() or not self.is_running

        try:
            await until(is_ready_or_ended, within=within)
        except TimeoutError:
            raise StartFailedError(f"{self.argv[0]} was not ready in {within} s: {self.tail()}") from None
        if not self.is_running:
            failure = PortTakenError if "address already in use" in self.output() else StartFailedError
            raise failure(f"{self.argv[0]} ended: {self.tail()}")

    def output(self) -> str:
        """Return the whole log."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def tail(self) -> str:
        """Return the end of the log."""
        return self.output()[-TAIL:]
