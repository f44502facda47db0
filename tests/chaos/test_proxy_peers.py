"""The proxy among hostile peers for long: honest scrapes go on, memory and descriptors stay flat."""

import asyncio
import itertools
import os
import random
import ssl
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
import trustme

from k8s_consul_registrar.sandbox.kubelet import recorded_metrics
from support.daemon import Daemon
from support.hostile import Kind, Peer
from support.lab import IS_SOAK, LIMIT, SandboxLab, kubelet_path, running_lab, scaled
from support.processes import LOOPBACK, Program, reserve_ports
from support.proxy_lab import Files

TESTS = Path(__file__).resolve().parents[1]
SECONDS = float(os.environ.get("SOAK_SECONDS") or scaled(45, 1800))
SPELL = float(scaled(3, 10))  # seconds for which two kinds of peers are at work
TOKEN = "what-prometheus-shows"
CLIENTS = {Kind.ANONYMOUS: scaled(600, 4200), Kind.NEVER_READ: 40, Kind.SLOW_READ: 40}
MOST_GROWTH = 6.0  # MB of memory between the second quarter of the time and the last
SPARE_FILES = 40  # connections of the honest clients, and those kept to kubelets

pytestmark = [
    pytest.mark.long,
    pytest.mark.soak,
    pytest.mark.xdist_group("chaos-proxy"),
    pytest.mark.timeout(SECONDS * 2 + 300),
]


class Sample(NamedTuple):
    """Memory in MB and open files of the proxy, while no hostile peer is there."""

    megabytes: float
    files: int


class Honest:
    """Scrapes over a kept connection and over new ones, and what became of them."""

    def __init__(self, url: str, context: ssl.SSLContext) -> None:
        self.url = url
        self.context = context
        self.times: list[float] = []
        self.problems: list[str] = []

    async def run(self, *, is_kept: bool, pause: float) -> None:
        """Scrape until cancelled."""
        connector = aiohttp.TCPConnector(force_close=not is_kept)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession(connector=connector, timeout=LIMIT, headers=headers) as session:
            while True:
                began = time.monotonic()
                try:
                    async with session.get(self.url, ssl=self.context) as answer:
                        assert (answer.status, await answer.read()) == (200, recorded_metrics())
                    self.times.append(time.monotonic() - began)
                except (aiohttp.ClientError, TimeoutError, AssertionError) as problem:
                    kind = "kept" if is_kept else "new"
                    self.problems.append(f"{kind}, after {time.monotonic() - began:.1f} s: {problem!r}"[:300])
                await asyncio.sleep(pause)


async def peers_of(lab: SandboxLab, proxy_port: int) -> list[Peer]:
    """Return a peer of each kind, with a Node and a certificate for its upstream."""
    ports = reserve_ports(len(Kind))
    peers = []
    for number, (kind, port) in enumerate(zip(Kind, ports, strict=True), 1):
        host = f"127.0.2.{number}"
        certificate = lab.folder / f"peer-{number}.pem"
        leaf = lab.cluster.endpoint.authority._ca.issue_cert(host, key_type=trustme.KeyType.ECDSA)
        leaf.private_key_and_cert_chain_pem.write_to_path(certificate)
        await lab.cluster.add_node(f"hostile-{number}", ("InternalIP", host), kubelet_port=port)
        target = kubelet_path(port, host)
        clients = CLIENTS.get(kind, 8)
        peers.append(
            Peer(
                kind,
                proxy_port,
                target,
                host,
                port,
                str(certificate),
                token=TOKEN,
                is_secure=True,
                clients=clients,
            )
        )
    return peers


async def endure(lab: SandboxLab, daemon: Daemon, ca: trustme.CA) -> tuple[Honest, list[Sample]]:
    """Run spells of hostile peers, two kinds at a time, until the time is over."""
    port = await daemon.port("port")
    peers = await peers_of(lab, port)
    context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
    kubelet = await lab.cluster.add_kubelet("node-a")
    honest = Honest(f"https://{LOOPBACK}:{port}{kubelet_path(kubelet.port)}", context)
    await daemon.measures("proxy_nodes", len(peers) + 1)
    samples: list[Sample] = []
    tasks = [
        asyncio.create_task(honest.run(is_kept=True, pause=0.2)),
        asyncio.create_task(honest.run(is_kept=False, pause=1.0)),
    ]
    until = time.monotonic() + SECONDS
    waiting: list[Peer] = []
    while time.monotonic() < until:
        if len(waiting) < 2:
            waiting = random.sample(peers, len(peers))
        async with AsyncExitStack() as stack:
            for peer in (waiting.pop(), waiting.pop()):
                program = Program(
                    peer.arguments,
                    lab.folder / "peers.log",
                    environment={**os.environ, "PYTHONPATH": str(TESTS)},
                )
                program.launch()
                stack.push_async_callback(program.stop)
            await asyncio.sleep(SPELL)
        await daemon.until(lambda: daemon.open_files < 100, "the peers' connections closed")
        samples.append(Sample(daemon.megabytes(), daemon.open_files))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return honest, samples


async def test_honest_scrapes_among_hostile_peers_go_on_and_nothing_grows(tmp_path: Path) -> None:
    """Each honest scrape is answered whole; memory and open files are at the end as they were early."""
    ca = trustme.CA()
    files = Files(tmp_path, ca)
    token = tmp_path / "token"
    token.write_text(TOKEN)
    async with running_lab() as lab:
        daemon = await lab.proxy(
            PROXY_BEARER_TOKEN_FILE=str(token),
            TLS_CERT_FILE=str(files.certificate),
            TLS_KEY_FILE=str(files.key),
        )
        async with daemon:
            await daemon.ready()
            honest, samples = await endure(lab, daemon, ca)
            bounds = [len(samples) * part // 4 for part in range(5)]
            quarters = [
                statistics.median(sample.megabytes for sample in samples[begin:end] or samples)
                for begin, end in itertools.pairwise(bounds)
            ]
            times = sorted(honest.times)
            print(  # noqa: T201 - figures of `make soak`
                f"{SECONDS:g} s, {len(samples)} spells: {len(times)} honest scrapes, {len(honest.problems)} failed, "
                f"p50 {times[len(times) // 2] * 1000:.1f} ms, p99 {times[int(len(times) * 0.99)] * 1000:.1f} ms, "
                f"longest {times[-1] * 1000:.0f} ms; memory by quarter {', '.join(f'{one:.1f}' for one in quarters)} MB, "
                f"most {max(sample.megabytes for sample in samples):.1f} MB; "
                f"files {samples[0].files} first, {samples[-1].files} last"
            )
            assert honest.problems == []
            assert len(times) > SECONDS
            assert samples[-1].files <= samples[0].files + SPARE_FILES
            if IS_SOAK:
                assert quarters[-1] - quarters[1] < MOST_GROWTH
