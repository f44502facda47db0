"""One worker of the proxy, and the messages between it and its parent; it knows only what these tell it.

Started by `proxy/workers` as `python -m k8s_consul_registrar.proxy.worker <number of its socket>`; ends with
its parent. A frame on the socket is its length in four bytes and a message in msgpack. Credentials travel only
this way: never as an argument, in the environment or in a file on a disk.
"""

import asyncio
import signal
import socket
import ssl
import sys
from typing import cast

import msgspec

from k8s_consul_registrar.asyncio_tools import new_loop
from k8s_consul_registrar.errors import AccessError, OperationalError
from k8s_consul_registrar.proxy.config import ProxyConfig
from k8s_consul_registrar.proxy.nodes import Endpoint, Nodes, NodeTable
from k8s_consul_registrar.proxy.routes import Pods, ProxiedPod
from k8s_consul_registrar.proxy.server import ProxyServer, listen
from k8s_consul_registrar.proxy.stats import Failure, LastScrape, ProxyStats
from k8s_consul_registrar.rotating import BearerTokens, Derived, Rotating
from k8s_consul_registrar.telemetry import configure_logging, get_logger
from k8s_consul_registrar.tls import ServerCertificate, Trust

FIGURES_EVERY = 1.0  # seconds
# Five thousand Nodes are about a megabyte; a greater length is no frame.
MAX_LENGTH = 1 << 28

log = get_logger("worker")


# Messages


class Begin(msgspec.Struct, frozen=True, tag=True):
    """To a worker, the first message: everything that never changes."""

    port: int
    config: ProxyConfig
    log_level: str
    log_format: str


class WorkerCredentials(msgspec.Struct, frozen=True, tag=True):
    """To a worker: everything secret, as it is now; nothing in it is unusable.

    `problem` says why there is no token. Clients are checked by `bearer` and `tls`, unless None.
    """

    token: str
    problem: str
    kubelets: Trust
    pods: Trust | None = None
    bearer: BearerTokens | None = None
    tls: ServerCertificate | None = None

    def __repr__(self) -> str:
        return "Credentials(…)"


class Table(msgspec.Struct, frozen=True, tag=True):
    """To a worker: the current kubelets."""

    table: NodeTable
    known: bool


class PodPut(msgspec.Struct, frozen=True, tag=True):
    """To a worker: one Pod as it is now, None if it may not be scraped or is gone."""

    namespace: str
    name: str
    pod: ProxiedPod | None


class PodsKnown(msgspec.Struct, frozen=True, tag=True):
    """To a worker: True if the Pods sent so far may be served."""

    known: bool


class Ending(msgspec.Struct, frozen=True, tag=True):
    """To a worker: close each connection after its next answer."""


class Drain(msgspec.Struct, frozen=True, tag=True):
    """To a worker: accept no more, and end once the scrapes under way are done or `grace` seconds have passed."""

    grace: float


class Serving(msgspec.Struct, frozen=True, tag=True):
    """From a worker, once: it accepts clients."""


class WorkerFigures(msgspec.Struct, frozen=True, tag=True):
    """From a worker, every second and at its end: its counts since it began, and what is new since the last message."""

    stats: ProxyStats
    failures: list[Failure]
    last_scrapes: list[tuple[Endpoint, LastScrape]] = []


ToWorker = Begin | WorkerCredentials | Table | PodPut | PodsKnown | Ending | Drain
FromWorker = Serving | WorkerFigures

_encode = msgspec.msgpack.Encoder().encode
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def frame(message: ToWorker | FromWorker) -> bytes:
    """Return a message as it is sent."""
    body = _encode(message)
    return len(body).to_bytes(4, "big") + body


async def read_to_worker(reader: asyncio.StreamReader) -> ToWorker | None:
    """Return the next message to a worker, None if the proxy is gone."""
    body = await _body(reader)
    return None if body is None else _to_worker.decode(body)


async def read_from_worker(reader: asyncio.StreamReader) -> FromWorker | None:
    """Return the next message of a worker, None if it is gone."""
    body = await _body(reader)
    return None if body is None else _from_worker.decode(body)


async def _body(reader: asyncio.StreamReader) -> bytes | None:
    try:
        length = int.from_bytes(await reader.readexactly(4), "big")
        if length > MAX_LENGTH:
            return None
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None


# The worker


class HeldCredentials:
    """The credentials that the parent told last, in the forms the relay asks for."""

    def __init__(self, told: WorkerCredentials) -> None:
        self._told = told
        self.bearer = (
            None if told.bearer is None else Rotating("", (), lambda: cast("BearerTokens", self._told.bearer))
        )
        self.tls = (
            None
            if told.tls is None
            else Derived(lambda tls: tls, Rotating("", (), lambda: cast("ServerCertificate", self._told.tls)))
        )

    def take(self, told: WorkerCredentials) -> None:
        """Use others from now on; what did not change stays the very same, with its context."""
        before = self._told
        self._told = msgspec.structs.replace(
            told,
            kubelets=before.kubelets if told.kubelets == before.kubelets else told.kubelets,
            pods=before.pods if told.pods == before.pods else told.pods,
        )
        for loaded in (self.bearer, self.tls):
            if loaded is not None:
                loaded.expire()

    def token(self) -> str:
        """Return the token for kubelets; raises AccessError without one."""
        if self._told.problem:
            raise AccessError(self._told.problem)
        return self._told.token

    def context(self) -> ssl.SSLContext:
        """Return the context for kubelets."""
        return self._told.kubelets.context

    def pod_context(self) -> ssl.SSLContext:
        """Return the context for Pods."""
        assert self._told.pods is not None, "no Pods are relayed"
        return self._told.pods.context


class Worker:
    """A `ProxyServer`, and the state its parent keeps up to date."""

    def __init__(self, begin: Begin, credentials: WorkerCredentials) -> None:
        has_pods = begin.config.has_pods
        self._port = begin.port
        self._held = HeldCredentials(credentials)
        self._nodes, self._pods = Nodes(), Pods()
        self._noted = 0
        self._server = ProxyServer(
            begin.config,
            self._nodes,
            self._held,
            pods=self._pods if has_pods else None,
            pod_context=self._held.pod_context if has_pods else None,
            inbound=self._held.bearer,
            tls=self._held.tls,
        )

    async def work(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve until told to end or left by the parent."""
        grace = 0.0
        reporting: asyncio.Task[None] | None = None
        try:
            while (told := await read_to_worker(reader)) is not None:
                match told:
                    case Table():
                        self._take(told)
                        if reporting is None:
                            await self._server.start(listen(self._port, reuse_port=True))
                            _tell(writer, Serving())
                            reporting = asyncio.create_task(self._report(writer))
                    case WorkerCredentials():
                        self._held.take(told)
                    case PodPut():
                        self._pods.put(told.namespace, told.name, told.pod)
                    case PodsKnown():
                        self._know_pods(is_known=told.known)
                    case Ending():
                        self._server.announce_end()
                    case Drain():
                        grace = told.grace
                        break
        finally:
            if reporting is not None:
                await self._server.drain(grace)
                reporting.cancel()
                _tell(writer, self._figures())
                writer.close()

    def _take(self, told: Table) -> None:
        if told.known:
            self._nodes.replace(told.table)
        else:
            self._nodes.forget()
        self._server.notice_nodes()

    def _know_pods(self, *, is_known: bool) -> None:
        if is_known:
            self._pods.known = True
        else:
            self._pods.forget()

    async def _report(self, writer: asyncio.StreamWriter) -> None:
        while True:
            _tell(writer, self._figures())
            await asyncio.sleep(FIGURES_EVERY)

    def _figures(self) -> WorkerFigures:
        failures, self._noted = self._server.failures_since(self._noted)
        return WorkerFigures(self._server.stats(), failures, [*self._server.take_last_scrapes().items()])


def _tell(writer: asyncio.StreamWriter, message: FromWorker) -> None:
    """Send a message to the parent, unless that is gone: uvloop raises RuntimeError for a closed connection."""
    if not writer.is_closing():
        writer.write(frame(message))


async def _main(parent: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=parent)
    begin, credentials = await read_to_worker(reader), await read_to_worker(reader)
    if not isinstance(begin, Begin) or not isinstance(credentials, WorkerCredentials):
        return
    configure_logging(begin.log_level, begin.log_format)
    await Worker(begin, credentials).work(reader, writer)


def main() -> None:
    """Serve until the parent ends; signals that go to all processes of a terminal are the parent's."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        parent.set_inheritable(False)
        try:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(_main(parent))
        except (OperationalError, OSError) as error:
            log.error("a worker cannot go on", problem=str(error))
            sys.exit(1)


if __name__ == "__main__":
    main()
