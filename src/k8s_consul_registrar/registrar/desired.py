"""Desired state: what should exist under each service ID, and which objects stopped asking for one. Pure."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.source_state import SourceStatus
from k8s_consul_registrar.kube.store import Evidence, NamespaceGate, Store
from k8s_consul_registrar.model import (
    EndpointSlice,
    Kind,
    Namespace,
    Node,
    ObjectKey,
    Rejection,
    Resolved,
    Source,
    Target,
)
from k8s_consul_registrar.registrar.brake import Ground, Proof
from k8s_consul_registrar.registrar.claims import Change, Claims, Departures, Rejections, ids_asked
from k8s_consul_registrar.registrar.decide import Desired, Standing
from k8s_consul_registrar.registrar.observed import (
    AsDesired,
    Observed,
    ObservedState,
    Other,
    object_behind,
)
from k8s_consul_registrar.registrar.service_join import Joined, ServiceJoin
from k8s_consul_registrar.targets.endpoints import ServiceScrape, Value, endpoints_key
from k8s_consul_registrar.targets.meta import Inheritance, LabelMeta

# Seconds that an endpoint which left its slice is kept: it may be on its way to another slice.
GRACE = 2.0
# Objects whose inherited meta is changed in one step; a few milliseconds of work.
SLICE = 200
_PARTS = (ServiceScrape, EndpointSlice, Namespace)


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
        resolve: Callable[[Item], Value | None],
        observed: ObservedState,
        *,
        join: ServiceJoin | None = None,
        labels: Mapping[Kind, Sequence[LabelMeta]] = MappingProxyType({}),
        selects_namespaces: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolve = resolve
        self._observed = observed
        self._changed: Callable[[Change], None] = lambda _: None
        self._source_changed: Callable[[Source, SourceStatus], None] = lambda *_: None
        self._clock = clock
        self._inheritance = Inheritance([one.kind for one in sources], labels)
        self.join = join
        self.gate = NamespaceGate(selects=selects_namespaces)
        self._claims = Claims(observed.changed, self.gate)
        self._rejections = Rejections()
        self._departures = Departures(observed)
        # Targets by service ID, rejections by object, Pods' endpoints, targets by note: they change under the reader.
        self.claims: Mapping[str, tuple[Target, ...]] = self._claims.by_id
        self.rejections: Mapping[ObjectKey, Rejection] = self._rejections.by_key
        self.endpoints = self._claims.endpoints
        self.notes: Mapping[str, int] = self._claims.notes
        # The UID of the namespace kube-system, empty while it is unknown.
        self.cluster_uid = ""
        # True once a list lacked an object that was known: a resync has absences to judge.
        self.has_absences = False
        # Moves with every change, for caches of what is shown.
        self.generation = 0
        self.store: Store[Value] = Store(sources, self.resolve, self, clock=clock)

    def subscribe(
        self, changed: Callable[[Change], None], source_changed: Callable[[Source, SourceStatus], None]
    ) -> None:
        """Have every change reported from now on."""
        self._changed, self._source_changed = changed, source_changed

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
        holder = object_behind(observed)
        standing = None
        if isinstance(observed, (AsDesired, Other)) and not any(target.key == holder for target in claims):
            kind = observed.target.key.kind if isinstance(observed, AsDesired) else observed.kind
            standing = self.standing(service_id, kind, holder)
        return Desired(
            service_id,
            claims,
            holder,
            standing,
            self.cluster_uid,
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
        is_synced = all(self.store.status(one).proves_absence for one in self.gate.needed(source))
        departed = self._departures.get(service_id, key)
        has_departed = departed is not None and (departed > self._departures.stale_until or is_synced)
        is_endpoint = source.kind is Kind.ENDPOINT
        # A Service that is rejected in part protects only the endpoints that are still there.
        if self._rejections.protects(service_id, source.kind, key) and not (is_endpoint and has_departed):
            return Standing.REJECTED
        if has_departed:
            return Standing.DEPARTED if self._departures.is_due(service_id, self._clock()) else Standing.STALE
        if not is_synced:
            return Standing.STALE
        if key is None or self.gate.is_shut(key.namespace):
            return Standing.ABSENT  # what is not selected any more is an inference as well
        # An object that a synced source shows, and that asks for other IDs, does not ask for this one. A Service
        # that is there says nothing of an endpoint; one that something else is scraped in place of is known.
        is_yielded = is_endpoint and self.join is not None and self.join.winner_over(service_id, key)
        is_there = bool(is_yielded) if is_endpoint else self.store.get(key) is not None
        return Standing.DEPARTED if is_there else Standing.ABSENT

    def source_of(self, kind: Kind | None, key: ObjectKey | None) -> Source | None:
        """Return the source that would list an object, None if none is watched."""
        if key is not None:
            return self.store.source_of(key)
        source = None if kind is None else Source(kind)
        return source if source in self.store.statuses() else None

    # What the Store tells

    def resolve(self, item: Item) -> Value | None:
        """Resolve an object, with the meta of its Namespace and Node; these hand theirs down."""
        resolved = self._resolve(item)
        if isinstance(item, (Node, Namespace)):
            self._inheritance.learn(item)
            self.hand_down()
        elif isinstance(resolved, tuple):
            resolved = self._inheritance.place(resolved)
        elif item.key is not None and item.key.kind is Kind.NAMESPACE:
            return self.store.get(item.key)  # an unreadable object takes nothing away
        if self.join is not None and isinstance(resolved, tuple):
            resolved = self.join.mark(resolved)
        return resolved or None

    def on_object(
        self,
        key: ObjectKey,
        before: Value | None,
        after: Value | None,
        evidence: Evidence,
        heard_at: float | None,
    ) -> None:
        """Take over the targets, or the rejection, of one object; `heard_at` is when its event arrived, in monotonic seconds."""
        if after is None:
            self._inheritance.lose(key)
        if key.kind is Kind.NAMESPACE:
            self.has_absences |= after is None
            self._tell(self._claims.select(key.name, is_selected=after is not None), (), None)
            return
        if self.join is not None and key.kind is Kind.SERVICE:
            self._follow(self.join.on_service(key, after), None, is_fact=evidence is not Evidence.ABSENT)
            if after is None and evidence is not Evidence.ABSENT:
                key = endpoints_key(key.namespace, key.name)
                self._depart(key, self._departures.take_left(key), None)
        elif self.join is not None and key.kind is Kind.ENDPOINT:
            # Another slice that the list has yet to show may hold what this one lacks.
            is_fact = evidence is Evidence.EVENT
            self._follow(self.join.on_slice(before, after), heard_at, is_fact=is_fact, wait=GRACE)
        else:
            assert not isinstance(before, _PARTS)
            assert not isinstance(after, _PARTS)
            self._on_targets(key, before, after, evidence, heard_at)
            if self.join is not None and key.kind is Kind.POD:
                was, now = (one if isinstance(one, tuple) else () for one in (before, after))
                self._follow(self.join.on_pod(was, now), heard_at, asked=ids_asked(after))

    def _on_targets(
        self,
        key: ObjectKey,
        before: Resolved | None,
        after: Resolved | None,
        evidence: Evidence,
        heard_at: float | None,
    ) -> None:
        """Take over the result for an object that has targets of its own."""
        if before is None and after is None:
            self._depart(key, self._departures.take_left(key), heard_at)
            return
        self.generation += 1
        self._inheritance.moved(key, before or (), after or ())
        self._replace(key, before, after)
        self._share_endpoints(before, after, heard_at)
        asked = self._claims.endpoints.without_yielded(key, ids_asked(after))
        if evidence is Evidence.ABSENT:
            # Only a resync judges absences from a list; an ID with another claim changes its owner.
            self.has_absences = True
            self._departures.remember(key, ids_asked(before))
            self._tell(tuple(one for one in ids_asked(before) if one in self._claims.by_id), (), None)
            return
        if isinstance(after, Rejection):
            self._departures.remember(key, ids_asked(before))
            for service_id in self._departures.of(key):
                self._departures.end(service_id, key)
            self._changed(Change((*ids_asked(before), *asked), (), heard_at, after))
            return
        if self._departures:
            for service_id in asked:
                self._departures.end(service_id, key)
        earlier = (*ids_asked(before), *self._departures.take_left(key))
        dropped = set(earlier).difference(asked) if earlier else ()
        if isinstance(before, tuple) and isinstance(after, tuple):
            # A Pod that begins to be deleted keeps its services until it is gone: there is nothing to decide.
            pairs = zip(before, after, strict=False)
            stay = {now.id for was, now in pairs if self._observed.restate(was, now)}
            asked = tuple([one for one in asked if one not in stay])
        self._depart(key, dropped, heard_at, asked)

    def on_source(self, source: Source, status: SourceStatus) -> None:
        """Tell that a source was listed, was lost or is synced again."""
        self.generation += 1
        if self._departures:  # whether some of them count depends on their sources
            self._observed.all_changed()
        self._source_changed(source, status)

    def resolved(self, item: Item) -> Resolved | None:
        """Resolve an object that was read by name, a Service with its slices, without taking it over."""
        value = self._resolve(item)
        assert not isinstance(value, _PARTS)
        return value

    def _follow(
        self,
        joined: Joined,
        heard_at: float | None,
        *,
        asked: tuple[str, ...] = (),
        is_fact: bool = True,
        wait: float = 0.0,
    ) -> None:
        """Take over the effect of a change on the join of Services; `asked` are IDs that go before removals."""
        assert self.join is not None
        self.generation += 1
        for target in joined.removed:
            self._swap(self._claims.endpoints_of(target.id, target.key), ())
        for target in joined.added:
            self._swap((), self._inheritance.place((target,)))
            self._departures.end(target.id, target.key)
        for key in joined.services:
            after = self.join.rejection(key)
            if self._rejections.put(key, after) and after is not None:
                self._changed(Change((), (), heard_at, after))
        ids = [one.id for one in joined.added]
        dropped: list[str] = []
        for target in joined.left:
            if not is_fact or target.id in joined.protected:
                self.has_absences = True
                self._departures.remember(target.key, (target.id,))
                ids += [target.id] if target.id in self._claims.by_id else ()
                continue
            if not self._observed.is_absent(target.id):
                self._departures.record(target.id, target.key, self._clock() + wait if wait else 0.0)
            dropped.append(target.id)
        self._tell((*asked, *ids) if dropped else tuple(ids), tuple(dropped), heard_at, wait)
        for key in joined.pods:
            self._revise(key, self.join.mark, heard_at)

    def learn_cluster_uid(self, uid: str) -> bool:
        """Take over the cluster's UID; return whether it is another one than was known."""
        if not uid or uid == self.cluster_uid:
            return False
        self.cluster_uid = uid
        self._observed.all_changed()
        return True

    # Departures

    def depart(self, service_id: str, key: ObjectKey | None, proof: Proof | None = None) -> None:
        """Record a departure that a read confirmed: of an absence the brake released, or of a living object."""
        self._departures.record(service_id, key, proof=proof or Proof(Ground.LIST))

    def proof(self, service_id: str, key: ObjectKey | None) -> Proof:
        """Return the proof that a service may go whose object departed from it."""
        return self._departures.proof(service_id, key)

    def settle(self, service_id: str, generation: int) -> None:
        """End the departures from an ID up to a generation: Consul acknowledged a write decided after them."""
        self._departures.settle(service_id, generation)

    def settle_by_read(self, generation: int) -> None:
        """End departures up to a generation by a complete read that began after them."""
        self._departures.settle_by_read(generation)

    def begin_leading(self) -> None:
        """Distrust departures seen while another replica led, except those that a synced source confirms."""
        self._departures.stale_until = self._departures.generation

    def _depart(
        self, key: ObjectKey, ids: Iterable[str], heard_at: float | None, asked: tuple[str, ...] = ()
    ) -> None:
        dropped, proof = [], Proof(Ground.LIST) if heard_at is None else None
        for service_id in ids:
            if not self._observed.is_absent(service_id):
                self._departures.record(service_id, key, proof=proof)
            dropped.append(service_id)
        self._tell(asked, tuple(dropped), heard_at)

    def _tell(
        self, asked: tuple[str, ...], dropped: tuple[str, ...], heard_at: float | None, wait: float = 0.0
    ) -> None:
        if asked or dropped:
            self._changed(Change(asked, dropped, heard_at, wait=wait))

    # Claims and rejections

    def _replace(self, key: ObjectKey, before: Resolved | None, after: Resolved | None) -> None:
        if isinstance(before, tuple):
            self._claims.remove(before)
        if isinstance(before, Rejection) or isinstance(after, Rejection):
            self._rejections.put(key, after if isinstance(after, Rejection) else None)
        if isinstance(after, tuple):
            self._claims.add(after)

    def _share_endpoints(
        self, before: Resolved | None, after: Resolved | None, heard_at: float | None
    ) -> None:
        """Let targets of Pods that are being deleted give way to others at their endpoint, or come back."""
        if self._claims.endpoints.is_settled:
            return
        given_way, back = self._claims.settle(
            [target for resolved in (before, after) if isinstance(resolved, tuple) for target in resolved]
        )
        for target in given_way:
            self._depart(target.key, (target.id,), heard_at)
        for target in back:
            self._departures.end(target.id, target.key)
            self._tell((target.id,), (), heard_at)

    def hand_down(self, most: int = SLICE) -> bool:
        """Change the meta of objects that inherit something new, as bulk work; return True if more are left."""
        for key in self._inheritance.take(most):
            if key.kind is not Kind.ENDPOINT:
                self._revise(key, self._inheritance.place, None)
                continue
            for target in self._claims.endpoints_of(key.name):
                self._swap((target,), self._inheritance.place((target,)))
                self.generation += 1
            self._tell((key.name,), (), None)
        return not self._inheritance.is_settled

    def _swap(self, before: tuple[Target, ...], after: tuple[Target, ...]) -> None:
        """Replace the claim of one endpoint, which inherits under its service ID: its Service can be on many Nodes."""
        self._claims.remove(before)
        self._claims.add(after)
        for one in (*before, *after)[:1]:
            self._inheritance.moved(ObjectKey(Kind.ENDPOINT, one.key.namespace, one.id), before, after)

    def _revise(
        self,
        key: ObjectKey,
        change: Callable[[tuple[Target, ...]], tuple[Target, ...]],
        heard_at: float | None,
    ) -> None:
        """Replace an object's targets after a change of another object."""
        before = self.store.get(key)
        if not isinstance(before, tuple):
            return
        after = change(before)
        if after != before:
            self.generation += 1
            self.store.revise(key, after)
            self._claims.remove(before)
            self._claims.add(after)
            self._share_endpoints(before, after, heard_at)
            self._tell(ids_asked(after), (), heard_at)
