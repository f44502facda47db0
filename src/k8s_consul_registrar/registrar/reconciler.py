"""The loop that keeps Consul equal to what the cluster wants: which pass, and when."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.errors import ConsulError, ConsulFenced
from k8s_consul_registrar.model import Disturbance
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.budget import Budget, BudgetRules
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.passes import Passes
from k8s_consul_registrar.registrar.ports import Alone, Cluster, Leadership, Registry, Sweeps
from k8s_consul_registrar.registrar.report import Reporter
from k8s_consul_registrar.registrar.status import PassReport, RegistrarStatus
from k8s_consul_registrar.targets.sharding import Shards


class Reconciler:
    """Wakes for a change, a period or a disturbance in Consul, and makes the pass that answers it.

    A change costs a pass over what changed. Everything is compared when a list was completed, when
    somebody else wrote to Consul, and every `period` seconds as a safety net; how often Consul is read
    whole for it is bounded by a budget.
    """

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
        budget: BudgetRules | None = None,
        leadership: Leadership | None = None,
        sweeper: Sweeps | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._registry = registry
        self._leadership: Leadership = leadership or Alone()
        self._sweeper = sweeper
        self._period = period
        self._timing = timing
        self._clock = clock
        self._budget = Budget(budget or BudgetRules(), clock())
        self.status = RegistrarStatus(ticked_at=clock())
        self._reporter = Reporter(metrics, self.status, clock)
        self._passes = Passes(
            cluster=cluster,
            registry=registry,
            identity=identity,
            shards=shards,
            rules=rules,
            reporter=self._reporter,
        )
        self._full_due = clock() + period
        self._probe_due = clock() + timing.probe
        self._retry_due = float("inf")
        self._look_due = clock()
        self._owes_full = False
        # Whether a full pass is owed to a list, or to an outage of Consul, and not to somebody's writing alone.
        self._is_urgent = False
        self._has_learned = False
        self._unusable = delays(timing.retry_first, timing.retry_cap)
        self._refusing = delays(timing.retry_first, max(period, timing.retry_first))

    @property
    def passes(self) -> Passes:
        """What is known of Consul, for whoever shows it."""
        return self._passes

    async def run(self) -> None:
        """Keep Consul equal for ever; ends only by cancellation."""
        try:
            while True:
                await self._step()
        finally:
            self._reporter.tell_all()

    async def _step(self) -> None:
        if not self._leadership.is_leader:
            await self._stand_by()
            return
        self._reporter.leads()
        if self._has_learned:
            await self._turn()
        else:
            self._has_learned = await self._is_done(self._passes.learn())

    async def _stand_by(self) -> None:
        """Wait to lead, the cluster's mirrors warm meanwhile; what the other wrote is learned anew then."""
        self._has_learned = False
        self._owes_full = True
        self.status.ticked_at = self._clock()
        self._reporter.stands_by(self._cluster.changes())
        if self._sweeper is not None:
            self._sweeper.rest()
            self.status.lost_agents = self._sweeper.lost
        if self._clock() >= self._look_due:
            # What it serves to others carries the shards that the leader gave.
            self._look_due = self._clock() + self._timing.standby_look
            await self._is_done(self._passes.learn())
        with contextlib.suppress(TimeoutError):
            tick = self._timing.tick if self.status.has_synced else self._timing.retry_first
            async with asyncio.timeout(tick):
                await self._leadership.changed()

    async def _turn(self) -> None:
        """Make the pass that is due, or wait for the next reason to make one."""
        now = self.status.ticked_at = self._clock()
        self._reporter.tell()
        self._is_urgent = self._is_urgent or self._cluster.needs_full_pass()
        wants_full = self._wants_full(now)
        full_at = now + self._budget.wait(now, is_urgent=self._is_urgent) if wants_full else self._full_due
        if full_at <= now:
            if not self.status.has_synced:
                # What is known to be missing need not wait until all that is there was read.
                await self._partial()
            await self._full()
        elif self._retry_due <= now:
            await self._partial(retries_refused=True)
        elif self._probe_due <= now:
            await self._probe()
        elif self._look_for_lost_due() <= now:
            await self._look_for_lost()
        else:
            due = min(
                full_at,
                self._retry_due,
                self._probe_due,
                self._look_for_lost_due(),
                self._reporter.tell_due,
                now + self._timing.tick,
            )
            if await self._changed_within(due - now):
                await asyncio.sleep(self._timing.gather)
                await self._partial()

    def _wants_full(self, now: float) -> bool:
        return self._owes_full or self._full_due <= now or self._cluster.needs_full_pass()

    async def _changed_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._cluster.changed()
        except TimeoutError:
            return False
        return True

    async def _full(self) -> None:
        self._owes_full = True
        full_pass = partial(self._passes.full, self._follow)
        if await self._is_done(self._make(full_pass, is_full=True)):
            self._owes_full = self._is_urgent = False
            self._full_due = self._clock() + self._period
            self._budget.spend(self._clock(), self._passes.read_seconds)
            if self._sweeper is not None:
                await self._sweeper.sweep()
                self.status.lost_agents = self._sweeper.lost

    async def _follow(self) -> None:
        """Make a pass over what changes while a full pass is under way."""
        await asyncio.sleep(self._timing.gather)
        self.status.ticked_at = self._clock()
        await self._make(self._passes.partial, is_full=False)

    async def _partial(self, *, retries_refused: bool = False) -> None:
        pass_over_changes = partial(self._passes.partial, retries_refused=retries_refused)
        await self._is_done(self._make(pass_over_changes, is_full=False))

    async def _probe(self) -> None:
        """Ask whether somebody else wrote to Consul."""
        self._probe_due = self._clock() + self._timing.probe

        async def ask() -> None:
            found = await self._registry.disturbance()
            self._owes_full = self._owes_full or found is not Disturbance.NONE
            # Targets are gone from Consul, and nothing else brings them back.
            self._is_urgent = self._is_urgent or found is Disturbance.EMPTIED

        await self._is_done(ask())

    def _look_for_lost_due(self) -> float:
        """Return when to look for agents that are gone."""
        return float("inf") if self._sweeper is None else self._sweeper.look_due

    async def _look_for_lost(self) -> None:
        if self._sweeper is not None:
            self._owes_full = await self._sweeper.look() or self._owes_full
            self.status.lost_agents = self._sweeper.lost

    async def _make(self, make: Callable[[], Awaitable[PassReport]], *, is_full: bool) -> None:
        """Make a pass, report it, and see to what it left undone."""
        started = self._clock()
        report = replace(await make(), seconds=self._clock() - started)
        self._reporter.passed(report, is_full=is_full)
        if report.refused:
            # What Consul refuses of single services is tried again ever more seldom.
            self._retry_due = self._clock() + next(self._refusing)
        elif not self._passes.has_refused:
            self._retry_due = float("inf")
            self._refusing = delays(self._timing.retry_first, max(self._period, self._timing.retry_first))

    async def _is_done(self, work: Coroutine[None, None, None]) -> bool:
        """Do something with Consul; when that cannot be used, wait a little longer each time."""
        try:
            await work
        except ConsulFenced:
            self._owes_full = True
            return False
        except ConsulError as error:
            self._reporter.failed(str(error))
            self._passes.look()
            self._is_urgent = True
            self._retry_due = self._clock()
            await asyncio.sleep(next(self._unusable))
            return False
        self._reporter.reached()
        self._unusable = delays(self._timing.retry_first, self._timing.retry_cap)
        return True
