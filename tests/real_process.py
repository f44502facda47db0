"""Programs that tests start for real: loopback ports, waiting until they are ready, and no leftovers."""

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

LOOPBACK = "127.0.0.1"
STOP_WITHIN = 10.0  # seconds a program gets to end after a signal before it is killed
TAIL = 2000  # characters of a program's log an error shows

_groups: set[int] = set()


class StartFailedError(Exception):
    """A program ended or was not ready in time; the text holds the end of its log."""


class PortTakenError(StartFailedError):
    """Someone took a port between our asking the system for it and the program's binding it."""


@atexit.register
def _kill_groups() -> None:
    """Leave no process behind when the interpreter ends in the middle of a test."""
    for group in tuple(_groups):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Return distinct loopback ports that were free for TCP and UDP a moment ago."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            tcp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            udp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            tcp.bind((LOOPBACK, 0))
            try:
                udp.bind((LOOPBACK, tcp.getsockname()[1]))
            except OSError:
                continue
            ports.append(tcp.getsockname()[1])
    return ports


def has_ipv6() -> bool:
    """Whether this machine has the loopback address ::1."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


async def wait_until(is_true: Callable[[], Awaitable[bool]], within: float, *, every: float = 0.05) -> None:
    """Ask again and again until the answer is true; raise TimeoutError after `within` seconds."""
    async with asyncio.timeout(within):
        while not await is_true():
            await asyncio.sleep(every)


class Program:
    """One program run as a process group of its own; it can be started again after it ended."""

    def __init__(
        self, argv: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment` stands in place of ours."""
        self.argv = tuple(argv)
        self.log = log
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
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
        setpriv = shutil.which("setpriv")
        before = (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                (*before, *self.argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
        _groups.add(self._process.pid)

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

        await wait_until(has_ended, within, every=0.01)
        return int(process.returncode)

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
                await wait_until(has_ended, STOP_WITHIN, every=0.02)
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
            await wait_until(is_ready_or_ended, within)
        except TimeoutError:
            raise StartFailedError(f"{self.argv[0]} was not ready in {within} s: {self.tail()}") from None
        if not self.is_running:
            failure = PortTakenError if "address already in use" in self.tail() else StartFailedError
            raise failure(f"{self.argv[0]} ended: {self.tail()}")

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-TAIL:] if self.log.is_file() else ""
