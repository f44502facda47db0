"""The daemon as its users run it: a process of its own, known by its log, its ports and its exit code."""

import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import aiohttp
import msgspec

from support.internal_errors import counted_on
from support.processes import Program
from support.waiting import PATIENCE, PATIENCE_FACTOR, until

# Seconds from SIGTERM to its end; a quiet machine needs a tenth, Kubernetes kills after 30.
STOP_WITHIN = 20.0 * PATIENCE_FACTOR
LAST_WORD = 2.0  # seconds it has to tell its metrics before it is killed
# Text that a daemon must never print: it shows an error that the code did not expect.
UNWANTED = (
    "Traceback",
    "Exception ignored",
    "was never",
    "Warning:",
    "Unclosed",
    "Task exception",
    '"exception"',
)


def moment_of(line: Mapping[str, Any]) -> float:
    """Return when a log line was written, in seconds of the wall clock."""
    return datetime.fromisoformat(line["timestamp"]).timestamp()


class Daemon:
    """One run of `python -m k8s_consul_registrar`; an asynchronous context manager.

    Nothing of our environment reaches it but what is given. However the block ends, the process is gone
    after it and its output held nothing UNWANTED and none of the `secrets`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        *,
        secrets: Sequence[str] = (),
    ) -> None:
        self._secrets = tuple(secrets)
        self._errors = 0.0
        self._program = Program(
            [sys.executable, "-m", "k8s_consul_registrar", *arguments],
            folder / f"daemon-{len(list(folder.glob('daemon-*')))}.log",
            environment={
                "PATH": os.environ["PATH"],
                "HOME": str(folder),
                # A connection that is open when the loop closes is of no account: the process ends.
                "PYTHONWARNINGS": "default,ignore::ResourceWarning",
                "ADMIN_PORT": "0",
                **environment,
            },
        )
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE))

    async def __aenter__(self) -> Self:
        self._program.launch()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        errors = self._errors or (await self._internal_errors() if kind is None else 0)
        await self._session.close()
        await self._program.stop(signal.SIGKILL)
        if kind is None:
            self.assert_clean()
            assert not errors, f"{errors:g} internal errors:\n{self.output}"

    def keep_secret(self, *secrets: str) -> None:
        """Fail at the end if one of these is in the output."""
        self._secrets = (*self._secrets, *secrets)

    @property
    def output(self) -> str:
        """Everything it wrote so far, on stdout and stderr."""
        return self._program.log.read_text(encoding="utf-8") if self._program.log.exists() else ""

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log lines so far, decoded; whatever is no JSON is left out."""
        whole = self.output.rpartition("\n")[0].splitlines()
        return [msgspec.json.decode(line) for line in whole if line.startswith("{")]

    def assert_clean(self) -> None:
        """Fail when the output holds what must never be there."""
        output = self.output
        for text in (*UNWANTED, *self._secrets):
            assert text not in output, f"{text!r} in the daemon's output:\n{output}"

    def said(self, event: str, text: str = "") -> list[dict[str, Any]]:
        """Return the log lines of an event whose JSON holds a text."""
        return [line for line in self.lines if line["event"] == event and text in str(line)]

    async def until_said(self, event: str, text: str = "", *, within: float = PATIENCE) -> dict[str, Any]:
        """Wait for a log line of an event that holds a text, and return the latest such line."""
        await self.until(lambda: bool(self.said(event, text)), f"the line {event!r} {text!r}", within=within)
        return self.said(event, text)[-1]

    async def until(
        self, is_true: Callable[[], bool | Awaitable[bool]], what: str = "", *, within: float = PATIENCE
    ) -> None:
        """Wait until a condition holds; fail with the output of the daemon."""
        await until(is_true, what, within=within, context=lambda: self.output)

    async def passes(self, count: int = 1) -> dict[str, Any]:
        """Wait for this many more passes over Consul, and return the last one's line."""
        wanted = len(self.said("resync")) + count
        await self.until(lambda: len(self.said("resync")) >= wanted, f"{count} more passes")
        return self.said("resync")[-1]

    async def port(self, field: str) -> int:
        """Return the port that its latest line names under a field, once there is one."""
        await self.until(lambda: any(field in line for line in self.lines), f"the line with {field}")
        return int(next(line[field] for line in reversed(self.lines) if field in line))

    async def admin(self, path: str) -> tuple[int, str]:
        """Return status and text of an admin endpoint."""
        url = f"http://127.0.0.1:{await self.port('admin_port')}{path}"
        async with self._session.get(url) as response:
            return response.status, await response.text()

    async def is_ready(self) -> bool:
        """Return whether its readiness probe succeeds; the port may be opened again meanwhile."""
        with contextlib.suppress(aiohttp.ClientConnectionError):
            return (await self.admin("/readyz"))[0] == 200
        return False

    async def ready(self) -> None:
        """Wait until it is ready."""
        await self.until(self.is_ready, "ready")

    async def metric(self, sample: str) -> float | None:
        """Return the value of one sample, such as `name{label="x"}`, None where there is none."""
        _, page = await self.admin("/metrics")
        for line in page.splitlines():
            name, _, value = line.rpartition(" ")
            if name == f"k8s_consul_registrar_{sample}":
                return float(value)
        return None

    async def measures(self, sample: str, value: float) -> None:
        """Wait until a sample has this value: targets and rejections are counted a little after they change."""
        found: list[float | None] = []

        async def is_value() -> bool:
            found.append(await self.metric(sample))
            return found[-1] == value

        await until(is_value, f"{sample} is {value:g}", context=lambda: f"it is {found[-1:]}\n{self.output}")

    @property
    def open_files(self) -> int:
        """The number of files that it holds open."""
        return len(list(Path(f"/proc/{self._program.pid}/fd").iterdir()))

    def megabytes(self) -> float:
        """Return its resident memory."""
        status = Path(f"/proc/{self._program.pid}/status").read_text(encoding="utf-8")
        (line,) = [each for each in status.splitlines() if each.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024

    async def _internal_errors(self) -> float:
        """Return how many internal errors it counts; 0 where it does not say, since it ended or is stopped."""
        ports = [line["admin_port"] for line in self.lines if "admin_port" in line]
        if not ports or not self._program.is_running:
            return 0
        limit = aiohttp.ClientTimeout(total=LAST_WORD)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.get(f"http://127.0.0.1:{ports[-1]}/metrics", timeout=limit) as response:
                return counted_on(await response.text())
        return 0

    def send(self, number: int) -> None:
        """Send it a signal."""
        self._program.send(number)

    async def ended(self, within: float = PATIENCE) -> int:
        """Wait for its end and return the exit code."""
        try:
            return await self._program.ended(within)
        except TimeoutError:
            raise AssertionError(f"it still runs after {within:g} s:\n{self.output}") from None

    async def terminate(self) -> int:
        """Send SIGTERM and return the exit code; fail when it takes longer than it may."""
        self._errors = await self._internal_errors()
        self.send(signal.SIGTERM)
        return await self.ended(STOP_WITHIN)
