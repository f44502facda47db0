"""The registrar as its admin endpoints show it: desired and observed state joined into rows, and counted."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from k8s_consul_registrar.admin.index import Index, IndexRules
from k8s_consul_registrar.consul.codec import MetaKeys
from k8s_consul_registrar.errors import Note, Reason
from k8s_consul_registrar.kube.source_state import CAUSES, SourceStatus, WatchStats
from k8s_consul_registrar.model import USUAL_KINDS, Kind, ObjectKey, Rejection, Service, Source, Target
from k8s_consul_registrar.registrar.decide import Rules, Standing
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.metrics import WRITE_VERBS, Figures
from k8s_consul_registrar.registrar.observed import AsDesired, ObservedState, Other, inherited_by
from k8s_consul_registrar.registrar.service_join import Winner
from k8s_consul_registrar.registrar.status import Progress, RegistrarStatus
from k8s_consul_registrar.targets.meta import keep_inherited
from k8s_consul_registrar.targets.service_names import HashShards

# Seconds that what is saved or written for the first time waits for Consul.
CONSUL_PATIENCE = 30.0


class TargetState(StrEnum):
    """The state of a target in Consul."""

    REGISTERED = "registered"
    PENDING = "pending"  # not written yet
    REFUSED = "refused"  # Consul refuses the write
    CONFLICT = "conflict"  # something not ours holds the ID
    STANDBY = "standby"  # another replica leads and writes
    KEPT = "kept"  # nothing asks for it now, and nothing proves that it may go
    WITHHELD = "withheld"  # POLICY does not allow the write
    BLOCKED = "blocked"  # its namespace has as many targets as it may have
    UNWANTED = "unwanted"  # it may go, and is not removed yet, or POLICY does not allow that


# The states of what is no target: it is in no document of service discovery.
NO_TARGET = frozenset({TargetState.BLOCKED, TargetState.UNWANTED})


class TargetRow(NamedTuple):
    """A target and its state; `detail` gives the reason where there is one.

    `service` is what Consul holds or is to hold, with meta keys as the registrar names them.
    """

    service: Service
    key: ObjectKey
    state: TargetState
    detail: str = ""

    @property
    def is_target(self) -> bool:
        """True if collectors are to scrape it."""
        return self.state not in NO_TARGET


# The kinds of target that need a source of another kind.
_NEEDED_BY = {Kind.SERVICE: (Kind.ENDPOINT,), Kind.NAMESPACE: (Kind.POD, Kind.ENDPOINT)}


@dataclass(frozen=True, slots=True)
class Scope:
    """The kinds and namespaces of a request; an empty set stands for all of them.

    The namespace of a Node is empty.
    """

    kinds: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset()

    def includes(self, source: Source) -> bool:
        """Return True if a source can show an object of this scope, or decides about one."""
        if self.kinds.isdisjoint(_NEEDED_BY.get(source.kind, (source.kind,))) and self.kinds:
            return False
        if not self.namespaces:
            return True
        if source.kind is not Kind.NODE and not source.namespace:
            return bool(self.namespaces - {""})
        return source.namespace in self.namespaces


EVERYTHING = Scope()


@dataclass(frozen=True, slots=True)
class About:
    """Names and settings of a registrar, as anyone may see them; `consul` is Consul's address.

    `backend_reason` tells why `auto` chose the backend.
    """

    cluster: str
    instance: str
    backend: str
    consul: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    started_at: float = field(default_factory=time.time)  # seconds of the epoch
    backend_reason: str = ""


class Owner(NamedTuple):
    """The registrar that targets belong to; `cluster_uid` is empty while it is unknown."""

    cluster: str
    instance: str = ""
    cluster_uid: str = ""


class Targets(Protocol):
    """Targets that can be rendered."""

    @property
    def generation(self) -> int:
        """A number that changes whenever `targets` would yield anything else."""

    def targets(self) -> Iterator[TargetRow]:
        """Yield every target, each ID once.

        The iterator stays valid while targets come and go between two of its steps. It may show a target as
        it was or as it is; `generation` has then moved on.
        """

    @property
    def position(self) -> int:
        """A number that grows whenever a service of `targets` may have changed, whatever its state."""

    def changed_since(self, position: int) -> AbstractSet[str] | None:
        """Return the IDs whose targets may have changed since a position; None if not all of them are known."""

    def row(self, service_id: str) -> TargetRow | None:
        """Return the target of an ID, None if there is none."""


class SavedTargets(Targets, Protocol):
    """The targets that an earlier process saved."""

    @property
    def cluster_uid(self) -> str:
        """The UID of their cluster, empty if it was unknown."""

    @property
    def since(self) -> float:
        """The time until which they were up to date, in seconds of the epoch."""


class TargetsView(Targets, Protocol):
    """The targets of a registrar."""

    @property
    def owner(self) -> Owner:
        """The registrar that they belong to."""

    @property
    def meta_keys(self) -> MetaKeys:
        """The meta keys that have another name in Consul."""

    def unlisted(self, scope: Scope = EVERYTHING) -> str:
        """Name the sources of a scope that were never listed in this process, and why; empty if all were."""


class RegistrarView(TargetsView, Protocol):
    """Everything the status page shows of a registrar."""

    @property
    def about(self) -> About:
        """Names and settings."""

    @property
    def status(self) -> RegistrarStatus:
        """The registrar at this moment."""

    def sources(self) -> Mapping[Source, SourceStatus]:
        """Return how well each source is known."""

    def rejections(self) -> Sequence[Rejection]:
        """Return every object that asks to be scraped and cannot be."""

    def leader(self) -> str | None:
        """Name the replica that leads; None where there is no election."""


def no_election() -> None:
    """Name no leader: this registrar always writes."""


@dataclass(frozen=True, slots=True)
class View:
    """The view of a running registrar; nothing is copied before it is asked for."""

    about: About
    desired: DesiredState
    observed: ObservedState
    status: RegistrarStatus
    rules: Rules
    meta_keys: MetaKeys = field(default_factory=MetaKeys)
    leader: Callable[[], str | None] = no_election

    @property
    def generation(self) -> int:
        """A number that changes whenever `targets` would yield anything else."""
        state = self.status
        odd = hash((frozenset(state.refused), frozenset(state.conflicts), state.is_standby))
        waits = (len(state.awaiting_proxy), state.withheld_changes)
        return hash((self.desired.generation, self.observed.generation, odd, waits))

    @property
    def owner(self) -> Owner:
        """The registrar that the targets belong to."""
        return Owner(self.about.cluster, self.about.instance, self.desired.cluster_uid)

    def sources(self) -> Mapping[Source, SourceStatus]:
        """Return how well each source is known."""
        return self.desired.store.statuses()

    def unlisted(self, scope: Scope = EVERYTHING) -> str:
        """Name the sources of a scope that were never listed in this process, and why; empty if all were."""
        missing = [
            f"{source} are not listed yet{': ' if status.problem else ''}{status.problem}"
            for source, status in self.sources().items()
            if status.listed_at is None and scope.includes(source)
        ]
        return "; ".join(missing)

    def targets(self) -> Iterator[TargetRow]:
        """Yield every target, each ID once."""
        claims = self.desired.claims
        for service_id in tuple(claims):
            if asking := claims.get(service_id):
                yield self._row(service_id, min(asking, key=lambda target: target.rank))
        yield from self._kept()

    @property
    def position(self) -> int:
        """A number that grows whenever a service of `targets` may have changed, whatever its state."""
        return self.observed.generation

    def changed_since(self, position: int) -> AbstractSet[str] | None:
        """Return the IDs whose targets may have changed since a position; None if not all of them are known."""
        return self.observed.changed_since(position)

    def row(self, service_id: str) -> TargetRow | None:
        """Return the target of an ID, None if there is none."""
        if asking := self.desired.claims.get(service_id):
            return self._row(service_id, min(asking, key=lambda target: target.rank))
        return self._kept_row(service_id)

    def states(self) -> Iterator[tuple[str, str]]:
        """Yield kind and state of each of `targets`, at a tenth of the cost."""
        claims = self.desired.claims
        for service_id in tuple(claims):
            if asking := claims.get(service_id):
                yield asking[0].key.kind.value, self._state(service_id).value
        for row in self._kept():
            yield row.key.kind.value, row.state.value

    def rejections(self) -> list[Rejection]:
        """Return every object that asks to be scraped and cannot be."""
        return [*self.desired.rejections.values(), *self.status.lost_rejections()]

    def progress(self) -> Progress | None:
        """Return how far the first sync is, None once it is done."""
        if self.status.has_synced:
            return None
        sources = self.sources().values()
        return Progress(
            listed=sum(one.objects for one in sources),
            is_listed=all(one.listed_at is not None for one in sources),
            targets=len(self.desired.claims),
            registered=self.observed.registered,
            rejected=len(self.desired.rejections),
        )

    def _row(self, service_id: str, target: Target) -> TargetRow:
        status, record = self.status, self.observed.get(service_id)
        state = self._state(service_id)
        if isinstance(record, AsDesired) and state is TargetState.REGISTERED:
            return TargetRow(record.service(self.rules.identity), record.target.key, state)
        detail = status.withheld.get(service_id, "")
        if service_id in status.conflicts:
            detail = f"held by {status.conflicts[service_id].holder}"
        elif service_id in status.refused:
            detail = status.refused[service_id]
        elif service_id in status.awaiting_proxy:
            detail = "stays at the Pod's own address until the proxy serves Pods"
        return TargetRow(self._expected(service_id, target), target.key, state, detail)

    def _kept(self) -> Iterator[TargetRow]:
        """Yield the services that nothing asks for and that may not go yet."""
        for service_id in self.observed.ids():
            if service_id not in self.desired.claims and (row := self._kept_row(service_id)) is not None:
                yield row

    def _kept_row(self, service_id: str) -> TargetRow | None:
        record = self.observed.get(service_id)
        if isinstance(record, AsDesired):
            service, key = record.service(self.rules.identity), record.target.key
        elif isinstance(record, Other) and record.service is not None and record.kind is not None:
            service, key = record.service, record.key or ObjectKey(record.kind, "", service_id)
        else:
            return None
        is_gone = self.desired.ask(service_id, record).standing is Standing.DEPARTED
        is_unwanted = is_gone or service_id in self.status.withheld
        return TargetRow(service, key, TargetState.UNWANTED if is_unwanted else TargetState.KEPT)

    def _state(self, service_id: str) -> TargetState:
        """Return the state of the target of an ID that is asked for."""
        if service_id in self.status.blocked:
            return TargetState.BLOCKED
        if service_id in self.status.withheld:
            return TargetState.WITHHELD
        if isinstance(self.observed.get(service_id), AsDesired) and not self.status.is_standby:
            return TargetState.REGISTERED
        if service_id in self.status.conflicts:
            return TargetState.CONFLICT
        if service_id in self.status.refused:
            return TargetState.REFUSED
        return TargetState.STANDBY if self.status.is_standby else TargetState.PENDING

    def _expected(self, service_id: str, target: Target) -> Service:
        """Build the service a target is to have; a shard that is still to be chosen at random stays open."""
        shard = self.observed.shard(service_id)
        if shard or isinstance(self.rules.shards, HashShards):
            shard = self.rules.shards.choose(service_id, shard)
        if target.awaits:
            target = keep_inherited(target, inherited_by(self.observed.get(service_id)))
        return AsDesired(target, shard, self.desired.cluster_uid).service(self.rules.identity)


class Completeness:
    """True once every source was listed, and Consul was read or did not answer in `CONSUL_PATIENCE`.

    Consul knows the shards, and the services that are kept.
    """

    def __init__(self, view: View, clock: Callable[[], float]) -> None:
        self._view = view
        self._clock = clock
        self._listed_at: float | None = None
        self._is_complete = False

    def __bool__(self) -> bool:
        if self._is_complete or self._view.unlisted():
            return self._is_complete
        if self._listed_at is None:
            self._listed_at = self._clock()
        is_late = self._clock() - self._listed_at >= CONSUL_PATIENCE
        self._is_complete = is_late or self._view.observed.is_complete
        return self._is_complete


class Census:
    """Counts for metrics: targets by kind and state and rejections by reason when `refresh` is called."""

    def __init__(self, view: View, stats: Callable[[], Mapping[Source, WatchStats]]) -> None:
        targets: IndexRules[tuple[str, str]] = IndexRules({"": lambda pair: pair}, {"": _PAIRS})
        rejections: IndexRules[Rejection] = IndexRules({"": lambda one: one.reason}, {"": Reason})
        self._targets = Index(view.states, lambda: view.generation, targets)
        self._rejections = Index(view.rejections, lambda: view.generation, rejections)
        self._stats = stats
        self._desired, self._status = view.desired, view.status
        self._counts: tuple[Mapping[tuple[str, str], int], Mapping[str, int]] = (
            dict.fromkeys(_PAIRS, 0),
            dict.fromkeys(Reason, 0),
        )

    async def refresh(self) -> None:
        """Count again if anything changed since the last time."""
        targets, rejections = await self._targets.snapshot(), await self._rejections.snapshot()
        self._counts = targets.counts[""], rejections.counts[""]

    def figures(self) -> Figures:
        """Return the counts of the last `refresh`, and the state of the watches of each kind now."""
        restarts = {(kind.value, cause): 0 for kind in Kind for cause in CAUSES}
        lists: dict[str, int] = {}
        heard: dict[str, float] = {}
        boot = time.time() - time.monotonic()
        for source, stats in self._stats().items():
            kind = source.kind.value
            for cause, count in stats.restarts.items():
                restarts[kind, cause] += count
            lists[kind] = lists.get(kind, 0) + stats.lists
            at = 0.0 if stats.heard_at is None else boot + stats.heard_at
            heard[kind] = min(heard.get(kind, at), at)
        join = self._desired.join
        yielded = {} if join is None else {winner.value: join.yielded[winner] for winner in Winner}
        notes = {note.value: self._desired.notes.get(note, 0) for note in Note}
        verbs = Counter(self._status.withheld.values())
        withheld = {verb: verbs[verb] for verb in WRITE_VERBS}
        return Figures(*self._counts, restarts, lists, heard, yielded, notes, withheld)


_PAIRS = tuple((kind.value, state.value) for kind in USUAL_KINDS for state in TargetState)
