"""A whole controller between a cluster and a Consul in memory."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress

from prometheus_client import CollectorRegistry

from k8s_consul_registrar.admin.view import About, TargetRow, View
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.kube.cluster import ClusterUid
from k8s_consul_registrar.model import Drift, Pod, Source
from k8s_consul_registrar.registrar.absences import Absences, SelectionRecord
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.controller import Controller
from k8s_consul_registrar.registrar.decide import NameGuard, Rules
from k8s_consul_registrar.registrar.interfaces import Leadership, Upkeep
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.observed import Contests, ObservedState
from k8s_consul_registrar.registrar.ownership import Identity, Policy
from k8s_consul_registrar.registrar.queue import WorkQueue
from k8s_consul_registrar.registrar.quota import LimitedState, quota_of
from k8s_consul_registrar.registrar.reconciler import Core, Reconciler
from k8s_consul_registrar.registrar.reporter import Reporter
from k8s_consul_registrar.registrar.resync import Resync
from k8s_consul_registrar.registrar.schedule import ScheduleRules
from k8s_consul_registrar.registrar.status import RegistrarStatus
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.settings.registrar import selection_digest
from k8s_consul_registrar.targets.resolve import TargetRules
from k8s_consul_registrar.targets.service_names import RandomShards, Shards
from k8s_consul_registrar.wiring.registrar import Wiring
from support.builders import make_pod
from support.memory import PODS, MemoryCluster, MemoryRegistry
from support.scripted import QUICK
from support.waiting import Clock, until

# A read of everything costs nothing in memory.
FREE_READS = ScheduleRules(period=60, probe=QUICK.probe, gap=0)
# An absence that is no fact is held for as long as a test lasts.
HELD = BrakeRules(confirm=60, confirm_start=60)


class MemoryHealth:
    """The health of a Consul in memory, by the requests that it was sent; the gate is the controller's."""

    def __init__(self, consul: MemoryRegistry) -> None:
        self._consul = consul
        self.open_at = -math.inf

    @property
    def is_up(self) -> bool:
        """True if a request succeeded and neither the latest read nor the latest write failed."""
        consul = self._consul
        return consul.has_answered and not (consul.is_read_failing or consul.is_write_failing)

    @property
    def problem(self) -> str:
        """The failure."""
        consul = self._consul
        return "Consul is down" if consul.is_read_failing or consul.is_write_failing else ""

    def concurrency(self, limit: int) -> int:
        """Return the limit."""
        return limit


class Vote:
    """A leadership that a test decides."""

    def __init__(self, *, is_leader: bool) -> None:
        self.is_leader = is_leader
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait for a decision."""
        await self._changed.wait()
        self._changed.clear()

    def decide(self, *, is_leader: bool) -> None:
        """Win or lose the lead."""
        self.is_leader = is_leader
        self._changed.set()


class ControllerLab:
    """A controller between a cluster and a Consul in memory; time is real and short."""

    def __init__(
        self,
        *,
        checks_versions: bool = True,
        shards: Shards | None = None,
        sources: Sequence[Source] = (PODS,),
        schedule: ScheduleRules = FREE_READS,
        brake: BrakeRules = HELD,
        identity: Identity = Identity("lab"),  # noqa: B008 - an immutable value
        leadership: Leadership | None = None,
        upkeep: Sequence[Upkeep] = (),
        timing: Timing = QUICK,
        target_rules: TargetRules | None = None,
        checked_names: bool = False,
        policy: Policy = Policy.SYNC,
        backoff_cap: float = 60.0,
        quota: int = 0,
        quota_removes: bool = False,
        selects_namespaces: bool = False,
    ) -> None:
        self.clock = Clock(follows=time.monotonic)
        self.observed = LimitedState() if quota else ObservedState()
        self.cluster = MemoryCluster(
            sources,
            observed=self.observed,
            clock=self.clock,
            rules=target_rules,
            selects_namespaces=selects_namespaces,
        )
        self.desired = self.cluster.desired
        self.consul = MemoryRegistry(checks_versions=checks_versions)
        self.metrics = CollectorRegistry()
        self.status = RegistrarStatus()
        self.reporter = Reporter(RegistrarMetrics(self.metrics), self.status, self.clock)
        self.queue = WorkQueue(first=timing.retry_first, cap=backoff_cap, min_interval=timing.write_interval)
        checked = frozenset(source.kind for source in sources) if checked_names else frozenset()
        self.names = NameGuard(
            self.consul.is_name_taken, checked=checked, unchecked=self.reporter.names_unchecked
        )
        self.rules = Rules(identity, shards or RandomShards(), self.names.names, policy=policy)
        self.contests = Contests(schedule.period)
        self.absences = Absences(self.desired, self.cluster, brake, clock=self.clock)
        self.core = core = Core(
            self.desired,
            self.observed,
            self.queue,
            self.consul,
            self.rules,
            self.names,
            self.contests,
            self.reporter,
            self.status,
            Audit(self.status.removals, leader="lab-1"),
            quota_of(quota, self.observed, self.desired, self.status.blocked, removes=quota_removes),
        )
        self.reconciler = Reconciler(core, clock=self.clock)
        id_prefix = target_rules.id_prefix if target_rules else ""
        self.resync = Resync(core, self.absences, id_prefix=id_prefix, clock=self.clock)
        self.health = MemoryHealth(self.consul)
        self.controller = Controller(
            core,
            self.reconciler,
            self.resync,
            self.health,
            schedule=schedule,
            timing=timing,
            leadership=leadership,
            upkeep=upkeep,
            probe_consul=self._probe_consul,
            clock=self.clock,
        )

    async def _probe_consul(self, is_drained: bool) -> None:
        """Let a read that works clear a failed write, while nothing is left to write."""
        if is_drained and not self.consul.is_down:
            self.consul.is_write_failing = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the controller."""
        task = asyncio.create_task(self.controller.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @property
    def names_held(self) -> set[str]:
        """The Pods of namespace shop whose services Consul holds."""
        return {service_id.removeprefix("pod--shop--") for service_id in self.consul.held}

    async def until(self, *names: str) -> None:
        """Wait until Consul holds just these Pods' services."""
        expected = set(names)
        await self.until_so(lambda: self.names_held == expected)

    async def until_so(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so."""
        await until(is_so, every=0.002)

    async def synced(self, *names: str) -> None:
        """List these Pods, and wait until everything was compared once."""
        self.cluster.put_list([make_pod(name) for name in names])
        await self.until_so(lambda: self.status.has_synced)
        await self.until(*names)

    async def resynced(self) -> None:
        """Wait until a resync that began after this call has ended, and the queue is drained."""
        for _ in range(2):  # the first may have begun before
            resyncs = self.value("resyncs_total")
            self.consul.foreign = Drift.CHANGED
            await self.until_so(lambda seen=resyncs: self.value("resyncs_total") > seen)  # type: ignore[misc]
        await self.until_so(lambda: self.queue.is_drained)

    def value(self, name: str, **labels: str) -> float:
        """Return one figure."""
        return self.metrics.get_sample_value(f"k8s_consul_registrar_{name}", labels) or 0.0


SETTINGS = read_registrar({"CLUSTER_NAME": "lab", "SHARD_PATHS": "s1,s2", "CONSUL_HTTP_TOKEN": "t0p-secret"})
WIRING = Wiring(SETTINGS)


class Namespaces:
    """An API server that tells a UID, None where it may not be seen."""

    def __init__(self, uid: str | None) -> None:
        self.uid = uid

    async def namespace_uid(self, name: str) -> str | None:
        """Return it."""
        return self.uid


class Seen:
    """A controller with its view; `learn` makes the cluster's UID known, as a reflector does."""

    def __init__(
        self,
        *,
        sources: Sequence[Source] = (PODS,),
        brake: BrakeRules | None = None,
        saved_uid: str = "",
        policy: Policy = Policy.SYNC,
        quota: int = 0,
        leadership: Leadership | None = None,
        timing: Timing = QUICK,
    ) -> None:
        self.lab = ControllerLab(
            shards=WIRING.shards,
            sources=sources,
            identity=WIRING.identity,
            brake=brake or BrakeRules(confirm=0.1, confirm_start=600),
            policy=policy,
            quota=quota,
            leadership=leadership,
            timing=timing,
        )
        self.namespaces = Namespaces("uid-1")
        self.cluster_uid = ClusterUid(self.namespaces, self.lab.controller.on_cluster_uid)
        self.selection = SelectionRecord(
            selection_digest(SETTINGS),
            catalog=None,
            cluster_uid=lambda: self.lab.desired.cluster_uid,
            saved_cluster_uid=saved_uid,
        )
        self.view = View(
            About("lab", "", "agent"), self.lab.desired, self.lab.observed, self.lab.status, self.lab.rules
        )

    def targets(self) -> dict[str, TargetRow]:
        """Return what is seen, by Pod or Node."""
        return {one.key.name: one for one in self.view.targets()}

    async def synced(self, pods: Iterable[Pod]) -> None:
        """List these Pods, and wait until everything was compared once and written."""
        self.lab.cluster.put_list(pods)
        await self.lab.until_so(lambda: self.lab.status.has_synced and self.lab.queue.is_drained)

    async def learn(self, uid: str | None = "uid-1") -> None:
        """Have the API server asked for the cluster's UID."""
        self.namespaces.uid = uid
        await self.cluster_uid.confirm()
