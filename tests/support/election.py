"""An election: simulated step by step with every fault, and between replicas at an API server."""

import asyncio
import contextlib
import heapq
import itertools
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.access import load_access
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.cluster import LeaseClient
from k8s_consul_registrar.model import Lease
from k8s_consul_registrar.registrar.election import (
    CreateLease,
    Done,
    Election,
    ElectionAction,
    ElectionTiming,
    ReadLease,
    UpdateLease,
    Wait,
    asked,
    next_action,
    on_conflict,
    on_failure,
    on_read,
    on_written,
    resigned,
)
from k8s_consul_registrar.registrar.elector import Elector, clock
from support.cluster import Cluster, Rules, kubeconfig, running_cluster
from support.contender import TIMING
from support.doors import TcpProxy
from support.processes import LOOPBACK
from support.waiting import PATIENCE, until

EPOCH = datetime(2026, 11, 22, 10, tzinfo=UTC)
CONFLICT = "conflict"
ROUNDING = 1e-6  # seconds by which a wait may seem to end early between two clocks


@dataclass(frozen=True)
class Faults:
    """The likelihood of each fault at each request, and its length in seconds."""

    refused: float = 0.0
    lost_request: float = 0.0
    lost_answer: float = 0.0
    stalled: float = 0.0
    longest_delay: float = 0.05
    longest_stall: float = 40.0
    meddled: float = 0.0


@dataclass
class Reign:
    """A time in which one contender would have written, in seconds of the world's clock."""

    who: str
    since: float
    until: float


@dataclass
class World:
    """The record in the API server, the time, and what happens next."""

    pick: random.Random
    faults: Faults = Faults()
    time: float = 0.0
    record: Lease | None = None
    writes: list[tuple[float, Lease]] = field(default_factory=list)
    reigns: list[Reign] = field(default_factory=list)
    _versions: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _order: "itertools.count[int]" = field(default_factory=itertools.count)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Have something happen later."""
        heapq.heappush(self._events, (max(time, self.time), next(self._order), event))

    def run(self, until: float) -> None:
        """Let everything happen up to a moment."""
        while self._events and self._events[0][0] <= until:
            self.time, _, event = heapq.heappop(self._events)
            event()
        self.time = until

    def answer(self, action: ElectionAction) -> Lease | str | None:
        """Do what an API server does: compare the version, and write."""
        if isinstance(action, ReadLease):
            return self.record
        assert isinstance(action, (CreateLease, UpdateLease))
        there = self.record.version if self.record else ""
        if there != (action.lease.version if isinstance(action, UpdateLease) else ""):
            return CONFLICT
        self.record = replace(action.lease, version=str(next(self._versions)))
        self.writes.append((self.time, self.record))
        return self.record

    def meddle(self) -> None:
        """Write the object without touching the record, as a person who sets a label does."""
        if self.record:
            self.record = replace(self.record, version=str(next(self._versions)))

    def has(self, chance: float) -> bool:
        """Draw a lot."""
        return self.pick.random() < chance


class Contender:
    """One process: its clocks run as fast as the world's and show what they like."""

    def __init__(self, world: World, name: str, timing: ElectionTiming) -> None:
        self.world = world
        self.name = name
        self.election = Election(name, timing)
        self._offset = world.pick.uniform(-1e6, 1e6)
        self._skew = world.pick.uniform(-7200, 7200)
        self._run = 0
        self._reign: Reign | None = None
        self.is_done = False
        self.is_cut_off = False

    def start(self) -> None:
        """Take part from now on, unless it was ended before."""
        if self._run == 0:
            self.world.at(self.world.time, self._turn(self._run))

    def kill(self) -> None:
        """End without a word; a request that is under way still arrives."""
        self._run += 1
        self._end_reign()

    def resign(self) -> None:
        """End in order, whatever is under way: its answer will not be read."""
        if self._run == 0:
            self._run += 1
            self._become(resigned(self.election))

    def cut_off(self) -> None:
        """Lose the API server for good, and nothing else."""
        self.is_cut_off = True

    @property
    def now(self) -> float:
        """The time on its own clock."""
        return self.world.time + self._offset

    @property
    def is_leading(self) -> bool:
        """True if it would write now."""
        return self.election.is_leading(self.now)

    def _wall(self) -> datetime:
        # Set back and forth at any moment, to the second, so that equal times happen.
        return EPOCH + timedelta(
            seconds=round(self.world.time + self._skew) + self.world.pick.choice((0, 0, -9))
        )

    def _turn(self, run: int) -> Callable[[], None]:
        def turn() -> None:
            if run == self._run:
                self._do(next_action(self.election, self.now, self._wall()))

        return turn

    def _do(self, action: ElectionAction) -> None:
        world = self.world
        if isinstance(action, Done):
            self.is_done = True
        elif isinstance(action, Wait):
            assert action.until > self.now
            world.at(action.until - self._offset + ROUNDING + self._stall(), self._turn(self._run))
        else:
            self._send(action)

    def _send(self, action: ElectionAction) -> None:
        world, faults, run = self.world, self.world.faults, self._run
        started = self.now
        self.election = asked(self.election, action)
        if world.has(faults.meddled):
            world.meddle()
        arrives = world.time + world.pick.uniform(0, faults.longest_delay)
        gives_up = world.time + self.election.timing.renew_deadline / 2
        if self.is_cut_off or world.has(faults.refused) or world.has(faults.lost_request):
            fails_at = arrives if world.has(0.5) else gives_up
            world.at(fails_at + self._stall(), self._failed(run, started))
            return
        is_answer_lost = world.has(faults.lost_answer)
        answered = arrives + world.pick.uniform(0, faults.longest_delay)
        is_late = is_answer_lost or answered > gives_up

        def arrive() -> None:
            answer = world.answer(action)
            if not is_late:
                world.at(answered + self._stall(), self._answered(run, action, started, answer))

        world.at(arrives, arrive)
        if is_late:
            world.at(gives_up + self._stall(), self._failed(run, started))

    def _failed(self, run: int, started: float) -> Callable[[], None]:
        def failed() -> None:
            if run == self._run:
                self._become(on_failure(self.election, started, self.world.pick.random()))

        return failed

    def _answered(
        self, run: int, action: ElectionAction, started: float, answer: Lease | str | None
    ) -> Callable[[], None]:
        def answered() -> None:
            if run != self._run:
                return
            spread = self.world.pick.random()
            if isinstance(answer, str):
                self._become(on_conflict(self.election, self.now, spread))
            elif isinstance(action, ReadLease):
                self._become(on_read(self.election, answer, self.now, spread))
            else:
                assert answer is not None
                self._become(on_written(self.election, answer, started))

        return answered

    def _become(self, election: Election) -> None:
        self.election = election
        until = election.writes_until - self._offset
        self._end_reign()
        if until > self.world.time:
            self._reign = Reign(self.name, self.world.time, until)
            self.world.reigns.append(self._reign)
        self._turn(self._run)()

    def _end_reign(self) -> None:
        """Note that it writes no longer, or under a later renewal."""
        if self._reign:
            self._reign.until = min(self._reign.until, self.world.time)
        self._reign = None

    def _stall(self) -> float:
        """Return for how long the process is stopped before it gets to what it waits for."""
        faults = self.world.faults
        return self.world.pick.uniform(0, faults.longest_stall) if self.world.has(faults.stalled) else 0.0


NAME = "k8s-consul-registrar"
RULES: Rules = [
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}
]
RETRY = TIMING.stretched(1)


class Polls:
    """One election: a namespace of its own in the cluster, and the replicas that take part."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.namespace = f"election-{secrets.token_hex(4)}"
        self.path = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/{NAME}"
        self._folder = folder

    async def kubeconfig(self, address: str = "", rules: Rules = RULES) -> Path:
        """Write a kubeconfig for a new user who may do just this."""
        address = address or f"{LOOPBACK}:{self.cluster.endpoint.port}"
        path = self._folder / f"kubeconfig-{secrets.token_hex(4)}"
        user = {"token": await self.cluster.token(rules)}
        path.write_text(kubeconfig(address, self.cluster.endpoint.authority, user))
        return path

    @contextlib.asynccontextmanager
    async def client(self, address: str = "", rules: Rules = RULES) -> AsyncIterator[LeaseClient]:
        """Yield a client of the election's Lease."""
        access = load_access({"KUBECONFIG": str(await self.kubeconfig(address, rules))})
        async with KubeClient(access, Timing()) as client:
            yield LeaseClient(client, self.namespace, NAME)

    @contextlib.asynccontextmanager
    async def replica(
        self,
        identity: str,
        *,
        address: str = "",
        rules: Rules = RULES,
        clock: Callable[[], float] = clock,
        timing: ElectionTiming = TIMING,
    ) -> AsyncIterator["Replica"]:
        """Run a replica, and end it in order."""
        async with self.client(address, rules) as client:
            elector = Elector(client, identity, timing, clock=clock)
            replica = Replica(elector, asyncio.create_task(elector.run()))
            try:
                yield replica
            finally:
                await replica.end()

    @contextlib.asynccontextmanager
    async def leader(
        self,
        identity: str,
        *,
        address: str = "",
        clock: Callable[[], float] = clock,
        timing: ElectionTiming = TIMING,
    ) -> AsyncIterator["Replica"]:
        """Run a replica and wait until it leads."""
        async with self.replica(identity, address=address, clock=clock, timing=timing) as replica:
            await replica.leads()
            yield replica

    @contextlib.asynccontextmanager
    async def door(self) -> AsyncIterator[TcpProxy]:
        """Put a door before the API server that can be shut."""
        async with TcpProxy(LOOPBACK, self.cluster.endpoint.port) as door:
            yield door

    async def record(self) -> dict[str, Any]:
        """Return the Lease's spec."""
        spec: dict[str, Any] = (await self.cluster.request("GET", self.path))["spec"]
        return spec


class Replica:
    """An elector and the task that drives it."""

    def __init__(self, elector: Elector, task: asyncio.Task[None]) -> None:
        self.elector = elector
        self.task = task

    async def end(self) -> None:
        """Cancel it as SIGTERM would, and see that nothing else went wrong."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def leads(self, within: float = PATIENCE) -> float:
        """Wait until it leads, and return how long that took."""
        began = time.monotonic()
        await until(lambda: self.elector.is_leader, within=within, every=0.005)
        return time.monotonic() - began

    async def sees(self, holder: str) -> None:
        """Wait until it has read who holds the lease."""
        await until(lambda: self.elector.holder == holder)

    async def yields(self, within: float = PATIENCE) -> float:
        """Wait until it leads no longer, and return how long that took."""
        began = time.monotonic()
        await until(lambda: not self.elector.is_leader, within=within, every=0.005)
        return time.monotonic() - began


@contextlib.asynccontextmanager
async def running_polls(folder: Path) -> AsyncIterator[Polls]:
    """Run a cluster with a namespace for one election."""
    async with running_cluster() as cluster:
        polls = Polls(cluster, folder)
        await cluster.add_namespace(polls.namespace)
        yield polls
