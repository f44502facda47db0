"""One worker of the proxy: relays what its parent tells it about, and knows nothing of its own.

Started by `proxy/workers` as `python -m k8s_consul_registrar.proxy.worker <number of its socket>`; ends with
its parent.
"""

import asyncio
import os
import signal
import socket
import ssl
import sys
from pathlib import Path

import uvloop

from k8s_consul_registrar.bearer import BearerFile
from k8s_consul_registrar.errors import AccessError, OperationalError
from k8s_consul_registrar.proxy.frames import (
    BEARER,
    CERTIFICATE,
    CLIENT_CA,
    KEY,
    Begin,
    Credentials,
    Drain,
    Figures,
    PodPut,
    PodsKnown,
    Serving,
    Table,
    Trust,
    frame,
    read_to_worker,
)
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.nodes import Nodes
from k8s_consul_registrar.proxy.peers import PodAccess
from k8s_consul_registrar.proxy.pod_route import Pods
from k8s_consul_registrar.proxy.relay import RelayTiming
from k8s_consul_registrar.proxy.server import ProxyServer
from k8s_consul_registrar.proxy.sockets import listen
from k8s_consul_registrar.proxy.tls import kubelet_context, pod_context
from k8s_consul_registrar.telemetry import configure_logging, get_logger
from k8s_consul_registrar.tls import KeyPair, ServerTls, TlsFiles, show

FIGURES_EVERY = 1.0  # seconds

log = get_logger("worker")


class MemoryFiles:
    """Files that are nowhere but in memory, for what is made to read files: OpenSSL, and what follows changes."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def put(self, name: str, content: bytes) -> None:
        """Make a file, or give one another content."""
        if name not in self._open:
            self._open[name] = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self._open[name], 0)
        os.pwrite(self._open[name], content, 0)

    def path(self, name: str) -> Path:
        """Return where this process finds it."""
        return Path(f"/proc/self/fd/{self._open[name]}")

    def __contains__(self, name: str) -> bool:
        return name in self._open


class Held:
    """The credentials of this moment, in the forms the relay asks for."""

    def __init__(self, told: Credentials) -> None:
        self._files = MemoryFiles()
        self._told = told
        self._kubelets = _context(told.kubelets)
        self._pods = None if told.pods is None else _pod_context(told.pods)
        for name, content in told.files.items():
            self._files.put(name, content)

    def take(self, told: Credentials) -> None:
        """Use others from now on; what did not change stays the very same."""
        before, self._told = self._told, told
        if told.kubelets != before.kubelets:
            self._kubelets = _context(told.kubelets)
        if told.pods is not None and told.pods != before.pods:
            self._pods = _pod_context(told.pods)
        for name, content in told.files.items():
            if content != before.files.get(name):
                self._files.put(name, content)

    def token(self) -> str:
        """Return the token for kubelets; raises AccessError where there is none to be had."""
        if self._told.problem:
            raise AccessError(self._told.problem)
        return self._told.token

    def context(self) -> ssl.SSLContext:
        """Return the context for kubelets."""
        return self._kubelets

    def pod_context(self) -> ssl.SSLContext:
        """Return the context for Pods."""
        assert self._pods is not None, "no Pods are relayed"
        return self._pods

    def bearer(self) -> BearerFile | None:
        """Return what callers must show, None for nothing."""
        files = self._files
        return BearerFile(files.path(BEARER), "PROXY_BEARER_TOKEN_FILE") if BEARER in files else None

    def tls(self) -> ServerTls | None:
        """Return the TLS that callers must speak, None for none."""
        files = self._files
        if CERTIFICATE not in files:
            return None
        client_ca = files.path(CLIENT_CA) if CLIENT_CA in files else None
        return ServerTls(TlsFiles(files.path(CERTIFICATE), files.path(KEY), client_ca, "TLS"))


def _context(trust: Trust) -> ssl.SSLContext:
    context = kubelet_context(ca_pem=trust.ca_pem, skip_verification=trust.skip_verification)
    if trust.certificate:
        show(context, KeyPair(trust.certificate, trust.key, "the proxy's own certificate"))
    return context


def _pod_context(trust: Trust) -> ssl.SSLContext:
    return pod_context(ca_pem=trust.ca_pem, skip_verification=trust.skip_verification)


class Worker:
    """A `ProxyServer`, and the state its parent keeps up to date."""

    def __init__(self, begin: Begin, credentials: Credentials) -> None:
        limits = begin.limits
        concurrency = Concurrency(per_node=limits.per_node, overall=limits.overall)
        self._port = begin.port
        self._held = Held(credentials)
        self._nodes, self._pods = Nodes(), Pods()
        self._noted = 0
        access = PodAccess(self._pods, self._held.pod_context, concurrency, limits.kept_connections)
        self._server = ProxyServer(
            nodes=self._nodes,
            paths=begin.paths,
            token=self._held.token,
            context=self._held.context,
            concurrency=concurrency,
            inbound=self._held.bearer(),
            tls=self._held.tls(),
            pods=access if begin.has_pods else None,
            max_callers=limits.max_callers,
            kept_connections=limits.kept_connections,
            timing=RelayTiming(longest_scrape=begin.longest_scrape),
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
                            writer.write(frame(Serving()))
                            reporting = asyncio.create_task(self._report(writer))
                    case Credentials():
                        self._held.take(told)
                    case PodPut():
                        self._pods.put(told.namespace, told.name, told.pod)
                    case PodsKnown():
                        self._know_pods(is_known=told.known)
                    case Drain():
                        grace = told.grace
                        break
        finally:
            if reporting is not None:
                await self._server.drain(grace)
                reporting.cancel()
                writer.write(frame(self._figures()))
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
            writer.write(frame(self._figures()))
            await asyncio.sleep(FIGURES_EVERY)

    def _figures(self) -> Figures:
        failures, self._noted = self._server.failures_since(self._noted)
        return Figures(self._server.stats(), failures)


async def _main(parent: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=parent)
    begin, credentials = await read_to_worker(reader), await read_to_worker(reader)
    if not isinstance(begin, Begin) or not isinstance(credentials, Credentials):
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
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_main(parent))
        except (OperationalError, OSError) as error:
            log.error("a worker cannot go on", problem=str(error))
            sys.exit(1)


if __name__ == "__main__":
    main()
