"""Honest scrapes beside one hostile peer at a time: ours, nginx and a Go reverse proxy.

All speak TLS to clients and ask them for a token. The time that honest scrapes take is measured right before
the peer begins and while it is at work, and what counts is how much longer they take.
"""

import asyncio
import os
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from k8s_consul_registrar.sandbox import objects
from k8s_consul_registrar.sandbox.sandbox import Sandbox
from relaying.contenders import Contender, Guard, build_go, go, nginx, ours, path_of
from relaying.honest import Figures, Job
from relaying.kubelets import Kubelets, node_name
from relaying.machine import Cores, free_port
from support.hostile import Kind, Peer

RATE = 100.0  # honest scrapes a second
SETTLES = 2.0  # seconds until the daemon has listed its Nodes
IN_PLACE_WITHIN = 120.0  # seconds, for thousands of connections
CLIENTS = {
    Kind.ANONYMOUS: 4200,
    Kind.NEVER_READ: 40,
    Kind.SLOW_READ: 40,
}
TESTS = Path(__file__).resolve().parents[2] / "tests"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a hostile kubelet is."""

    kind: Kind
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one contender beside one peer; `extra` are scrapes on new connections of what the peer occupies."""

    quiet: Figures
    beside: Figures
    extra: tuple[int, int]


def places() -> list[Place]:
    """Return a place of its own for each kind of peer."""
    return [Place(kind, f"127.0.2.{number}", free_port()) for number, kind in enumerate(Kind, 1)]


class Beside:
    """The comparison: the kubelets, and what is started for each run."""

    def __init__(self, cores: Cores, folder: Path, kubelets: Kubelets, sandbox: Sandbox) -> None:
        self.cores = cores
        self.folder = folder
        self.kubelets = kubelets
        self.sandbox = sandbox
        self.guard = Guard.make(folder)
        self.places = places()

    async def run(self, kinds: Sequence[Kind], rounds: int, seconds: float) -> None:
        """Measure and print the table."""
        for place in self.places:
            at = (("InternalIP", place.address),)
            node = objects.node(node_name(place.address), addresses=at, kubelet_port=place.port)
            self.sandbox.kube.create(node)
        addresses = [(place.address, place.port) for place in self.places]
        built = build_go(self.folder)
        makers: list[Callable[[], Contender]] = [
            lambda: ours(self.kubelets, self.sandbox, self.folder, self.cores, guard=self.guard),
            lambda: nginx(self.kubelets, self.folder, self.cores, guard=self.guard, more=addresses),
            lambda: go(built, self.kubelets, self.folder, self.cores, self.guard),
        ]
        print("\n## Honest scrapes beside one hostile peer\n")
        print("| peer | | p99 quiet, ms | p99 beside it, ms | ratio (least to most) | failed | others |")
        print("|---|---|---|---|---|---|---|")
        for place in self.places:
            if place.kind not in kinds:
                continue
            found: dict[str, list[Measured]] = {}
            for number in range(rounds):
                turn = number % len(makers)
                for make in (*makers[turn:], *makers[:turn]):
                    contender = make()
                    async with contender:
                        await asyncio.sleep(SETTLES)
                        found.setdefault(contender.name, []).append(
                            await self._measure(contender, place, seconds)
                        )
            for name, runs in found.items():
                print(_line(place.kind, name, runs), flush=True)

    async def _measure(self, contender: Contender, place: Place, seconds: float) -> Measured:
        await self._scrape(contender.port, seconds=1.0)
        quiet = await self._scrape(contender.port, seconds=seconds)
        extra = (0, 0)
        async with self._peer(contender.port, place):
            beside = await self._scrape(contender.port, seconds=seconds)
            if place.kind is Kind.ANONYMOUS:
                new = await self._scrape(contender.port, seconds=12, rate=1.0, reconnect=True)
                extra = (new.good, new.good + new.failed)
            elif place.kind in (Kind.NEVER_READ, Kind.SLOW_READ):
                path = path_of(place.address, place.port)
                new = await self._scrape(contender.port, path=path, seconds=5, rate=1.0, reconnect=True)
                extra = (new.good, new.good + new.failed)
        return Measured(quiet, beside, extra)

    @asynccontextmanager
    async def _peer(self, proxy_port: int, place: Place) -> AsyncIterator[None]:
        peer = Peer(
            kind=place.kind,
            proxy_port=proxy_port,
            target=path_of(place.address, place.port),
            host=place.address,
            port=place.port,
            certificate=str(self.kubelets.certificate),
            token=self.guard.token,
            is_secure=True,
            clients=CLIENTS.get(place.kind, 8),
        )
        with (self.folder / "peer.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                "taskset", "-c", self.cores.others, *peer.arguments,
                stdout=asyncio.subprocess.PIPE, stderr=log,
                env={**os.environ, "PYTHONPATH": str(TESTS)},
            )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(IN_PLACE_WITHIN):
                if not await process.stdout.readline():
                    raise RuntimeError((self.folder / "peer.log").read_text()[-2000:])
            await asyncio.sleep(1)
            yield
        finally:
            process.kill()
            await process.wait()

    async def _scrape(
        self, port: int, *, seconds: float, rate: float = RATE, path: str = "", reconnect: bool = False
    ) -> Figures:
        path = path or path_of(self.kubelets.bodies[0].address, self.kubelets.port)
        job = Job(port, path, self.guard.token, rate, seconds, reconnect)
        script = Path(__file__).with_name("honest.py")
        process = await asyncio.create_subprocess_exec(
            "taskset", "-c", self.cores.others, sys.executable, str(script),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        output, _ = await process.communicate(msgspec.json.encode(job))
        return msgspec.json.decode(output, type=Figures)


def _line(kind: Kind, name: str, runs: Sequence[Measured]) -> str:
    quiet = statistics.median(run.quiet.p99 for run in runs) * 1000
    beside = statistics.median(run.beside.p99 for run in runs) * 1000
    ratios = [run.beside.p99 / run.quiet.p99 for run in runs]
    failed = sum(run.beside.failed for run in runs)
    asked = sum(run.extra[1] for run in runs)
    others = f"{sum(run.extra[0] for run in runs)} of {asked}" if asked else ""
    return (
        f"| {kind.value} | {name} | {quiet:.1f} | {beside:.1f} "
        f"| {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) | {failed} | {others} |"
    )
