"""Reconciles batches of service IDs: reads what is in doubt, decides, writes, and records each result."""

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

import msgspec

from k8s_consul_registrar.errors import ConsulError, ConsulFiltered
from k8s_consul_registrar.model import Rejection, Service, WriteFailure, Written
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.brake import Proof
from k8s_consul_registrar.registrar.decide import (
    Action,
    AwaitProxy,
    CheckName,
    Conflict,
    Deregister,
    InSync,
    Keep,
    LookUp,
    NameGuard,
    Register,
    Reject,
    Rules,
    Update,
    Withheld,
    decide,
)
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.interfaces import Registry
from k8s_consul_registrar.registrar.observed import (
    Contests,
    Foreign,
    Observed,
    ObservedState,
    object_behind,
    observe,
    with_known_meta,
)
from k8s_consul_registrar.registrar.queue import Batch, WorkQueue
from k8s_consul_registrar.registrar.quota import Quota
from k8s_consul_registrar.registrar.reporter import Reporter
from k8s_consul_registrar.registrar.status import Counts, RegistrarStatus

HIDDEN = "a service that the token may not see"

_Writing: TypeAlias = Register | Update


class Core(msgspec.Struct, frozen=True):
    """The state of a registrar, and what its reconciler, resync and controller share beside it."""

    desired: DesiredState
    observed: ObservedState
    queue: WorkQueue
    registry: Registry
    rules: Rules
    names: NameGuard
    contests: Contests
    reporter: Reporter
    status: RegistrarStatus
    audit: Audit
    quota: Quota | None = None


class CorePart:
    """A part of a registrar that works on its core; `clock` returns seconds."""

    def __init__(self, core: Core, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._desired = core.desired
        self._observed = core.observed
        self._queue = core.queue
        self._registry = core.registry
        self._rules = core.rules
        self._names = core.names
        self._contests = core.contests
        self._reporter = core.reporter
        self._audit = core.audit
        self._quota = core.quota
        self._status = core.status
        self._clock = clock


class _Work(msgspec.Struct):
    """One batch under way: which IDs have no result yet, and what was done so far."""

    left: dict[str, None]
    generation: int
    registered: int = 0
    updated: int = 0
    deregistered: int = 0
    refused: int = 0
    unchanged: int = 0
    in_flight: set[str] = msgspec.field(default_factory=set)


class Reconciler(CorePart):
    """Takes batches from the work queue to Consul.

    In the catalog every write names the version it replaces. On an agent, which knows no versions, a look
    immediately before the write narrows the race with other writers to milliseconds; it cannot close it.
    """

    async def reconcile(self, batch: Batch) -> Counts:
        """Reconcile one batch and return what was done; raises a `ConsulError` when Consul is unavailable.

        Whatever ends it early, each ID of the batch goes back to the queue, and writes without an answer are
        looked up before the next one.
        """
        started = self._clock()
        work = _Work(dict.fromkeys(batch.ids), self._desired.departure_generation)
        try:
            await self._reconcile(work)
        finally:
            for service_id in work.in_flight:
                self._observed.doubt(service_id)
            self._observed.end_write(work.in_flight)
            self._queue.release(work.left, self._clock())
            if self._quota is not None:
                for service_id in self._quota.admitted():
                    self._queue.add(service_id, self._clock())
        counts = Counts(
            work.registered,
            work.updated,
            work.deregistered,
            work.unchanged,
            work.refused,
            seconds=self._clock() - started,
        )
        self._reporter.batch(counts)
        return counts

    async def _reconcile(self, work: _Work) -> None:
        decided = self._decide_all(work, work.left)
        actions = await self._check_names(work, decided)
        actions = await self._look_up(work, actions)
        # A record that was looked up can lead to a name that is new.
        actions = await self._check_names(work, actions)
        await self._write_all(work, actions, Register, "register")
        await self._write_all(work, actions, Update, "update")
        removals = [one for one, action in actions.items() if isinstance(action, Deregister)]
        if actions is not decided or len(removals) < len(actions):
            # The reads and writes before took time, in which an object may have come back.
            actions = self._decide_all(work, removals)
        await self._deregister_all(work, actions)

    # Decisions

    def _decide_all(self, work: _Work, ids: Iterable[str]) -> dict[str, Action]:
        actions = {}
        for service_id in tuple(ids):
            action = self._decide(work, service_id)
            if action is not None and not self._is_settled(work, service_id, action):
                actions[service_id] = action
        return actions

    def _decide(self, work: _Work, service_id: str) -> Action | None:
        """Decide one ID; an error in this program fails that ID only."""
        try:
            observed = self._observed.get(service_id)
            is_contested = self._contests.is_contested(service_id, self._clock())
            asked = self._desired.ask(service_id, observed, is_contested=is_contested)
            action = decide(asked, observed, self._rules)
            return action if self._quota is None else self._quota.apply(action, asked, observed, self._rules)
        except Exception as error:  # noqa: BLE001 - confined to this ID, counted and logged
            self._fail_internally(work, service_id, error)
            return None

    def _is_settled(self, work: _Work, service_id: str, action: Action) -> bool:
        """Take over a decision that needs no request; return whether it was one."""
        losers: tuple[Rejection, ...] = ()
        match action:
            case LookUp() | CheckName() | Register() | Update() | Deregister():
                return False
            case InSync():
                losers = action.losers
                if self._observed.get(service_id) != action.entry:
                    self._observed.put(service_id, action.entry)
                self._desired.settle(service_id, work.generation)
                work.unchanged += 1
            case Conflict() | Withheld():
                self._finish(work, service_id)
                self._report_obstacle(service_id, action)
                return True
            case Reject():
                losers = (action.rejection, *action.losers)
            case Keep() | AwaitProxy():
                losers = action.losers
        self._finish(work, service_id)
        self._reporter.settled(service_id)
        if isinstance(action, AwaitProxy):
            self._status.awaiting_proxy[service_id] = action.target
        if losers:
            self._reporter.lost(service_id, losers)
        return True

    def _report_obstacle(self, service_id: str, action: Conflict | Withheld) -> None:
        if isinstance(action, Conflict):
            self._reporter.conflict(service_id, action)
        elif self._reporter.withheld(service_id, action):
            self._observed.changed(service_id)

    # Reads

    async def _check_names(self, work: _Work, actions: dict[str, Action]) -> dict[str, Action]:
        unchecked = {one: action for one, action in actions.items() if isinstance(action, CheckName)}
        if not unchecked:
            return actions
        for name in dict.fromkeys(action.name for action in unchecked.values()):
            await self._names.check(name)
        decided = self._decide_all(work, unchecked)
        return {one: action for one, action in actions.items() if one not in unchecked} | decided

    async def _look_up(self, work: _Work, actions: dict[str, Action]) -> dict[str, Action]:
        """Read the records that are in doubt and, where writes name no version, all that are to be written."""
        if self._registry.checks_versions:
            ids = [one for one, action in actions.items() if isinstance(action, LookUp)]
        else:
            ids = list(actions)
        if not ids:
            return actions
        generation = self._desired.departure_generation
        found = await self._read(ids)
        for service_id in ids:
            record = found.get(service_id)
            self._take_record(service_id, record)
            if record is None or (isinstance(record, Foreign) and record.holder != HIDDEN):
                self._desired.settle(service_id, generation)
        decided = self._decide_all(work, ids)
        return {one: action for one, action in actions.items() if one not in ids} | decided

    async def _read(self, ids: Sequence[str]) -> dict[str, Observed]:
        """Return what Consul holds under these IDs; one that the token may not see is foreign."""
        found: dict[str, Observed] = {}
        try:
            async for service in self._registry.lookup(ids):
                if service.id in ids:
                    found[service.id] = self._observe(service)
                else:
                    # The catalog ignores the case of IDs.
                    alike = (one for one in ids if one.lower() == service.id.lower())
                    found |= dict.fromkeys(
                        alike, Foreign(f"the service {service.id}, whose ID differs in case")
                    )
        except ConsulFiltered:
            if len(ids) == 1:
                return {ids[0]: Foreign(HIDDEN)}
            for service_id in ids:
                found |= await self._read([service_id])
        return found

    def _observe(self, service: Service) -> Observed:
        is_claimed = service.id in self._desired.claims
        identity, cluster_uid = self._rules.identity, self._desired.cluster_uid
        return observe(service, identity, cluster_uid, keep=not is_claimed)

    def _take_record(self, service_id: str, record: Observed) -> None:
        if record is None and service_id in self._desired.claims:
            self._observed.lose(service_id)
            return
        before = self._observed.get(service_id)
        record = self._contests.compare(service_id, before, record, self._rules.identity, self._clock())
        self._observed.put(service_id, with_known_meta(record, before))

    # Writes

    async def _write_all(
        self, work: _Work, actions: dict[str, Action], kind: type[_Writing], verb: str
    ) -> None:
        writes = {one: action for one, action in actions.items() if isinstance(action, kind)}
        services: list[Service] = []
        for service_id, action in writes.items():
            try:
                services.append(action.entry.service(self._rules.identity))
            except Exception as error:  # noqa: BLE001 - confined to this ID, counted and logged
                self._fail_internally(work, service_id, error)
        written = await self._send(work, services, self._registry.register)
        done = 0
        failed = {failure.id: failure.problem for failure in written.failures}
        for service in services:
            action = writes[service.id]
            if not self._is_written(work, service.id, written, failed, verb):
                continue
            done += 1
            entry = action.entry
            index = written.indexes.get(service.id, 0)
            if entry.version != index:
                entry = type(entry)(entry.target, entry.shard, entry.cluster_uid, index)
            self._observed.put(service.id, entry)
            self._desired.settle(service.id, work.generation)
            self._finish(work, service.id, was_written=True)
            self._reporter.settled(service.id)
            if action.losers:
                self._reporter.lost(service.id, action.losers)
        if verb == "register":
            work.registered += done
        else:
            work.updated += done
        if services:
            self._reporter.wrote(verb, [(one.id, writes[one.id].entry.target) for one in services], written)

    async def _deregister_all(self, work: _Work, actions: dict[str, Action]) -> None:
        removals = {one: action for one, action in actions.items() if isinstance(action, Deregister)}
        if not removals:
            return
        services = [Service(one.id, one.name, "", 0, index=one.version) for one in removals.values()]
        proofs = {one.id: self._proof(one.id) for one in services}

        async def remove(some: Sequence[Service]) -> Written:
            return await self._audit.remove(self._registry.deregister, some, proofs)

        written = await self._send(work, services, remove)
        failed = {failure.id: failure.problem for failure in written.failures}
        for service in services:
            if self._is_written(work, service.id, written, failed, "deregister"):
                self._reporter.removed(service.id, self._observed.get(service.id), proofs[service.id])
                self._observed.put(service.id, None)
                self._desired.settle(service.id, work.generation)
                self._finish(work, service.id, was_written=True)
                self._reporter.settled(service.id)
                work.deregistered += 1
        if services:
            self._reporter.wrote("deregister", [(one.id, None) for one in services], written)

    def _proof(self, service_id: str) -> Proof:
        """Return the proof that a service may go which was decided to be removed."""
        proof = None if self._quota is None else self._quota.proof(service_id)
        return proof or self._desired.proof(service_id, object_behind(self._observed.get(service_id)))

    async def _send(
        self,
        work: _Work,
        services: Sequence[Service],
        write: Callable[[Sequence[Service]], Awaitable[Written]],
    ) -> Written:
        """Make writes; an error in this program that one service causes fails that service only."""
        if not services:
            return Written()
        ids = [service.id for service in services]
        self._observed.begin_write(ids)
        work.in_flight.update(ids)
        try:
            written = await write(services)
        except ConsulError:
            raise
        except Exception as error:  # noqa: BLE001 - confined to one ID, counted and logged
            if len(services) > 1:
                written = Written()
                for service in services:
                    written += await self._send(work, [service], write)
            else:
                self._reporter.internal_error(f"write of {ids[0]}", error)
                written = Written(failures=(WriteFailure(ids[0], f"internal error: {type(error).__name__}"),))
        return written

    def _is_written(
        self, work: _Work, service_id: str, written: Written, failed: dict[str, str], verb: str
    ) -> bool:
        """Record that a write was answered; return whether it was made."""
        work.in_flight.discard(service_id)
        self._observed.end_write((service_id,))
        is_stale = service_id in written.stale
        if service_id not in failed and not is_stale:
            return True
        work.refused += 1
        self._observed.doubt(service_id)
        if is_stale:
            self._contests.lost_race(service_id, self._clock())
        else:
            self._reporter.refused(verb, service_id, failed[service_id])
        work.left.pop(service_id)
        self._queue.retry(service_id, self._clock())
        return False

    # Results

    def _finish(self, work: _Work, service_id: str, *, was_written: bool = False) -> None:
        now = self._clock()
        del work.left[service_id]
        if self._status.awaiting_proxy:
            self._status.awaiting_proxy.pop(service_id, None)
        heard_at = self._queue.done(service_id, now, was_written=was_written)
        if heard_at is not None and was_written:
            self._reporter.lag(now - heard_at)

    def _fail_internally(self, work: _Work, service_id: str, error: Exception) -> None:
        self._reporter.internal_error(f"decision about {service_id}", error)
        work.left.pop(service_id, None)
        self._queue.retry(service_id, self._clock())
