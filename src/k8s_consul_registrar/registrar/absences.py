"""Absent objects: an absence becomes a fact only by a read that began after it was noticed.

Many absences at once may come of other settings, so the selection of each run is recorded.
"""

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.errors import ClusterError, ConsulBusy, ConsulError, ConsulFenced, ConsulUnreachable
from k8s_consul_registrar.kube.source_state import Failed
from k8s_consul_registrar.model import Kind, ObjectKey, Rejection, Source, Target
from k8s_consul_registrar.registrar.brake import (
    Absence,
    BrakeRules,
    Ground,
    Held,
    Memory,
    Proof,
    SourceAbsences,
    judge,
)
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.interfaces import ClusterReader
from k8s_consul_registrar.registrar.observed import AsDesired, Other, inherited_by
from k8s_consul_registrar.telemetry import get_logger

# Objects that one resync asks for by name; more are confirmed by one new list.
MOST_BY_NAME = 100
# A source that was never listed and has failed for this many seconds is no longer waited for.
PATIENCE_WITH_FAILED = 60.0
# Seconds until objects that could not be asked for by name are asked for again.
RETRY_UNCONFIRMED = 30.0
# Seconds until a source is listed again whose list lacks an object that exists.
RELIST_WRONG = 5.0

log = get_logger("selection")


class Candidate(NamedTuple):
    """A service whose object the Store does not have."""

    id: str
    source: Source
    key: ObjectKey | None
    version: int
    cluster_uid: str
    node: str


class Findings(msgspec.Struct):
    """The absences of one resync: candidates, and how many services of each source there are.

    `over_quota` are targets that have a service and are too many for their namespace, the youngest first.
    """

    candidates: list[Candidate] = msgspec.field(default_factory=list)
    over_quota: list[Target] = msgspec.field(default_factory=list)
    held: defaultdict[Source, int] = msgspec.field(default_factory=lambda: defaultdict(int))

    def add(self, service_id: str, source: Source, record: AsDesired | Other) -> None:
        """Note a service whose object is absent from its source."""
        key = record.target.key if isinstance(record, AsDesired) else record.key
        node = inherited_by(record).node
        self.candidates.append(Candidate(service_id, source, key, record.version, record.cluster_uid, node))


class Judged(NamedTuple):
    """Services that may go with their objects, what the brake holds, and when to judge again.

    `proofs` say why each of the former may go, `again_at` is in monotonic seconds. `relisting` are the sources of
    which a new list was asked for: its end is a reason to judge again.
    """

    released: Mapping[str, ObjectKey | None]
    held: tuple[Held, ...]
    again_at: float | None = None
    relisting: frozenset[Source] = frozenset()
    proofs: Mapping[str, Proof] = MappingProxyType({})


class Absences:
    """Confirms absences, by name or by a new list, and asks the brake which may be acted on."""

    def __init__(
        self,
        desired: DesiredState,
        cluster: ClusterReader,
        rules: BrakeRules,
        *,
        is_same_selection: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desired = desired
        self._cluster = cluster
        self._rules = rules
        self._is_same_selection = is_same_selection
        self._clock = clock
        self._memory = Memory()
        self._began_at = clock()
        # When each candidate was first noticed, and in which version of its record.
        self._noticed_at: dict[str, tuple[float, int]] = {}

    async def judge(self, findings: Findings, noticed_at: float) -> Judged:
        """Confirm and judge the candidates of a comparison that began at `noticed_at` (monotonic seconds), after Consul was read."""
        self._remember(findings.candidates, noticed_at)
        keys = dict.fromkeys(one.key for one in findings.candidates if one.key is not None)
        was_asked = len(keys) <= MOST_BY_NAME
        by_name = await self._ask_by_name(keys) if was_asked else {}
        gone_nodes = await self._gone_nodes(findings.candidates) if by_name else frozenset()
        absent: defaultdict[Source, dict[str, Absence]] = defaultdict(dict)
        facts: dict[str, ObjectKey | None] = {}
        unconfirmed: list[Candidate] = []
        for one in findings.candidates:
            answer = None if one.key is None else by_name.get(one.key)
            answer = None if answer is None else answer.about(one.id)
            if answer is not None and answer.is_rejected:
                continue
            if answer is not None and answer.asks_otherwise(one.id):
                facts[one.id] = one.key
            elif answer is not None and answer.is_selected:
                # The object is there, and asks for the ID: its list was wrong.
                unconfirmed.append(one)
                self._cluster.relist(one.source, self._clock() + RELIST_WRONG)
            elif (absence := self._absence(one, answer, gone_nodes, was_asked=was_asked)) is not None:
                absent[one.source][one.id] = absence
            else:
                unconfirmed.append(one)
        for target in findings.over_quota:
            if (source := self._desired.source_of(target.key.kind, target.key)) is not None:
                absent[source][target.id] = Absence(noticed_at, is_unselected=True, ground=Ground.QUOTA)
        now = self._clock()
        missing = Counter(one.source for one in unconfirmed)
        statuses = self._desired.store.statuses()
        judgement = judge(
            {
                source: SourceAbsences(
                    absent[source],
                    findings.held[source],
                    is_empty=self._is_empty(source),
                    unconfirmed=missing[source],
                )
                for source, status in statuses.items()
                if status.proves_absence
            },
            self._memory,
            self._rules,
            now,
            unready=self._unready_kinds(now),
        )
        self._memory = judgement.memory
        released = {one.id: one.key for one in findings.candidates if one.id in judgement.released}
        over = {one.id: one.key for one in findings.over_quota if one.id in judgement.released}
        listed = {one.source for one in findings.candidates if one.key is None or len(keys) > MOST_BY_NAME}
        again_at = self._ask_again(judgement.held, unconfirmed, listed)
        relisting = frozenset({one.source for one in unconfirmed} & listed)
        proofs = {one: Proof(Ground.LIST) for one in facts}
        proofs |= {one: Proof(Ground.ABSENCE, brake=judgement.verdicts[one]) for one in released}
        proofs |= {one: Proof(Ground.QUOTA, 0, judgement.verdicts[one], key) for one, key in over.items()}
        return Judged(facts | released | over, judgement.held, again_at, relisting, proofs)

    def _remember(self, candidates: Iterable[Candidate], noticed_at: float) -> None:
        before = self._noticed_at
        self._noticed_at = {}
        for one in candidates:
            known = before.get(one.id)
            self._noticed_at[one.id] = (
                known if known and known[1] == one.version else (noticed_at, one.version)
            )

    def _absence(
        self, one: Candidate, answer: "_Answer | None", gone_nodes: frozenset[str], *, was_asked: bool
    ) -> Absence | None:
        """Return a candidate's confirmed absence, None if nothing confirms it yet.

        Where a read by name failed a list confirms it too, but cannot tell a deleted object from an unselected one.
        """
        if answer is not None:
            is_node_gone = bool(one.node) and one.node in gone_nodes
            is_proven = is_node_gone or (self._is_same_selection() and not self._is_empty(one.source))
            return Absence(
                answer.asked_at,
                # In another cluster neither the object nor its Node would exist.
                is_proven_at_start=is_proven and self._is_same_cluster(one) and not answer.exists,
                is_unselected=answer.exists,
            )
        lists = [
            self._desired.store.status(needed).list_began_at
            for needed in self._desired.gate.needed(one.source)
        ]
        began_at = min(-math.inf if at is None else at for at in lists)
        if began_at >= self._noticed_at[one.id][0]:
            is_outside = one.key is not None and (
                self._cluster.is_excluded(one.key) or self._desired.gate.is_shut(one.key.namespace)
            )
            is_unselected = is_outside or (was_asked and one.key is not None)
            return Absence(began_at, is_unselected=is_unselected)
        return None

    def _is_empty(self, source: Source) -> bool:
        return not all(self._desired.store.status(one).objects for one in self._desired.gate.needed(source))

    def _is_same_cluster(self, one: Candidate) -> bool:
        return bool(one.cluster_uid) and one.cluster_uid == self._desired.cluster_uid

    async def _ask_by_name(self, keys: Iterable[ObjectKey]) -> dict[ObjectKey, "_Answer"]:
        answers: dict[ObjectKey, _Answer] = {}
        for key in keys:
            asked_at = self._clock()
            try:
                item = await self._cluster.read_object(key)
            except ClusterError:
                # What cannot be asked is not confirmed; the next resync asks again.
                continue
            if item is None:
                answers[key] = _Answer(asked_at)
                continue
            resolved = self._desired.resolved(item)
            is_rejected = isinstance(resolved, Rejection)
            try:
                is_selected = await self._cluster.is_selected(key)
            except ClusterError:
                continue
            ids = resolved if isinstance(resolved, tuple) else ()
            answers[key] = _Answer(
                asked_at,
                exists=True,
                is_rejected=is_rejected,
                is_selected=is_selected,
                ids=frozenset(target.id for target in ids),
                is_service=key.kind is Kind.ENDPOINT and resolved is not None,
            )
        return answers

    async def _gone_nodes(self, candidates: Iterable[Candidate]) -> frozenset[str]:
        """Return the Nodes of absent Pods that the API server says are deleted."""
        source = Source(Kind.NODE)
        status = self._desired.store.statuses().get(source)
        if status is None or not status.proves_absence:
            return frozenset()
        keys = {
            ObjectKey(Kind.NODE, "", one.node)
            for one in candidates
            if one.source.kind is Kind.POD and one.node
        }
        missing = {key for key in keys if self._desired.store.get(key) is None}
        answers = await self._ask_by_name(sorted(missing))
        return frozenset(key.name for key, answer in answers.items() if not answer.exists)

    def _unready_kinds(self, now: float) -> frozenset[Kind]:
        """Return the kinds of which a source was neither listed yet nor failed for long."""
        unready = set()
        for source, status in self._desired.store.statuses().items():
            if status.listed_at is not None:
                continue
            since = status.state.since if isinstance(status.state, Failed) else self._clock()
            if now - since < PATIENCE_WITH_FAILED:
                unready.add(Kind.ENDPOINT if source.kind is Kind.SERVICE else source.kind)
        return frozenset(unready)

    def _ask_again(
        self, held: Iterable[Held], unconfirmed: Iterable[Candidate], listed: Container[Source]
    ) -> float | None:
        """Have what is not settled confirmed again: ask for new lists, whose end wakes us, or return when.

        `listed` are the sources whose absences only a list can confirm.
        """
        now = self._clock()
        dues: dict[Source, float] = {}
        for one in held:
            dues[one.source] = min(one.due, dues.get(one.source, one.due))
        waits: list[float] = []
        for source in {one.source for one in unconfirmed}:
            if source in listed:
                self._cluster.relist(source, now)
            else:
                waits.append(now + RETRY_UNCONFIRMED)
        for source, due in dues.items():
            if source in listed:
                self._cluster.relist(source, due)
            else:
                waits.append(due)
        if self._unready_kinds(now):
            waits.append(now + PATIENCE_WITH_FAILED)
        return min(waits, default=None)


class _Answer(NamedTuple):
    """An object asked for by name: when, whether it exists and is selected, and which service IDs it asks for.

    `is_service` is True for an annotated Service, of whose endpoints each exists or not.
    """

    asked_at: float
    exists: bool = False
    is_rejected: bool = False
    is_selected: bool = False
    ids: frozenset[str] = frozenset()
    is_service: bool = False

    def about(self, service_id: str) -> "_Answer":
        """Return what the answer says of one service: an endpoint that its Service lacks does not exist."""
        if self.is_service and service_id not in self.ids:
            return _Answer(self.asked_at)
        return self

    def asks_otherwise(self, service_id: str) -> bool:
        """Return whether the object exists and does not ask for an ID: a fact."""
        return self.exists and not self.is_rejected and service_id not in self.ids


class SelectionRecord:
    """Compares our selection with that of the run that wrote the services, and records ours.

    The earlier one is known from the catalog's node, or from HTTP_SD_STATE_FILE: `saved_cluster_uid` is the
    cluster that a file written under our own selection is about, empty if there is none. Our own selection is
    recorded only once everything was written under it and the brake holds nothing: services that it holds
    were written under the earlier one.
    """

    def __init__(
        self,
        digest: str,
        *,
        catalog: CatalogRegistry | None,
        cluster_uid: Callable[[], str],
        saved_cluster_uid: str = "",
    ) -> None:
        self.digest = digest
        self._catalog = catalog
        self._cluster_uid = cluster_uid
        self._saved_cluster_uid = saved_cluster_uid
        self._is_settled = False

    def is_same(self) -> bool:
        """Return whether the services are known to have been written under our selection."""
        if self._catalog is not None and self._catalog.recorded_selection:
            return self._catalog.recorded_selection == self.digest
        return bool(self._saved_cluster_uid) and self._saved_cluster_uid == self._cluster_uid()

    @property
    def is_settled(self) -> bool:
        """True if every service is one of our selection."""
        return self._is_settled or self.is_same()

    async def keep(self, *, is_settled: Callable[[], bool], timing: Timing) -> None:
        """Record our selection once, as soon as every service is one of it."""
        retry = delays(timing.retry_first, timing.retry_cap)
        while True:
            while not is_settled():  # noqa: ASYNC110 - it is over in a few seconds, or in minutes
                await asyncio.sleep(timing.retry_first)
            self._is_settled = True
            if self._catalog is None:
                return
            try:
                if await self._catalog.record_selection():
                    log.info("recorded the selection at the catalog's node", selection=self.digest)
            except (ConsulUnreachable, ConsulBusy, ConsulFenced):
                await asyncio.sleep(next(retry))
            except ConsulError as error:
                # Without a record the next start only waits longer before it removes much.
                log.warning("the selection cannot be recorded", problem=str(error))
                return
            else:
                return
