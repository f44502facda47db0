"""One worker of the proxy: relays what its parent tells it about, and knows nothing of its own.

Started by `proxy/workers` as `python -m k8s_consul_registrar.proxy.worker <number of its socket>`; ends with
its parent.
"""

import asyncio
import signal
import socket
import ssl
import sys
from typing import cast

from msgspec.structs import replace

from k8s_consul_registrar.asyncio_tools import new_loop
from k8s_consul_registrar.errors import AccessError, OperationalError
from k8s_consul_registrar.proxy.nodes import Nodes
from k8s_consul_registrar.proxy.routes import Pods
from k8s_consul_registrar.proxy.server import ProxyServer, listen
from k8s_consul_registrar.proxy.worker_protocol import (
    Begin,
    Drain,
    Ending,
    FromWorker,
    PodPut,
    PodsKnown,
    Serving,
    Table,
    WorkerCredentials,
    WorkerFigures,
    frame,
    read_to_worker,
)
from k8s_consul_registrar.rotating import BearerTokens, Derived, Rotating
from k8s_consul_registrar.telemetry import configure_logging, get_logger
from k8s_consul_registrar.tls import ServerCertificate

FIGURES_EVERY = 1.0  # seconds

log = get_logger("worker")


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
        self._told = replace(
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
