"""Desired state: what should exist under each service ID, and which objects stopped asking for one. Pure."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.source_state import Listing, SourceStatus
from k8s_consul_registrar.kube.store import Evidence, Store
from k8s_consul_registrar.model import Kind, Node, ObjectKey, Rejection, Source, Target
from k8s_consul_registrar.registrar.claims import Claims, Departures, Endpoints
from k8s_consul_registrar.registrar.decide import Desired, Standing
from k8s_consul_registrar.registrar.observed import (
    AsDesired,
    Foreign,
    Observed,
    ObservedState,
    Other,
    Unknown,
    object_behind,
)
from k8s_consul_registrar.targets.resolve import Resolved, Zones


class Change(msgspec.Struct, frozen=True, gc=False):
    """Service IDs to decide again: those an object asks for, then those it no longer asks for.

    `heard_at` is when an event told of it, None if a list did. `rejection` is why the object has no targets.
    """

    asked: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    heard_at: float | None = None
    rejection: Rejection | None = None


class DesiredState:
    """The claims, rejections and departures of every watched object, as its Store tells them.

    Memory follows targets and rejections, not objects. A departure ends by the acknowledged write of its
    generation (`settle`), by a read of Consul begun after it that shows the ID absent or another object's
    (`settle_by_read`), or by its object asking for the ID again; by nothing else. None is recorded for an ID
    that is known to be absent.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        resolve: Callable[[Item], Resolved | None],
        observed: ObservedState,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolve = resolve
        self._observed = observed
        self._changed: Callable[[Change], None] = _ignore
        self._source_changed: Callable[[Source, SourceStatus], None] = _ignore
        self._clock = clock
        self._zones = Zones() if Source(Kind.NODE) in sources else None
        self._claims = Claims()
        self._rejections: dict[ObjectKey, Rejection] = {}
        self._rejected_ids: Counter[str] = Counter()
        self._rejected_without_id: Counter[Kind] = Counter()
        self._departures = Departures()
        # IDs that an object asked for before it was rejected, or missing from a list: they depart with it.
        self._earlier_ids: dict[ObjectKey, tuple[str, ...]] = {}
        self._cluster_uid = ""
        # True once a list lacked an object that was known: a resync has absences to judge.
        self.has_absences = False
        # Moves with every change, for caches of what is shown.
        self.generation = 0
        self.store: Store[Resolved] = Store(sources, self.resolve, self, clock=clock)

    def subscribe(
        self, changed: Callable[[Change], None], source_changed: Callable[[Source, SourceStatus], None]
    ) -> None:
        """Have every change reported from now on."""
        self._changed, self._source_changed = changed, source_changed

    # What is known

    @property
    def claims(self) -> Mapping[str, tuple[Target, ...]]:
        """The targets by the service ID they ask for; changes under the reader."""
        return self._claims.by_id

    @property
    def rejections(self) -> Mapping[ObjectKey, Rejection]:
        """The rejected objects; changes under the reader."""
        return self._rejections

    @property
    def cluster_uid(self) -> str:
        """The UID of the namespace kube-system, empty while it is unknown."""
        return self._cluster_uid

    @property
    def endpoints(self) -> Endpoints:
        """The addresses and ports of Pods, and which of them are shared."""
        return self._claims.endpoints

    @property
    def departures(self) -> int:
        """Number of service IDs with a departure that has not ended."""
        return len(self._departures)

    @property
    def departure_generation(self) -> int:
        """Generation of the latest departure."""
        return self._departures.generation

    def ask(self, service_id: str, observed: Observed, *, is_contested: bool = False) -> Desired:
        """Return everything a decision about one service ID needs."""
        claims = self._claims.by_id.get(service_id, ())
        holder: ObjectKey | None = None
        kind: Kind | None = None
        standing = None
        if isinstance(observed, AsDesired):
            holder, kind = observed.target.key, observed.target.key.kind
        elif isinstance(observed, Other):
            holder, kind = observed.key, observed.kind
        is_asking = holder is not None and any(target.key == holder for target in claims)
        if observed is not None and not isinstance(observed, Foreign | Unknown) and not is_asking:
            standing = self.standing(service_id, kind, holder)
        return Desired(
            service_id,
            claims,
            holder,
            standing,
            self._cluster_uid,
            self._observed.shard(service_id),
            is_contested,
        )

    def standing(self, service_id: str, kind: Kind | None, key: ObjectKey | None) -> Standing:
        """Return what is known of an object that a record names, and that does not ask for the record's ID.

        `key` is None for a Node of the original program: any rejected Node without an address may be it.
        """
        source = self.source_of(kind, key)
        if source is None:
            return Standing.UNWATCHED
        if service_id in self._rejected_ids:
            return Standing.REJECTED
        if key in self._rejections if key is not None else self._rejected_without_id[source.kind]:
            return Standing.REJECTED
        status = self.store.status(source)
        departed = self._departures.get(service_id, key)
        if departed is not None and (departed > self._departures.stale_until or status.proves_absence):
            return Standing.DEPARTED
        if not status.proves_absence:
            return Standing.STALE
        # An object that a synced source shows, and that asks for other IDs, does not ask for this one.
        is_there = key is not None and self.store.get(key) is not None
        return Standing.DEPARTED if is_there else Standing.ABSENT

    def source_of(self, kind: Kind | None, key: ObjectKey | None) -> Source | None:
        """Return the source that would list an object, None if none is watched."""
        if key is not None:
            return self.store.source_of(key)
        source = None if kind is None else Source(kind)
        return source if source in self.store.statuses() else None

    # What the Store tells

    def resolve(self, item: Item) -> Resolved | None:
        """Resolve an object, with the zone of its Node; a Node moves its Pods to its own zone."""
        resolved = self._resolve(item)
        if self._zones is not None:
            if isinstance(item, Node):
                self._learn_zone(item)
            if isinstance(resolved, tuple):
                resolved = self._zones.place(resolved)
        return resolved or None

    def on_object(
        self,
        key: ObjectKey,
        before: Resolved | None,
        after: Resolved | None,
        evidence: Evidence,
        heard_at: float | None,
    ) -> None:
        """Take over what became of one object."""
        if before is None and after is None:
            self._depart(key, self._ids_left(key), heard_at)
            return
        self.generation += 1
        if self._zones is not None:
            self._zones.moved(key, before or (), after or ())
        self._replace(key, before, after)
        self._share_endpoints(before, after, heard_at)
        asked = self._claims.endpoints.without_yielded(key, _ids(after))
        if evidence is Evidence.ABSENT:
            # Only a resync judges what a list does not show; an ID with another claim changes hands.
            self.has_absences = True
            self._remember_ids(key, _ids(before))
            self._tell(tuple(one for one in _ids(before) if one in self._claims.by_id), (), None)
            return
        if isinstance(after, Rejection):
            self._remember_ids(key, _ids(before))
            for service_id in self._departures.of(key):
                self._departures.end(service_id, key)
            self._changed(Change((*_ids(before), *asked), (), heard_at, after))
            return
        if self._departures:
            for service_id in asked:
                self._departures.end(service_id, key)
        earlier = (*_ids(before), *self._ids_left(key))
        self._depart(key, set(earlier).difference(asked) if earlier else (), heard_at, asked)

    def on_source(self, source: Source, status: SourceStatus) -> None:
        """Tell that a source was listed, was lost or is synced again."""
        self.generation += 1
        self._source_changed(source, status)

    def resolved(self, item: Item) -> Resolved | None:
        """Resolve an object that was read by name, without taking it over."""
        return self._resolve(item)

    def learn_cluster_uid(self, uid: str) -> bool:
        """Take over the cluster's UID; return whether it is another one than was known."""
        if not uid or uid == self._cluster_uid:
            return False
        self._cluster_uid = uid
        self.generation += 1
        return True

    # Departures

    def depart(self, service_id: str, key: ObjectKey | None) -> None:
        """Record a departure that a read confirmed: of an absence the brake released, or of a living object."""
        self._departures.record(service_id, key)

    def settle(self, service_id: str, generation: int) -> None:
        """End the departures from an ID up to a generation: Consul acknowledged a write decided after them."""
        for key, recorded in tuple(self._departures.keys(service_id).items()):
            if recorded <= generation:
                self._departures.end(service_id, key)

    def settle_by_read(self, generation: int) -> None:
        """End departures up to a generation by a complete read that began after them.

        What it shows as absent, foreign or another object's has nothing left of the object that departed.
        """
        for service_id in self._departures.ids():
            observed = self._observed.get(service_id)
            if isinstance(observed, Unknown) or not (observed or self._observed.is_absent(service_id)):
                continue
            is_ours = isinstance(observed, AsDesired | Other)
            holder = object_behind(observed)
            for key, recorded in tuple(self._departures.keys(service_id).items()):
                if recorded <= generation and not (is_ours and holder == key):
                    self._departures.end(service_id, key)
        for key in tuple(self._earlier_ids):
            self._remember_ids(key, ())

    def begin_leading(self) -> None:
        """Distrust departures seen while another replica led, except those that a synced source confirms."""
        self._departures.stale_until = self._departures.generation

    def _ids_left(self, key: ObjectKey) -> tuple[str, ...]:
        """Return the IDs under which an object that no longer asks for them may still have records."""
        return (*self._observed.ids_of(key), *self._earlier_ids.pop(key, ()))

    def _remember_ids(self, key: ObjectKey, ids: Iterable[str]) -> None:
        """Remember IDs of an object that asks for nothing now, as long as there may be records under them."""
        ids = {*ids, *self._departures.of(key), *self._earlier_ids.pop(key, ())}
        if left := tuple(one for one in ids if not self._observed.is_absent(one)):
            self._earlier_ids[key] = left

    def _depart(
        self, key: ObjectKey, ids: Iterable[str], heard_at: float | None, asked: tuple[str, ...] = ()
    ) -> None:
        dropped = []
        for service_id in ids:
            if not self._observed.is_absent(service_id):
                self._departures.record(service_id, key)
            dropped.append(service_id)
        if asked or dropped:
            self._tell(asked, tuple(dropped), heard_at)

    def _tell(self, asked: tuple[str, ...], dropped: tuple[str, ...], heard_at: float | None) -> None:
        if asked or dropped:
            self._changed(Change(asked, dropped, heard_at))

    # Claims and rejections

    def _replace(self, key: ObjectKey, before: Resolved | None, after: Resolved | None) -> None:
        if isinstance(before, Rejection):
            del self._rejections[key]
            if before.id:
                self._rejected_ids[before.id] -= 1
                if not self._rejected_ids[before.id]:
                    del self._rejected_ids[before.id]
            else:
                self._rejected_without_id[key.kind] -= 1
        elif before is not None:
            self._claims.remove(before)
        if isinstance(after, Rejection):
            self._rejections[key] = after
            if after.id:
                self._rejected_ids[after.id] += 1
            else:
                self._rejected_without_id[key.kind] += 1
        elif after is not None:
            self._claims.add(after)

    def _share_endpoints(
        self, before: Resolved | None, after: Resolved | None, heard_at: float | None
    ) -> None:
        """Let targets of Pods that are being deleted give way to others at their endpoint, or come back."""
        if self._claims.endpoints.is_settled:
            return
        given_way, back = self._claims.settle(
            target for resolved in (before, after) if isinstance(resolved, tuple) for target in resolved
        )
        for target in given_way:
            self._depart(target.key, (target.id,), heard_at)
        for target in back:
            self._departures.end(target.id, target.key)
            self._tell((target.id,), (), heard_at)

    def _learn_zone(self, node: Node) -> None:
        """Move the Pods of a Node, and no others, if its zone is another one than was known."""
        assert self._zones is not None
        is_listed = isinstance(self.store.status(Source(Kind.NODE)).state, Listing)
        heard_at = None if is_listed else self._clock()
        for key in self._zones.learn(node):
            before = self.store.get(key)
            if not isinstance(before, tuple):
                continue
            after = self._zones.place(before)
            if after != before:
                self.generation += 1
                self.store.revise(key, after)
                self._claims.remove(before)
                self._claims.add(after)
                self._share_endpoints(before, after, heard_at)
                self._tell(_ids(after), (), heard_at)


def _ignore(*_: object) -> None:
    pass


def _ids(resolved: Resolved | None) -> tuple[str, ...]:
    if resolved is None:
        return ()
    if isinstance(resolved, Rejection):
        return (resolved.id,) if resolved.id else ()
    return tuple([target.id for target in resolved])
