"""One worker as its parent sees it: a process, the socket to it, and what it told last."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Sequence

from k8s_consul_registrar.proxy.failing import Failure
from k8s_consul_registrar.proxy.frames import Figures, Serving, ToWorker, frame, read_from_worker
from k8s_consul_registrar.proxy.outcomes import ProxyStats

# What may wait to be sent to a worker; one that takes nothing any more is of no use.
MOST_UNSENT = 64 << 20


class WorkerProcess:
    """A worker under way. However `follow` ends, the process is gone after it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        heard_failures: Callable[[list[Failure]], None],
    ) -> None:
        self._process = process
        self._reader, self._writer = streams
        self._heard_failures = heard_failures
        self.stats: ProxyStats | None = None
        self.serving = asyncio.Event()

    @classmethod
    async def start(
        cls, command: Sequence[str], heard_failures: Callable[[list[Failure]], None]
    ) -> "WorkerProcess":
        """Start `command` with the number of its socket as the last argument."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            except BaseException:
                ours.close()
                raise
        return cls(process, await asyncio.open_unix_connection(sock=ours), heard_failures)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def tell(self, messages: Iterable[ToWorker]) -> None:
        """Send messages; a worker that takes none any more is ended."""
        self.pass_on(b"".join(map(frame, messages)))

    def pass_on(self, frames: bytes) -> None:
        """Send what is encoded already, the same for all workers."""
        if self._writer.is_closing():
            return
        self._writer.write(frames)
        if self._writer.transport.get_write_buffer_size() > MOST_UNSENT:
            self.kill()

    async def follow(self, silence: float) -> int:
        """Take in what it tells until it is gone or silent for so many seconds, and return its exit code."""
        try:
            while True:
                async with asyncio.timeout(silence):
                    told = await read_from_worker(self._reader)
                match told:
                    case None:
                        break
                    case Serving():
                        self.serving.set()
                    case Figures():
                        self.stats = told.stats
                        self._heard_failures(told.failures)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._process.wait()
        except TimeoutError:
            pass
        finally:
            self.serving.clear()
            self._writer.close()
            self.kill()
        return await self._process.wait()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
