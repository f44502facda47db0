"""Workers of a proxy as their parent sees them: told what changes, restarted, drained; real processes."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import trustme

from k8s_consul_registrar.errors import OperationalError
from k8s_consul_registrar.proxy import worker as frames
from k8s_consul_registrar.proxy.config import ProxyConfig, ProxyTiming
from k8s_consul_registrar.proxy.limits import Concurrency
from k8s_consul_registrar.proxy.nodes import POD, Endpoint, Nodes, NodeTable
from k8s_consul_registrar.proxy.refusals import Outcome
from k8s_consul_registrar.proxy.routes import Pods, ProxiedPod, Route
from k8s_consul_registrar.proxy.server import listen
from k8s_consul_registrar.proxy.stats import NO_STATS, RecentFailures, added
from k8s_consul_registrar.proxy.worker import Begin, WorkerCredentials
from k8s_consul_registrar.proxy.workers import Workers, WorkerTiming
from k8s_consul_registrar.rotating import BearerTokens
from k8s_consul_registrar.tls import KeyPair, ServerCertificate, Trust
from support.processes import is_running, reserve_ports
from support.proxy_lab import (
    METRICS,
    TOKEN,
    Answer,
    Kubelet,
    answer,
    authority_pem,
    cadvisor,
    get_request,
    parse_answer,
)
from support.waiting import PATIENCE, until

COMMAND = (sys.executable, "-m", "k8s_consul_registrar.proxy.worker")
QUICK = WorkerTiming(tick=0.05, retry_first=0.05, retry_cap=0.1, last_words=1.0)
HELD = WorkerCredentials(TOKEN, "", Trust(authority_pem()))


async def serve_who_shows(
    token: str, kubelet: Kubelet, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer as a kubelet does that accepts one token."""
    accepted = f"Authorization: Bearer {token}\r\n".encode() in request
    writer.write(answer() if accepted else b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


@dataclass
class Parent:
    """The workers under test and what their parent tells them; `held` may be exchanged."""

    nodes: Nodes
    pods: Pods
    held: WorkerCredentials = HELD
    port: int = 0

    def begin(self, port: int) -> Begin:
        """Return what never changes."""
        self.port = port
        config = ProxyConfig(
            paths=frozenset({"/metrics/cadvisor"}),
            has_pods=True,
            concurrency=Concurrency(per_node=8, overall=32),
            max_clients=50,
            kept_connections=50,
            timing=ProxyTiming(longest_scrape=30.0),
        )
        return Begin(port, config, "info", "json")

    def make(
        self, count: int = 2, command: tuple[str, ...] = COMMAND, timing: WorkerTiming = QUICK
    ) -> Workers:
        """Return workers, not started."""
        return Workers(
            count=count,
            command=command,
            begin=self.begin,
            credentials=lambda: self.held,
            nodes=self.nodes,
            pods=self.pods,
            timing=timing,
        )

    async def get(self, target: str, *headers: str, context: ssl.SSLContext | None = None) -> Answer:
        """Scrape once over a connection of its own."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=context, server_hostname="127.0.0.1" if context else None
        )
        try:
            writer.write(get_request(target, *headers, "Connection: close"))
            async with asyncio.timeout(PATIENCE):
                return parse_answer(await reader.read(-1))
        finally:
            writer.transport.abort()

    async def statuses(self, target: str, *headers: str) -> set[int]:
        """Scrape over enough connections for every worker to meet some, and return the answers."""
        return {(await self.get(target, *headers)).status for _ in range(12)}

    async def until(self, status: int, target: str) -> None:
        """Wait until every worker answers a scrape with this status."""

        async def is_so() -> bool:
            return await self.statuses(target) == {status}

        await until(is_so)


@contextlib.asynccontextmanager
async def working(parent: Parent, workers: Workers) -> AsyncIterator[Workers]:
    """Run workers until the block ends, and see that none is left after it."""
    try:
        await workers.start(listen(0, reuse_port=True))
        yield workers
    finally:
        pids = workers.pids
        await workers.stop()
    await until(lambda: not any(map(is_running, pids)))


def parent_of(*kubelets: Kubelet) -> Parent:
    """Return a parent that knows these kubelets."""
    nodes = Nodes()
    nodes.replace(NodeTable.of([kubelet.node() for kubelet in kubelets], allow_loopback=True))
    return Parent(nodes, Pods())


async def test_rotated_token_is_used_by_all_workers() -> None:
    """Scrapes fail with the old one once kubelets have the new, and go on as soon as the parent passes it on."""
    async with Kubelet(lambda *args: serve_who_shows("new", *args)).serving() as kubelet:
        parent = parent_of(kubelet)
        async with working(parent, parent.make()):
            assert await parent.statuses(cadvisor(kubelet)) == {502}
            parent.held = WorkerCredentials("new", "", HELD.kubelets)
            await parent.until(200, cadvisor(kubelet))
            parent.held = WorkerCredentials("", "the file is gone", HELD.kubelets)
            await parent.until(503, cadvisor(kubelet))


async def test_another_authority_of_kubelets() -> None:
    """Another CA counts for new connections, and those made under the old one are not used."""
    async with Kubelet().serving() as kubelet:
        parent = parent_of(kubelet)
        async with working(parent, parent.make()):
            assert await parent.statuses(cadvisor(kubelet)) == {200}
            other = trustme.CA().cert_pem.bytes().decode()
            parent.held = WorkerCredentials(TOKEN, "", Trust(other))
            await parent.until(502, cadvisor(kubelet))


async def test_nodes_and_pods_that_come_and_go() -> None:
    """Every worker hears of them, and one that is started later hears all that is so by then."""
    async with Kubelet().serving() as kubelet, plain_pod() as pod_port:
        parent = parent_of()
        async with working(parent, parent.make()) as workers:
            assert await parent.statuses(cadvisor(kubelet)) == {404}
            parent.nodes.replace(NodeTable.of([kubelet.node()], allow_loopback=True))
            workers.notice_nodes()
            endpoint = Endpoint("127.0.0.1", pod_port, "127.0.0.1", "uid-of-pod", POD)
            pod = ProxiedPod((Route(endpoint, "/metrics"),), has_host_network=True)
            parent.pods.put("shop", "web", pod)
            parent.pods.known = True
            target = "/api/v1/namespaces/shop/pods/web/metrics"
            for _ in range(2):
                await parent.until(200, cadvisor(kubelet))
                await parent.until(200, target)
                for pid in workers.pids:
                    os.kill(pid, signal.SIGKILL)
                deaths = workers.stats().worker_deaths + 2
                await until(lambda: workers.stats().worker_deaths >= deaths and workers.stats().workers == 2)  # noqa: B023 - awaited here
            parent.pods.put("shop", "web", None)
            await parent.until(404, target)
            parent.nodes.forget()
            workers.notice_nodes()
            await parent.until(503, cadvisor(kubelet))
            assert await parent.statuses(target) == {503}


def opened_by(pid: int) -> list[str]:
    """Return the files a process has open beside its output and what the system itself provides."""
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        # What is closed meanwhile is gone from there.
        with contextlib.suppress(FileNotFoundError):
            names.append(str(link.readlink()) if int(link.name) > 2 else "")
    return [name for name in names if name.startswith("/") and not name.startswith("/dev")]


@contextlib.asynccontextmanager
async def plain_pod() -> AsyncIterator[int]:
    """Serve metrics without TLS; yields the port."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                assert b"Authorization" not in await reader.readuntil(b"\r\n\r\n")
                writer.write(answer())
        writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_callers_over_tls_with_a_token() -> None:
    """Workers make TLS and check tokens by what their parent tells, open no file, and follow its change."""
    leaf = trustme.CA()
    pair = leaf.issue_cert("127.0.0.1")
    chain = b"".join(blob.bytes() for blob in pair.cert_chain_pems)
    tls = ServerCertificate(KeyPair(chain, pair.private_key_pem.bytes()))
    context = ssl.create_default_context(cadata=leaf.cert_pem.bytes().decode())
    async with Kubelet().serving() as kubelet:
        parent = parent_of(kubelet)
        parent.held = WorkerCredentials(TOKEN, "", HELD.kubelets, bearer=BearerTokens((b"first",)), tls=tls)
        async with working(parent, parent.make(count=1)) as workers:
            got = await parent.get(cadvisor(kubelet), "Authorization: Bearer first", context=context)
            assert (got.status, got.body) == (200, METRICS)
            (pid,) = workers.pids
            assert [name for name in opened_by(pid) if not name.startswith("/memfd")] == []
            parent.held = WorkerCredentials(
                TOKEN, "", HELD.kubelets, bearer=BearerTokens((b"second-and-longer",)), tls=tls
            )

            async def status(shown: str) -> int:
                bearer = f"Authorization: Bearer {shown}"
                return (await parent.get(cadvisor(kubelet), bearer, context=context)).status

            async def is_first_refused() -> bool:
                return await status("first") == 401

            await until(is_first_refused)
            assert await status("second-and-longer") == 200


async def test_failures_and_counts_of_all_workers() -> None:
    """Failed scrapes are listed and every count is kept, though the worker that counted is gone."""
    async with Kubelet(lambda *args: serve_who_shows("other", *args)).serving() as kubelet:
        parent = parent_of(kubelet)
        async with working(parent, parent.make()) as workers:
            assert await parent.statuses(cadvisor(kubelet)) == {502}
            await until(lambda: workers.stats().outcomes[Outcome.FORBIDDEN] == 12)
            assert len(workers.failures()) == 12
            for pid in workers.pids:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: workers.stats().worker_deaths == 2 and workers.stats().workers == 2)
            stats = workers.stats()
            assert stats.outcomes[Outcome.FORBIDDEN] == 12
            assert (stats.callers, stats.running, stats.nodes) == (0, 0, 1)
            assert sum(stats.durations.counts) == 12
            assert len(workers.failures()) == 12


async def test_worker_that_hangs_is_replaced() -> None:
    """One that is stopped and tells nothing any more is ended and started again."""
    parent = parent_of()
    async with working(parent, parent.make(count=2, timing=replace(QUICK, silence=8.0))) as workers:
        stopped = workers.pids[0]
        os.kill(stopped, signal.SIGSTOP)
        await until(lambda: stopped not in workers.pids and workers.stats().workers == 2)
        assert workers.stats().worker_deaths >= 1


async def test_workers_that_cannot_start() -> None:
    """Are tried again and again with growing pauses, and the start fails in time and in words."""
    parent = parent_of()
    timing = replace(QUICK, starts_within=4.0, retry_first=0.2, retry_cap=10)
    workers = parent.make(count=1, command=(sys.executable, "-c", "raise SystemExit(3)"), timing=timing)
    with pytest.raises(OperationalError, match="PROXY_WORKERS"):
        await workers.start(listen(0, reuse_port=True))
    assert 1 <= workers.stats().worker_deaths <= 6
    await workers.stop()


async def test_program_that_does_not_exist() -> None:
    """Is a failure to start like any other."""
    parent = parent_of()
    workers = parent.make(count=1, command=("/nowhere/python",), timing=replace(QUICK, starts_within=0.5))
    with pytest.raises(OperationalError):
        await workers.start(listen(0, reuse_port=True))
    await workers.stop()


def test_secrets_are_in_no_repr() -> None:
    """A message that is logged or shown in an error tells nothing of what it carries."""
    trust = Trust("ca", pair=KeyPair(b"certificate", b"secret-key"))
    held = WorkerCredentials("secret-token", "", trust, trust, BearerTokens((b"secret-bearer",)))
    assert "secret" not in repr(held) + repr(trust) + str([held])


def test_frames_bring_everything_across() -> None:
    """A table, a Pod and figures arrive equal, their types included."""
    kubelet = Kubelet(port=10250)
    table = NodeTable.of([kubelet.node()], allow_loopback=True)
    pod = ProxiedPod(
        (Route(Endpoint("10.0.0.1", 80, "10.0.0.1", "u", POD), "/m?a=b"),), has_host_network=False
    )
    for message in (
        frames.Table(table, known=True), frames.PodPut("shop", "web", pod), frames.PodPut("shop", "web", None),
        HELD, Parent(Nodes(), Pods()).begin(1), frames.Drain(2.5), frames.PodsKnown(known=False),
    ):  # fmt: skip
        body = frames.frame(message)[4:]
        assert msgspec.msgpack.decode(body, type=frames.ToWorker) == message
    failures = RecentFailures()
    failures.note(table.by_name["node-1"], Outcome.TIMEOUT, "too late")
    stats = added(NO_STATS, NO_STATS)
    told = frames.WorkerFigures(stats, failures.since(0))
    back = msgspec.msgpack.decode(frames.frame(told)[4:], type=frames.FromWorker)
    assert back == told
    assert isinstance(back, frames.WorkerFigures)
    assert back.failures[0].endpoint == table.by_name["node-1"]


def test_failures_since() -> None:
    """Each is reported once, and those forgotten meanwhile are not."""
    failures = RecentFailures()
    endpoint = Endpoint("10.0.0.1", 10250, "", "")
    for number in range(3):
        failures.note(endpoint, Outcome.TIMEOUT, str(number))
    assert [failure.reason for failure in failures.since(1)] == ["1", "2"]
    assert failures.since(failures.noted) == []


async def test_worker_whose_parent_reads_no_more_ends_without_a_traceback() -> None:
    """Ends quietly when a write to its parent fails, as after the parent was killed."""
    ours, theirs = socket.socketpair()
    process = await asyncio.create_subprocess_exec(
        *COMMAND, str(theirs.fileno()), pass_fds=[theirs.fileno()], stderr=asyncio.subprocess.PIPE
    )
    theirs.close()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    try:
        begin = Parent(Nodes(), Pods()).begin(reserve_ports(1)[0])
        for message in (begin, HELD, frames.Table(NodeTable(), known=False)):
            writer.write(frames.frame(message))
        assert isinstance(await frames.read_from_worker(reader), frames.Serving)
        ours.shutdown(socket.SHUT_RD)
        async with asyncio.timeout(PATIENCE):
            _, said = await process.communicate()
        assert (process.returncode, said) == (0, b"")
    finally:
        writer.transport.abort()
        if process.returncode is None:
            process.kill()
