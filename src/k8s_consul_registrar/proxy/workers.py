"""Several processes on one port, for a load beyond one core: a `ProxyServer` made of workers.

Only the parent knows the cluster and the credentials and answers on the admin port. Each worker listens on the
port itself (SO_REUSEPORT, socket(7)) and the system spreads connections over them, so a worker that dies loses
only the scrapes it had under way. Its successor gets everything again.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from k8s_consul_registrar.backoff import delays
from k8s_consul_registrar.errors import OperationalError
from k8s_consul_registrar.proxy.nodes import Endpoint, Nodes
from k8s_consul_registrar.proxy.routes import Pods, ProxiedPod
from k8s_consul_registrar.proxy.stats import (
    NO_STATS,
    Failure,
    LastScrape,
    LastScrapes,
    ProxyStats,
    RecentFailures,
    added,
)
from k8s_consul_registrar.proxy.worker import (
    Begin,
    Drain,
    Ending,
    PodPut,
    PodsKnown,
    Serving,
    Table,
    ToWorker,
    WorkerCredentials,
    WorkerFigures,
    frame,
    read_from_worker,
)
from k8s_consul_registrar.telemetry import get_logger

_log = get_logger(__name__)


# Unsent bytes to a worker; one that reads nothing any more is ended.
MAX_UNSENT = 64 << 20


@dataclass(frozen=True, slots=True)
class WorkerTiming:
    """Every delay in keeping workers, in seconds; tests use shorter ones.

    Credentials are compared every `tick`; other changes are sent when they happen. A worker that lived for
    `settled` has not failed to start. It may take `last_words` beyond the grace of a drain. A worker that sends
    nothing for `silence` hangs: it sends its figures every second.
    """

    starts_within: float = 30.0
    tick: float = 1.0
    settled: float = 60.0
    last_words: float = 2.0
    silence: float = 30.0
    retry_first: float = 0.5
    retry_cap: float = 5.0


class WorkerProcess:
    """A running worker as its parent sees it. However `follow` ends, the process is gone after it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        on_figures: Callable[[WorkerFigures], None],
    ) -> None:
        self._process = process
        self._reader, self._writer = streams
        self._on_figures = on_figures
        self.stats: ProxyStats | None = None
        self.serving = asyncio.Event()

    @classmethod
    async def start(
        cls, command: Sequence[str], on_figures: Callable[[WorkerFigures], None]
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
        try:
            return cls(process, await asyncio.open_unix_connection(sock=ours), on_figures)
        except BaseException:
            process.kill()
            await process.wait()
            raise

    @property
    def pid(self) -> int:
        """The ID of its process."""
        return self._process.pid

    def send(self, messages: Iterable[ToWorker]) -> None:
        """Send messages."""
        self.send_frames(b"".join(map(frame, messages)))

    def send_frames(self, frames: bytes) -> None:
        """Send encoded messages; a worker that reads none any more is ended."""
        if self._writer.is_closing():
            return
        self._writer.write(frames)
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT:
            self.kill()

    async def follow(self, silence: float) -> int:
        """Read its messages until it is gone or silent for `silence` seconds, and return its exit code."""
        try:
            while True:
                async with asyncio.timeout(silence):
                    message = await read_from_worker(self._reader)
                match message:
                    case None:
                        break
                    case Serving():
                        self.serving.set()
                    case WorkerFigures():
                        self.stats = message.stats
                        self._on_figures(message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._process.wait()
        except TimeoutError:
            pass
        finally:
            self.serving.clear()
            self._writer.close()
            self.kill()
            code = await self._process.wait()
        return code

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


class Workers:
    """A relay like `ProxyServer`, in `count` processes of `command`.

    `begin` makes the first message for a port; `credentials` returns the current ones. `nodes` and `pods` may
    be replaced at any time (call `notice_nodes` after the former).
    """

    def __init__(
        self,
        *,
        count: int,
        command: Sequence[str],
        begin: Callable[[int], Begin],
        credentials: Callable[[], WorkerCredentials],
        nodes: Nodes,
        pods: Pods | None,
        timing: WorkerTiming | None = None,
    ) -> None:
        self._count = count
        self._command = tuple(command)
        self._begin = begin
        self._credentials = credentials
        self._nodes = nodes
        self._pods = pods
        self._timing = timing or WorkerTiming()
        self._sockets: Sequence[socket.socket] = ()
        self._port = 0
        self._running: dict[int, WorkerProcess] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._following: asyncio.Task[None] | None = None
        self._sent: WorkerCredentials | None = None
        self._sent_pods_known = False
        self._failures = RecentFailures()
        self._last_scrapes = LastScrapes()
        # Counts of workers that are gone: a counter never goes back.
        self._past = NO_STATS
        self._deaths = 0
        self._ending = asyncio.Event()
        if pods is not None:
            pods.on_put = self._put_pod

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Start the workers on the port of these sockets, which stay bound and idle to keep it ours.

        The sockets were bound without SO_REUSEPORT, which fails where another proxy has the port, and get it now.
        Raises OperationalError if not all of them serve in time.
        """
        self._sockets = sockets
        for bound in sockets:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._port = sockets[0].getsockname()[1]
        self._sent = self._credentials()
        serving = [asyncio.Event() for _ in range(self._count)]
        self._keepers = [asyncio.create_task(self._keep(*each)) for each in enumerate(serving)]
        self._following = asyncio.create_task(self._follow_credentials())
        try:
            async with asyncio.timeout(self._timing.starts_within):
                for first in serving:
                    await first.wait()
        except TimeoutError:
            raise OperationalError(
                f"PROXY_WORKERS: not all workers serve within {self._timing.starts_within:g} s"
            ) from None

    async def run(self) -> None:
        """Keep the workers running until they are stopped; raises the error of a task that failed."""
        await asyncio.gather(*self._tasks())

    def _tasks(self) -> list[asyncio.Task[None]]:
        return self._keepers + ([] if self._following is None else [self._following])

    @property
    def is_serving(self) -> bool:
        """True if any worker accepts clients."""
        return any(worker.serving.is_set() for worker in self._running.values())

    @property
    def pids(self) -> list[int]:
        """The IDs of the workers' processes."""
        return [worker.pid for worker in self._running.values()]

    # Sending

    def notice_nodes(self) -> None:
        """Send the workers the current table of Nodes."""
        self._send_all(Table(self._nodes.current, self._nodes.known))

    def _put_pod(self, namespace: str, name: str, pod: ProxiedPod | None) -> None:
        self._send_all(PodPut(namespace, name, pod))

    async def _follow_credentials(self) -> None:
        while True:
            await asyncio.sleep(self._timing.tick)
            credentials = self._credentials()
            if credentials != self._sent:
                self._sent = credentials
                self._send_all(credentials)
            known = self._pods is not None and self._pods.known
            if known != self._sent_pods_known:
                self._sent_pods_known = known
                self._send_all(PodsKnown(known))

    def _send_all(self, message: ToWorker) -> None:
        if self._running:
            frames = frame(message)
            for worker in self._running.values():
                worker.send_frames(frames)

    def _everything(self) -> Iterator[ToWorker]:
        yield self._begin(self._port)
        assert self._sent is not None
        yield self._sent
        yield Table(self._nodes.current, self._nodes.known)
        if self._pods is not None:
            for (namespace, name), pod in self._pods.items():
                yield PodPut(namespace, name, pod)
            yield PodsKnown(self._sent_pods_known)

    # Keeping them

    async def _keep(self, number: int, first: asyncio.Event) -> None:
        """Keep one of the workers running until the end."""
        loop = asyncio.get_running_loop()
        retry = delays(self._timing.retry_first, self._timing.retry_cap)
        while True:
            began = loop.time()
            problem = await self._run_one(number, first)
            if self._ending.is_set():
                return
            if loop.time() - began > self._timing.settled:
                retry = delays(self._timing.retry_first, self._timing.retry_cap)
            self._deaths += 1
            pause = next(retry)
            _log.error("a worker ended", worker=number, problem=problem, restart_in=round(pause, 1))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._ending.wait()
                return

    async def _run_one(self, number: int, first: asyncio.Event) -> str:
        try:
            worker = await WorkerProcess.start(self._command, self._note)
        except OSError as error:
            return f"cannot be started: {error.strerror or error}"
        self._running[number] = worker
        if self._ending.is_set():
            worker.kill()  # it began too late for the message
        waiting = asyncio.create_task(self._announce(number, worker, first))
        try:
            worker.send(self._everything())
            code = await worker.follow(self._timing.silence)
        finally:
            waiting.cancel()
            worker.kill()
            del self._running[number]
            if worker.stats is not None:
                self._past = added(self._past, worker.stats, with_gauges=False)
        return f"exit code {code}" if code >= 0 else f"signal {-code}"

    async def _announce(self, number: int, worker: WorkerProcess, first: asyncio.Event) -> None:
        await worker.serving.wait()
        first.set()
        _log.info("a worker serves", worker=number, pid=worker.pid)

    def _note(self, figures: WorkerFigures) -> None:
        for failure in figures.failures:
            self._failures.take(failure)
        self._last_scrapes.add(figures.last_scrapes)

    # Ending

    def announce_end(self) -> None:
        """Have every worker close each connection after its next answer."""
        self._send_all(Ending())

    async def drain(self, grace: float) -> None:
        """Have every worker accept no more and finish what is under way within `grace` seconds."""
        self._ending.set()
        self._send_all(Drain(grace))
        await self._gone_within(grace + self._timing.last_words)

    async def stop(self) -> None:
        """End everything at once; answers under way are reset."""
        self._ending.set()
        self._send_all(Drain(0))
        await self._gone_within(self._timing.last_words)
        for task in self._tasks():
            task.cancel()
        await asyncio.gather(*self._tasks(), return_exceptions=True)
        for bound in self._sockets:
            bound.close()

    async def _gone_within(self, seconds: float) -> None:
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=seconds)

    # Figures

    def stats(self) -> ProxyStats:
        """Return the figures of all, at most a second old."""
        total = self._past
        for worker in self._running.values():
            if worker.stats is not None:
                total = added(total, worker.stats)
        pods = self._pods
        return replace(
            total,
            nodes=len(self._nodes.current.by_name),
            nodes_known=self._nodes.known,
            pods=0 if pods is None else len(pods),
            pods_known=pods is not None and pods.known,
            workers=sum(worker.serving.is_set() for worker in self._running.values()),
            worker_deaths=self._deaths,
        )

    def failures(self) -> list[Failure]:
        """Return the scrapes that failed lately, the latest last."""
        return sorted(self._failures.lately(), key=lambda failure: failure.at)

    def last_scrapes(self) -> Mapping[Endpoint, LastScrape]:
        """Return the latest scrape of each upstream."""
        return self._last_scrapes.collect()
