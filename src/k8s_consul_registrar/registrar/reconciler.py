"""The loop that keeps Consul equal to what the cluster wants."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.errors import ConsulError
from k8s_consul_registrar.model import Service, Written
from k8s_consul_registrar.registrar.brake import BrakeRules, Memory
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.plan import Plan, Planner
from k8s_consul_registrar.registrar.ports import Cluster, Registry
from k8s_consul_registrar.registrar.report import Reporter
from k8s_consul_registrar.registrar.status import PassReport, RegistrarStatus
from k8s_consul_registrar.targets.sharding import Shards
from k8s_consul_registrar.targets.wanted import Wanted

# A plan over many services yields to the loop this often, so that health checks are answered meanwhile.
SLICE = 500


class Reconciler:
    """Wakes when the cluster changed or a period has passed, plans, and writes what differs."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        registry: Registry,
        identity: Identity,
        shards: Shards,
        rules: BrakeRules,
        period: float,
        timing: Timing,
        metrics: RegistrarMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._registry = registry
        self._identity = identity
        self._shards = shards
        self._rules = rules
        self._period = period
        self._timing = timing
        self._clock = clock
        self._memory: Memory = {}
        self.status = RegistrarStatus(ticked_at=clock())
        self._reporter = Reporter(metrics, self.status)

    async def run(self) -> None:
        """Keep Consul equal for ever; ends only by cancellation."""
        await self._wake()
        while True:
            # Consul that fails is tried again soon; a single service it refuses, ever more seldom.
            unusable = delays(self._timing.retry_first, self._timing.retry_cap)
            refusing = delays(self._timing.retry_first, max(self._period, self._timing.retry_first))
            while (report := await self.reconcile()).outcome != "success":
                if report.problem:
                    await asyncio.sleep(next(unusable))
                else:
                    await self._wake(next(refusing))
            await self._wake()

    async def reconcile(self) -> PassReport:
        """Make one pass: read Consul, plan, register, then deregister; never raises a `ConsulError`."""
        started = self._clock()
        wanted = self._cluster.wanted()
        if all(state.listed_at is None for state in wanted.sources.values()):
            self._reporter.sources(wanted)
            return PassReport()
        try:
            plan = await self._plan(wanted)
            report = await self._apply(plan)
        except ConsulError as error:
            report = PassReport(problem=str(error))
        else:
            self._memory = plan.memory
            for held in plan.held:
                self._cluster.relist(held.source, held.due)
            if not report.refused:
                self._cluster.settled(wanted.departed - plan.kept_objects)
        report = replace(report, seconds=self._clock() - started)
        self._reporter.passed(wanted, report)
        return report

    async def _wake(self, wait: float | None = None) -> None:
        """Wait for a change, or a period, then for the rest of a burst; tick so that a hang would show."""
        until = self._clock() + (self._period if wait is None else wait)
        while (left := min(until - self._clock(), self._timing.tick)) > 0:
            self.status.ticked_at = self._clock()
            try:
                async with asyncio.timeout(left):
                    await self._cluster.changed()
            except TimeoutError:
                continue
            await asyncio.sleep(self._timing.gather)
            return

    async def _plan(self, wanted: Wanted) -> Plan:
        planner = Planner(wanted, self._identity, self._shards, self._rules, self._memory)
        count = 0
        async for service in self._registry.services():
            planner.consider(service)
            count += 1
            if count % SLICE == 0:
                self.status.ticked_at = self._clock()
                await asyncio.sleep(0)
        return planner.finish()

    async def _apply(self, plan: Plan) -> PassReport:
        self._reporter.planned(plan)
        registered = await self._write("register", self._registry.register, plan.register)
        updated = await self._write("update", self._registry.register, plan.update)
        deregistered = await self._write("deregister", self._registry.deregister, plan.deregister)
        refused = (*registered.failures, *updated.failures, *deregistered.failures)
        return PassReport(
            registered=registered.done,
            updated=updated.done,
            deregistered=deregistered.done,
            unchanged=plan.unchanged,
            refused=len(refused),
            conflicts=plan.conflicts,
            rejections=plan.rejections,
            held=plan.held,
            kept=plan.kept.total(),
        )

    async def _write(
        self,
        verb: str,
        write: Callable[[Sequence[Service]], Awaitable[Written]],
        services: Sequence[Service],
    ) -> Written:
        if not services:
            return Written()
        written = await write(services)
        self._reporter.wrote(verb, services, written)
        return written
