"""Controller: the registrar's loop, which starts batches, resyncs and probes as they become due."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TypeVar

from msgspec.structs import replace

from k8s_consul_registrar.asyncio_tools import end_tasks
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.errors import ConsulError, ConsulFenced
from k8s_consul_registrar.kube.source_state import SourceStatus, Synced
from k8s_consul_registrar.model import Drift, Source
from k8s_consul_registrar.registrar.claims import Change
from k8s_consul_registrar.registrar.decide import Kept
from k8s_consul_registrar.registrar.interfaces import Health, Leadership, NoElection, Role, Upkeep
from k8s_consul_registrar.registrar.queue import Batch, Priority, Slots
from k8s_consul_registrar.registrar.reconciler import Core, Reconciler
from k8s_consul_registrar.registrar.resync import Resync
from k8s_consul_registrar.registrar.schedule import Gate, Need, Schedule, ScheduleRules, Step, StepKind
from k8s_consul_registrar.registrar.status import RegistrarStatus
from k8s_consul_registrar.telemetry import get_logger

# A turn that comes this many seconds late means that the process, or its machine, was suspended.
SUSPENDED_AFTER = 15.0

ResultT = TypeVar("ResultT")

log = get_logger("registrar")


class Controller:
    """Starts each piece of work when it is due, and never waits for one to start another.

    Until the first complete read of Consul nothing is taken from the queue. Consul's failures close one gate
    with one backoff, which holds batches, resyncs and probes alike.
    """

    def __init__(
        self,
        core: Core,
        reconciler: Reconciler,
        resync: Resync,
        health: Health,
        *,
        schedule: ScheduleRules,
        timing: Timing,
        leadership: Leadership | None = None,
        upkeep: Sequence[Upkeep] = (),
        probe_consul: Callable[[bool], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the controller; `probe_consul` receives True if nothing is left to write."""
        self._core = core
        self._reconciler = reconciler
        self._resyncer = resync
        self._health = health
        self._slots = Slots(lambda: health.concurrency(core.registry.concurrency))
        self._probe_consul = probe_consul
        self._rules = schedule
        self._timing = timing
        self._leadership: Leadership = leadership or NoElection()
        self._upkeep = upkeep
        self._clock = clock
        self._wake = asyncio.Event()
        self._schedule = Schedule.start(schedule, clock())
        self._batches: set[asyncio.Task[None]] = set()
        self._step: asyncio.Task[None] | None = None
        self._step_due = math.inf  # as of the latest turn: a change of the schedule wakes the loop
        self._role = Role.UNDECIDED
        self._has_changes = False
        self._has_stale_services = False
        # Sources whose next list confirms absences, or not.
        self._awaited: frozenset[Source] = frozenset()
        self._is_upkeep_due = False
        self._listed: dict[Source, float | None] = {}
        self._standby_read_due = clock()
        self._gate = Gate(health, timing, clock)
        self._expected_at = clock()
        core.status.ticked_at = clock()
        core.desired.subscribe(self.on_change, self.on_source)

    @property
    def status(self) -> RegistrarStatus:
        """Where the registrar stands."""
        return self._core.status

    @property
    def is_complete(self) -> bool:
        """True if everything was compared once and written, and Consul refused nothing that is still owed."""
        core = self._core
        return core.status.has_synced and not core.status.refused and core.queue.is_drained

    # What wakes the loop

    def on_change(self, change: Change) -> None:
        """Queue the service IDs that a change of the cluster concerns; a standby leaves them to the leader."""
        core = self._core
        if change.rejection is not None and core.status.has_synced:
            core.reporter.rejected(change.rejection)
        if change.dropped and change.wait:
            due = replace(change, asked=(), wait=0.0)
            asyncio.get_running_loop().call_later(change.wait, self._on_due, due)
            change = replace(change, dropped=())
        if self._role is Role.STANDBY:
            return
        now = self._clock()
        priority = Priority.BULK if change.heard_at is None else Priority.CHANGE
        for service_id in change.asked:
            core.queue.add(service_id, now, priority, change.heard_at)
        if change.dropped:
            removal = max(priority, Priority.REMOVAL)
            core.queue.add_after(change.dropped, change.asked, now, removal, change.heard_at)
        self._has_changes = True
        self._wake.set()

    def _on_due(self, change: Change) -> None:
        """Queue removals that had to wait; nothing shows them as targets any more."""
        for service_id in change.dropped:
            self._core.observed.changed(service_id)
        self.on_change(change)

    def on_source(self, source: Source, status: SourceStatus) -> None:
        """Ask for a judgement once a source was listed, or when services wait for a list or a synced source."""
        core = self._core
        is_synced = isinstance(status.state, Synced)
        if is_synced and status.listed_at != self._listed.get(source):
            is_asked_for = source not in self._listed or source in self._awaited
            is_due = is_asked_for or core.desired.has_absences or bool(core.observed.others)
            self._listed[source] = status.listed_at
        else:
            is_due = is_synced and self._has_stale_services
        if is_due:
            self._schedule = self._schedule.judge_at(self._clock())
        core.reporter.sources(core.desired.store.statuses())
        self._wake.set()

    def on_cluster_uid(self, uid: str) -> None:
        """Take over which cluster answers; another one is a reason to compare everything."""
        if self._core.desired.learn_cluster_uid(uid):
            self._want(Need.URGENT)
            self._wake.set()

    # The loop

    async def run(self) -> None:
        """Keep Consul equal to the cluster; ends only by cancellation."""
        watch = asyncio.create_task(self._watch_leadership())
        try:
            while True:
                await self._turn()
        finally:
            await end_tasks([watch, *self._batches, *([self._step] if self._step else [])])
            self._core.reporter.flush()

    async def _turn(self) -> None:
        """Start what is due, then wait for the next reason to look."""
        now = self._core.status.ticked_at = self._clock()
        self._notice_suspension(now)
        role = Role.LEADER if self._leadership.is_leader else Role.STANDBY
        if role is not self._role:
            await self._change_role(role)
        if role is Role.LEADER:
            self._dispatch(now)
        self._start_step(now)
        self._core.reporter.consul(self._gate.problem, is_up=self._gate.is_up)
        self._check_synced()
        if self._core.desired.hand_down():
            self._wake.set()
        self._core.reporter.shared_endpoints(self._core.desired.endpoints)
        self._core.reporter.flush_due()
        self._expected_at = min(self._due(now), now + self._timing.tick)
        timer = asyncio.get_running_loop().call_later(self._expected_at - now, self._wake.set)
        await self._wake.wait()
        timer.cancel()
        self._wake.clear()
        if self._has_changes:
            self._has_changes = False
            await asyncio.sleep(self._timing.gather)  # a burst of events is one batch

    def _due(self, now: float) -> float:
        """Return when there is work to start, or a log line to write."""
        return min(max(self._work_due(now), self._gate.opens_at), self._core.reporter.due)

    def _work_due(self, now: float) -> float:
        if self._role is Role.STANDBY:
            return self._standby_read_due if self._step is None else math.inf
        queue, due = self._core.queue, math.inf
        if queue.has_waiting and self._core.observed.is_complete and self._slots.is_free:
            due = queue.next_due(now, without=self._full_priorities())
        if self._step is None:
            due = now if self._is_upkeep_due and queue.is_drained else min(due, self._step_due)
        return due

    async def _watch_leadership(self) -> None:
        while True:
            await self._leadership.changed()
            self._wake.set()

    def _notice_suspension(self, now: float) -> None:
        """Compare everything after the process was stopped for long: others may have written meanwhile."""
        if now - self._expected_at > SUSPENDED_AFTER:
            log.warning("the process was suspended", seconds=round(now - self._expected_at, 1))
            self._want(Need.URGENT)

    async def _change_role(self, role: Role) -> None:
        core = self._core
        if self._step is not None:
            await end_tasks([self._step])
            self._step = None
        self._role = role
        if role is Role.LEADER:
            core.observed.expire()
            core.desired.begin_leading()
            core.queue.clear()
            self._schedule = Schedule.start(self._rules, self._clock())
            core.reporter.leads()
        else:
            core.queue.clear()
            self._standby_read_due = self._clock()
            core.reporter.stands_by()
            for one in self._upkeep:
                one.rest()
            self._show_lost_agents()

    # Batches

    def _full_priorities(self) -> list[Priority]:
        is_partial = self._core.queue.bulk_waiting < self._core.registry.batch_size
        return self._slots.full(is_bulk_partial=is_partial)

    def _dispatch(self, now: float) -> None:
        """Start batches while there are slots."""
        while (batch := self._take(now)) is not None:
            task = asyncio.create_task(self._reconcile(batch))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)

    def _take(self, now: float) -> Batch | None:
        """Return the next batch if one is due, may be written and has a slot; it counts as in flight."""
        core = self._core
        if not core.queue.has_waiting:
            return None
        may_write = self._role is Role.LEADER and self._leadership.is_leader and core.observed.is_complete
        if not may_write or now < self._gate.opens_at or not self._slots.is_free:
            return None
        batch = core.queue.take(core.registry.batch_size, now, without=self._full_priorities())
        if batch is not None:
            self._slots.begin(batch)
        return batch

    async def _reconcile(self, first: Batch) -> None:
        """Reconcile a batch, then at once what is due next: a slot that waits for the loop's turn idles Consul."""
        batch: Batch | None = first
        while batch is not None:
            writes = await self._reconcile_one(batch)
            if not writes:
                await asyncio.sleep(0)
            batch = self._take(self._clock())

    async def _reconcile_one(self, batch: Batch) -> int:
        """Reconcile one batch that was taken; return how many services were written."""
        counts = None
        try:
            counts = await self._attempt("batch", self._reconciler.reconcile(batch))
        finally:
            self._slots.end(batch)
            writes = 0 if counts is None else counts.writes
            if writes:  # a batch that needed no request says nothing about Consul
                self._gate.open("batch", is_drained=self._core.queue.is_drained)
            if counts is None or self._has_news():
                self._wake.set()
        return writes

    def _has_news(self) -> bool:
        """Return True if a batch that ended changed what the loop waits for; most changes do not."""
        status = self._core.status
        is_noted = status.has_synced and self._gate.is_up is not bool(status.consul_problem)
        return not is_noted or self._due(self._clock()) < self._expected_at

    # Resyncs, probes and orphans

    def _next_step(self, now: float) -> Step:
        looks = self._upkeep if self._core.status.has_synced else ()
        return self._schedule.next(now, min((one.look_due for one in looks), default=math.inf))

    def _start_step(self, now: float) -> None:
        """Start the step that is due; one at a time, beside the batches."""
        if self._step is not None or now < self._gate.opens_at:
            return
        work: Coroutine[None, None, None] | None = None
        if self._role is Role.STANDBY:
            if self._standby_read_due <= now:
                work = self._read_as_standby()
        elif self._is_upkeep_due and self._core.queue.is_drained:
            self._is_upkeep_due = False
            work = self._keep_up(collects=True)
        else:
            step = self._next_step(now)
            self._step_due = step.until
            match kind := step.kind:
                case StepKind.RESYNC | StepKind.JUDGE:
                    self._schedule = self._schedule.began(kind, now)
                    work = self._resync(reads=kind is StepKind.RESYNC)
                case StepKind.PROBE:
                    work = self._probe()
                case StepKind.ORPHANS:
                    work = self._keep_up(collects=False)
        if work is not None:
            self._step = asyncio.create_task(self._run_step(work))

    async def _run_step(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        finally:
            if self._step is asyncio.current_task():
                self._step = None
            self._wake.set()

    async def _resync(self, *, reads: bool) -> None:
        found = await self._attempt("resync", self._resyncer.run(reads=reads))
        if found is None:
            self._want(Need.URGENT)
            return
        if found.read_seconds is not None:
            self._gate.open("resync", is_drained=self._core.queue.is_drained)
            self._schedule = self._schedule.resynced(self._clock(), found.read_seconds)
            self._is_upkeep_due = bool(self._upkeep)
        self._schedule = self._schedule.judge_at(found.judged.again_at)
        self._awaited = found.judged.relisting | {one.source for one in found.judged.held}
        self._has_stale_services = bool(found.kept[Kept.BLIND])

    async def _probe(self) -> None:
        """Ask whether something else wrote to Consul."""
        if self._core.observed.is_complete:
            drift = await self._attempt("probe", self._ask_for_drift())
            if drift is not None:
                self._gate.open("probe", is_drained=self._core.queue.is_drained)
                self._want({Drift.CHANGED: Need.DRIFT, Drift.EMPTIED: Need.URGENT}.get(drift, Need.NONE))
        self._schedule = self._schedule.probed(self._clock())

    async def _ask_for_drift(self) -> Drift:
        if self._probe_consul is not None and not self._health.is_up:
            await self._probe_consul(self._core.queue.is_drained)
        return await self._core.registry.drift()

    async def _keep_up(self, *, collects: bool) -> None:
        """Look for services that no agent keeps, or remove those that may go."""
        now = self._clock()
        for one in self._upkeep:
            if collects:
                await one.collect()
            elif one.look_due <= now and await one.look():
                self._want(Need.DRIFT)
        self._show_lost_agents()

    def _show_lost_agents(self) -> None:
        self._core.status.lost_agents = tuple(agent for one in self._upkeep for agent in one.lost)

    async def _read_as_standby(self) -> None:
        """Read what the leader wrote: what a standby serves has the leader's shards."""
        if await self._attempt("resync", self._resyncer.read()) is not None:
            self._gate.open("resync", is_drained=self._core.queue.is_drained)
            self._standby_read_due = self._clock() + self._timing.standby_look
            # What differs is the leader's to write.
            self._core.queue.clear()

    # Failures

    async def _attempt(self, what: str, work: Coroutine[None, None, ResultT]) -> ResultT | None:
        """Return what came of work with Consul; None after a failure, which closes the gate for a while."""
        try:
            return await work
        except ConsulFenced:
            # The role changes with the next turn; until then nothing is written.
            self._gate.wait_a_moment()
        except ConsulError as error:
            self._core.reporter.failed()
            self._gate.close(what, str(error))
        except Exception as error:  # noqa: BLE001 - counted and logged; nothing ends the daemon
            self._core.reporter.internal_error(what, error)
            self._gate.close(what, f"internal error: {type(error).__name__}")
        return None

    def _want(self, need: Need) -> None:
        self._schedule = self._schedule.want(need)

    def _check_synced(self) -> None:
        """Note that everything was compared once, and tried."""
        core = self._core
        if core.status.has_synced or not core.observed.is_complete:
            return
        if any(status.listed_at is None for status in core.desired.store.statuses().values()):
            return
        is_compared = (
            self._schedule.is_at_rest(self._clock()) and self._step is None and core.queue.is_drained
        )
        core.status.has_synced = self._role is Role.STANDBY or is_compared
