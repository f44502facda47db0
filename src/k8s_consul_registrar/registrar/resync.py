"""Resync: compares everything Consul holds with the desired state, and queues each ID that differs."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.asyncio_tools import in_slices
from k8s_consul_registrar.model import UNSYNCED, Service
from k8s_consul_registrar.registrar.absences import Absences, Findings, Judged
from k8s_consul_registrar.registrar.brake import Ground
from k8s_consul_registrar.registrar.decide import Deregister, Infer, Keep, Kept, Withheld, decide
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.observed import (
    AsDesired,
    Foreign,
    Observed,
    Other,
    observe,
    with_known_meta,
)
from k8s_consul_registrar.registrar.queue import Priority
from k8s_consul_registrar.registrar.quota import Quota
from k8s_consul_registrar.registrar.reconciler import Core, CorePart
from k8s_consul_registrar.registrar.status import Counts

# Services compared between two turns of the event loop.
SLICE = 50


class Comparison(NamedTuple):
    """Result of comparing everything: IDs to write, IDs to remove, and what stays.

    `differing` are desired IDs that are not known to be as desired, `unchanged` is how many are. `kept` counts
    services that nothing asks for and that stay, by reason. `read_seconds` is how long the read of Consul took,
    None without one.
    """

    read_seconds: float | None
    unchanged: int
    differing: list[str]
    removals: list[str]
    kept: Counter[Kept]
    judged: Judged


class _Reading(msgspec.Struct):
    """A read of everything: what another writer may have changed, and the IDs whose records are new.

    `has_led` is True if this replica has led since the last read. If not, another replica or an earlier process
    wrote what is found, and that is no contest.
    """

    has_led: bool
    changed: dict[str, Observed] = msgspec.field(default_factory=dict)
    differing: list[str] = msgspec.field(default_factory=list)


class Resync(CorePart):
    """Reads everything at this registrar's place in Consul; writes nothing itself."""

    def __init__(
        self,
        core: Core,
        absences: Absences,
        *,
        id_prefix: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(core, clock=clock)
        self._quota = core.quota
        self._absences = absences
        self._id_prefix = id_prefix

    async def read(self) -> float:
        """Read everything into the observed state; return how many seconds that took. Raises a `ConsulError`."""
        started = self._clock()
        generation = self._desired.departure_generation
        is_first = not self._observed.is_complete
        reading = _Reading(has_led=not is_first and not self._status.is_standby)
        self._names.begin()
        self._observed.begin_read()
        try:
            async for service in self._registry.services():
                self._take_record(service, reading)
            lost_shards = await self._registry.lost_shards() if is_first else {}
        except BaseException:
            self._observed.drop_read()
            raise
        before = {one: self._observed.get(one) for one in reading.changed}
        self._observed.is_filtered = self._registry.is_filtered
        touched = self._observed.finish_read(lost_shards, self._desired.claims.__contains__)
        for service_id in reading.differing:
            self._observed.changed(service_id)
        self._names.finish()
        self._warn_of_prefix()
        now = self._clock()
        self._contests.prune(now)
        for service_id, record in reading.changed.items():
            if reading.has_led and service_id not in touched:
                self._contests.compare(service_id, before[service_id], record, self._rules.identity, now)
        self._desired.settle_by_read(generation)
        for service_id in touched:
            if not self._registry.checks_versions:
                # Another writer may have come after us; without versions only a look shows it.
                self._observed.doubt(service_id)
            self._queue.add(service_id, now, Priority.BULK)
        return now - started

    async def compare(self, *, reads: bool = True) -> Comparison:
        """Read everything and compare it with the desired state; raises a `ConsulError`.

        Without `reads` what was read before is compared, if there is any.
        """
        while self._desired.hand_down():  # noqa: ASYNC110 - gives way between slices
            await asyncio.sleep(0)
        self._desired.has_absences = False
        read_seconds = None
        if reads or not self._observed.is_complete:
            read_seconds = await self.read()
        noticed_at = self._clock()
        unchanged, differing = await self._compare_claims()
        findings, removals, kept = await self._examine_unclaimed()
        if self._quota is not None:
            findings.over_quota = await self._quota.find_over(self._rules)
        judged = await self._absences.judge(findings, noticed_at)
        return Comparison(read_seconds, unchanged, differing, removals, kept, judged)

    async def run(self, *, reads: bool = True) -> Comparison:
        """Compare everything as `compare` does, and queue each ID that differs; raises a `ConsulError`."""
        started = self._clock()
        found = await self.compare(reads=reads)
        for service_id in found.differing:
            self._queue.add(service_id, self._clock(), Priority.BULK)
        release(found.judged, self._desired, self._quota)
        removals = [*found.removals, *found.judged.released]
        removals = [one for one in removals if not self._queue.backs_off(one)]
        self._queue.add_after(removals, found.differing, self._clock(), Priority.REMOVAL)
        for service_id in () if self._quota is None else (*self._quota.admitted(), *self._quota.leaving()):
            self._queue.add(service_id, self._clock(), Priority.BULK)
        rejections = tuple(self._desired.rejections.values())
        counts = Counts(
            unchanged=found.unchanged,
            rejected=len(rejections),
            held=sum(len(one.ids) for one in found.judged.held),
            kept=found.kept.total(),
            seconds=self._clock() - started,
        )
        self._reporter.keep_conflicts(self._desired.claims)
        self._reporter.keep_withheld(lambda service_id: self._observed.get(service_id) is not None)
        was_read = found.read_seconds is not None
        self._reporter.resynced(
            counts, was_read=was_read, kept=found.kept, held=found.judged.held, rejections=rejections
        )
        return found

    def _take_record(self, service: Service, reading: _Reading) -> None:
        known = self._observed.get(service.id)
        if isinstance(known, AsDesired) and (same := self._as_written(known, service)) is not None:
            self._observed.read(service.id, same)
            return
        # A leader takes over what is as desired by a decision, which ends what was reported about it.
        entry = self._expected(service) if self._status.is_standby else None
        if entry is not None and self._as_written(entry, service) is not None:
            self._observed.read(service.id, entry)
            reading.differing.append(service.id)
            return
        is_claimed = service.id in self._desired.claims
        record: Observed = observe(
            service, self._rules.identity, self._desired.cluster_uid, keep=not is_claimed
        )
        if isinstance(record, Foreign):
            self._names.saw(service)
            if not is_claimed:
                return
        if isinstance(known, AsDesired) and isinstance(record, Other):
            reading.changed[service.id] = record
        record = with_known_meta(record, known)
        if not is_alike(record, known):
            reading.differing.append(service.id)
        self._observed.read(service.id, record)

    def _as_written(self, known: AsDesired, service: Service) -> AsDesired | None:
        """Return the record of a service that is as it is known to be, the usual case; None of another."""
        is_another_cluster = known.cluster_uid and self._desired.cluster_uid not in ("", known.cluster_uid)
        is_same = not is_another_cluster and service == known.service(self._rules.identity)
        if not is_same or service.index == UNSYNCED:
            return None
        if service.index == known.version:
            return known
        return AsDesired(known.target, known.shard, known.cluster_uid, service.index)

    def _expected(self, service: Service) -> AsDesired | None:
        """Return the record that a service has if it is as its only target wants it; None without one."""
        claims = self._desired.claims.get(service.id, ())
        if len(claims) != 1:
            return None
        try:
            shard = self._rules.shards.choose(service.id, service.value("shard_path"))
        except Exception:  # noqa: BLE001 - the decision about this ID meets it again, and reports it
            return None
        cluster_uid = self._desired.cluster_uid or service.value("cluster_uid")
        return AsDesired(claims[0], shard, cluster_uid, service.index)

    def _warn_of_prefix(self) -> None:
        """Say at the start that the ID prefix differs only in case from one that is in use."""
        prefix, self._id_prefix = self._id_prefix, ""
        if not prefix:
            return
        for service_id in self._observed.ids():
            if not service_id.startswith(prefix) and service_id.lower().startswith(prefix.lower()):
                self._reporter.prefix_differs_in_case(prefix, service_id)
                return

    async def _compare_claims(self) -> tuple[int, list[str]]:
        """Return how many desired IDs are known to be as desired, and the others."""
        unchanged = 0
        differing: list[str] = []
        async for service_id in in_slices(tuple(self._desired.claims), SLICE):
            claims = self._desired.claims.get(service_id, ())
            record = self._observed.get(service_id)
            if len(claims) == 1 and isinstance(record, AsDesired) and record.target == claims[0]:
                unchanged += 1
            elif claims:
                differing.append(service_id)
        return unchanged, differing

    async def _examine_unclaimed(self) -> tuple[Findings, list[str], Counter[Kept]]:
        """Find what nothing asks for: what may go as a fact, what is only absent, and what stays and why."""
        findings = Findings()
        removals: list[str] = []
        kept: Counter[Kept] = Counter()
        async for service_id in in_slices(self._observed.ids(), SLICE):
            record = self._observed.get(service_id)
            if not isinstance(record, (AsDesired, Other)):
                continue
            key = record.target.key if isinstance(record, AsDesired) else record.key
            kind = record.target.key.kind if isinstance(record, AsDesired) else record.kind
            source = self._desired.source_of(kind, key)
            if source is not None:
                findings.held[source] += 1
            if service_id in self._desired.claims:
                continue
            match decide(self._desired.ask(service_id, record), record, self._rules):
                case Deregister() | Withheld():
                    removals.append(service_id)
                case Keep(reason=reason):
                    kept[reason] += 1
                case Infer() if source is not None:
                    findings.add(service_id, source, record)
        return findings, removals, kept


def release(judged: Judged, desired: DesiredState, quota: Quota | None) -> None:
    """Let services go that the brake released."""
    for service_id, key in judged.released.items():
        proof = judged.proofs[service_id]
        if quota is not None and proof.ground is Ground.QUOTA:
            quota.release(service_id, proof)
        else:
            desired.depart(service_id, key, proof)


def is_alike(one: Observed, other: Observed) -> bool:
    """Return True if two records are the same but for their versions."""
    if isinstance(one, AsDesired) and isinstance(other, AsDesired):
        is_same_place = one.shard == other.shard and one.cluster_uid == other.cluster_uid
        return one.target is other.target and is_same_place
    return one == other
