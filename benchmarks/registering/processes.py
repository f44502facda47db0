"""Processes that a benchmark starts: started, waited for, measured in /proc, and ended."""

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import aiohttp

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0  # seconds that one step of a benchmark may take
_STOP_WITHIN = 10.0  # seconds between SIGTERM and SIGKILL
_SETTLE = 2.0  # seconds in which a new Consul leader does what it does once (its own CA, for one)
_START_ATTEMPTS = 5  # another process may take a port between our look and Consul's start
_TICKS = os.sysconf("SC_CLK_TCK")

_groups: set[int] = set()


@atexit.register
def _kill_groups() -> None:
    for group in tuple(_groups):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


class BenchmarkError(RuntimeError):
    """A measurement that cannot be made, or that measured something else."""


async def wait_until(
    is_true: Callable[[], Awaitable[bool]], *, within: float = PATIENCE, every: float = 0.05, what: str
) -> None:
    """Ask until the answer is true; BenchmarkError that says `what` did not happen in time."""
    try:
        async with asyncio.timeout(within):
            while True:
                if await is_true():
                    return
                await asyncio.sleep(every)
    except TimeoutError:
        raise BenchmarkError(f"{what}: not within {within:.0f} s") from None


def free_ports(count: int) -> list[int]:
    """Return loopback ports that were free for TCP and UDP a moment ago."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            tcp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            udp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            tcp.bind((LOOPBACK, 0))
            with contextlib.suppress(OSError):
                udp.bind(tcp.getsockname())
                ports.append(tcp.getsockname()[1])
    return ports


def load() -> float:
    """Return the machine's load over the last minute."""
    return os.getloadavg()[0]


def cpu_ticks() -> tuple[int, int]:
    """Return the ticks in which the machine was idle so far, and all its ticks (proc(5), /proc/stat)."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3], sum(ticks)


class Program:
    """One program, as a process group of its own that ends with the benchmark."""

    def __init__(self, argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._argv = tuple(argv)
        self._log = log
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start it with its output appended to the log."""
        setpriv = shutil.which("setpriv")
        before = (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                (*before, *self._argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
        _groups.add(self._process.pid)

    async def stop(self) -> None:
        """End it, by force where SIGTERM does not."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)

        async def has_ended() -> bool:
            return process.poll() is not None

        try:
            with contextlib.suppress(BenchmarkError):
                await wait_until(has_ended, within=_STOP_WITHIN, every=0.02, what="the program ends")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _groups.discard(process.pid)
            self._process = None

    async def until_ready(self, is_ready: Callable[[], Awaitable[bool]], what: str) -> None:
        """Wait until `is_ready`; BenchmarkError with the end of its log when it ends first."""

        async def is_ready_or_ended() -> bool:
            return not self.is_running or await is_ready()

        await wait_until(is_ready_or_ended, every=0.01, what=what)
        if not self.is_running:
            raise BenchmarkError(f"{what}: {' '.join(self._argv[:4])} ended:\n{self.tail()}")

    @property
    def is_running(self) -> bool:
        """True if it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def cpu_seconds(self) -> float:
        """The user and system time it has used so far."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    @property
    def precise_cpu_seconds(self) -> float:
        """The same of the threads that it has now, in nanoseconds instead of ticks where the kernel counts them."""
        if self._process is not None:
            with contextlib.suppress(OSError, ValueError):
                tasks = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
                return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
        return self.cpu_seconds

    @property
    def peak_mb(self) -> float:
        """The most memory it has had so far (VmHWM), in MB of 10^6 bytes."""
        return self._memory("VmHWM")

    @property
    def resident_mb(self) -> float:
        """The memory it has now (VmRSS), in MB of 10^6 bytes."""
        return self._memory("VmRSS")

    def tail(self) -> str:
        """Return the end of its log."""
        return self._log.read_text(errors="replace")[-2000:] if self._log.is_file() else ""

    def _memory(self, field: str) -> float:
        line = next(line for line in self._proc("status").splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024 / 1e6

    def _proc(self, name: str) -> str:
        if self._process is None or self._process.poll() is not None:
            raise BenchmarkError(f"{' '.join(self._argv[:4])} ended:\n{self.tail()}")
        return Path(f"/proc/{self._process.pid}/{name}").read_text()


def consul_binary() -> Path:
    """Return a Consul: the one that scripts/fetch-real-servers left, otherwise the one on PATH."""
    cached = sorted((ROOT / ".cache" / "real").glob("consul-*/usr/bin/consul"))
    found = cached[0] if cached else shutil.which("consul")
    if found is None:
        raise BenchmarkError("there is no Consul: scripts/fetch-real-servers fetches one")
    return Path(found)


def consul_version() -> str:
    """Return the version that Consul names itself."""
    said = subprocess.run([consul_binary(), "version"], check=True, capture_output=True, text=True).stdout
    return said.split()[1].removeprefix("v")


@contextlib.asynccontextmanager
async def consul(*flags: str) -> AsyncIterator[str]:
    """Run a Consul, one agent that is its own server, and yield its HTTP address."""
    async with consul_program(*flags) as (_, address):
        yield address


@contextlib.asynccontextmanager
async def consul_program(*flags: str) -> AsyncIterator[tuple[Program, str]]:
    """Run a Consul, and yield its process and its HTTP address."""
    with tempfile.TemporaryDirectory(prefix="bench-consul-", ignore_cleanup_errors=True) as folder:
        program, address = await _started_consul(Path(folder), flags)
        try:
            await asyncio.sleep(_SETTLE)
            yield program, address
        finally:
            await program.stop()


async def _started_consul(folder: Path, flags: Sequence[str]) -> tuple[Program, str]:
    for attempt in range(_START_ATTEMPTS):
        http, serf, rpc = free_ports(3)
        ports = f"ports {{ http={http} serf_lan={serf} server={rpc} serf_wan=-1 dns=-1 grpc=-1 https=-1 }}"
        settings = [
            f"-data-dir={folder / str(attempt)}", "-node=bench-agent", f"-bind={LOOPBACK}", f"-client={LOOPBACK}",
            "-server", "-bootstrap-expect=1", f"-hcl={ports}", "-hcl=performance { raft_multiplier = 1 }",
            "-hcl=disable_update_check = true",
            # A registrar that falls behind leaves many blocking queries of the benchmark waiting.
            "-hcl=limits { http_max_conns_per_client = 8192 }",
        ]  # fmt: skip
        argv = [str(consul_binary()), "agent", *settings, *flags]
        program = Program(argv, folder / f"consul-{attempt}.log")
        program.launch()
        address = f"{LOOPBACK}:{http}"
        try:
            await program.until_ready(partial(_takes_writes, address), "Consul takes writes")
        except BenchmarkError:
            is_port_taken = "address already in use" in program.tail()
            await program.stop()
            if not is_port_taken or attempt == _START_ATTEMPTS - 1:
                raise
        else:
            return program, address
    raise AssertionError("unreachable: the last attempt returns or raises")


async def _takes_writes(address: str) -> bool:
    """Return whether there is a leader and the agent is in the catalog."""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        async with aiohttp.ClientSession(f"http://{address}") as session:
            async with session.get("/v1/status/leader") as answer:
                if not await answer.json():
                    return False
            async with session.get("/v1/catalog/node/bench-agent") as answer:
                return bool(await answer.json())
    return False
