"""The join of Services, EndpointSlices and Pods: which endpoints are asked for, and what one change moves. Pure.

A Service says how its endpoints are scraped, its slices say where they are. One endpoint may be in two slices for a
moment, and one place (address, port and path) may be asked for by a Pod and by several Services: the Pod wins,
then the older Service. Every change costs what it changes, not what the Service has.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.kube.service_objects import differing
from k8s_consul_registrar.model import (
    EndpointSlice,
    Kind,
    ObjectKey,
    Rejection,
    SliceEndpoint,
    Target,
)
from k8s_consul_registrar.targets.endpoints import (
    NOT_PROXIED,
    FewChanged,
    ScrapePlace,
    ServiceScrape,
    SliceTargets,
    Value,
    difference,
    endpoints_key,
    few_changed,
    place_of,
    resolve_endpoints,
    resolve_slice,
    shape_of,
)
from k8s_consul_registrar.targets.meta import PARAM_PREFIX, shared_pair
from k8s_consul_registrar.targets.resolve import TargetRules

SERVICE = "service"

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Winner(StrEnum):
    """Object that is scraped in place of an endpoint; fit for a metric's label."""

    POD = "pod"
    SERVICE = "service"


class Joined(msgspec.Struct):
    """The effect of one change: targets to take away and to add, by key and ID, and what else is to be looked at.

    `protected` are IDs taken away whose endpoint is still there and rejected. `services` are the keys whose
    rejection may be another one now, and `pods` the Pods whose meta `service` may.
    """

    removed: list[Target] = msgspec.field(default_factory=list)
    added: list[Target] = msgspec.field(default_factory=list)
    protected: set[str] = msgspec.field(default_factory=set)
    services: set[ObjectKey] = msgspec.field(default_factory=set)
    pods: set[ObjectKey] = msgspec.field(default_factory=set)

    @property
    def left(self) -> list[Target]:
        """The targets whose Service does not ask for their ID any more, wherever it is."""
        added = {(one.id, one.key) for one in self.added}
        return [one for one in self.removed if (one.id, one.key) not in added]


class _Part(msgspec.Struct):
    """One EndpointSlice with its targets, or the reason why it has none."""

    slice: EndpointSlice
    made: SliceTargets


class _Standing(NamedTuple):
    """The targets of one place: those that are scraped, and those that give way, each with its winner."""

    asked: tuple[Target, ...] = ()
    yielded: tuple[Target, ...] = ()
    winner: Winner | None = None
    service: ObjectKey | None = None


class ServiceJoin:
    """Joins Services with their EndpointSlices, and endpoints with Pods at the same place."""

    def __init__(self, rules: TargetRules) -> None:
        self._rules = rules
        self._services: dict[ObjectKey, ServiceScrape | Rejection] = {}
        self._parts: dict[ObjectKey, dict[str, _Part]] = {}
        self._rejected: defaultdict[ObjectKey, dict[str, Rejection]] = defaultdict(dict)
        # Every target of every slice, by ID; several only while two slices, or two Services, have one ID.
        self._offers: dict[str, tuple[Target, ...]] = {}
        # One target of each Service and ID, by place.
        self._places: dict[ScrapePlace, tuple[Target, ...]] = {}
        self._pods: dict[ScrapePlace, tuple[ObjectKey, ...]] = {}
        # Endpoints that are not asked for, by what is scraped instead of them.
        self.yielded: Counter[Winner] = Counter()
        # Endpoints of a Service that only the proxy could reach, and that it does not serve.
        self._unproxied: Counter[ObjectKey] = Counter()
        # Services of which different endpoints lead to one ID, by ID, and these IDs by Service.
        self._clashing: dict[str, frozenset[ObjectKey]] = {}
        self._clashes: defaultdict[ObjectKey, dict[str, None]] = defaultdict(dict)

    # What is known

    def rejection(self, key: ObjectKey) -> Rejection | None:
        """Return why a Service, or some of its endpoints, are rejected: the first reason there is."""
        service = self._services.get(key)
        if isinstance(service, Rejection):
            return service
        if parts := self._rejected.get(key):
            return parts[min(parts)]
        if ids := self._clashes.get(key):
            detail = (
                f"several of its endpoints lead to the service ID {next(iter(ids))}, and only one can have it"
            )
            return Rejection(key, Reason.ID_TAKEN, detail)
        return Rejection(key, Reason.NOT_PROXIED, NOT_PROXIED) if self._unproxied[key] else None

    @property
    def offers(self) -> Mapping[str, tuple[Target, ...]]:
        """The targets of every endpoint by ID, those that gave way included; changes under the reader."""
        return self._offers

    def winner_over(self, service_id: str, key: ObjectKey) -> ObjectKey | None:
        """Return the object that is scraped at the place of an endpoint, None if the endpoint is, or is not there."""
        mine = next((one for one in self._chosen(service_id) if one.key == key), None)
        if mine is None:
            return None
        place = self._place(mine)
        standing = self._standing(place)
        if standing.winner is None or mine not in standing.yielded:
            return None
        return self._pods[place][0] if standing.winner is Winner.POD else standing.service

    def mark(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Return a Pod's targets with the Service whose endpoint each of them is, or without one."""
        if not targets or targets[0].key.kind is not Kind.POD:
            return targets
        marked = tuple([self._marked(one) for one in targets])
        return targets if all(one is other for one, other in zip(targets, marked, strict=True)) else marked

    # Changes

    def on_service(self, key: ObjectKey, value: Value | None) -> Joined:
        """Take over a Service; all its endpoints are resolved again."""
        key = endpoints_key(key.namespace, key.name)
        if isinstance(value, (ServiceScrape, Rejection)):
            self._services[key] = value
        else:
            self._services.pop(key, None)
        gone: list[Target] = []
        come: list[Target] = []
        for part in self._parts.get(key, {}).values():
            before, made = part.made.targets, self._resolve(key, part.slice, SliceTargets({}))
            # Equal values share one object, for its memory.
            same = {
                one: before[one] if before.get(one) == some else some for one, some in made.targets.items()
            }
            part.made = made._replace(targets=same)
            difference(before, same, gone, come)
            self._note_rejection(key, part.slice.name, made.rejection)
        joined = self._swap(gone, come)
        joined.services.add(key)
        if isinstance(value, Rejection):
            joined.protected = {one.id for one in gone}
        return joined

    def on_slice(self, before: Value | None, after: Value | None) -> Joined:
        """Take over an EndpointSlice; only endpoints that changed are resolved."""
        gone: list[Target] = []
        come: list[Target] = []
        keys: set[ObjectKey] = set()
        protected: set[str] = set()
        made = SliceTargets({})
        old = before if isinstance(before, EndpointSlice) else None
        new = after if isinstance(after, EndpointSlice) else None
        if old is not None:
            key = endpoints_key(old.namespace, old.service)
            keys.add(key)
            made = self._parts[key].pop(old.name).made
            if not self._parts[key]:
                del self._parts[key]
            self._note_rejection(key, old.name, None)
        if new is None:
            difference(made.targets, {}, gone, come)
        else:
            key = endpoints_key(new.namespace, new.service)
            keys.add(key)
            few, known = None, SliceTargets({})
            if old is not None and shape_of(old) == shape_of(new):
                was, came = differing(old.endpoints, new.endpoints)
                few, known = few_changed(old.endpoints[was], new.endpoints[came], made), made
            now = self._resolve(key, new, known, few)
            if now.rejection is not None:
                protected = self._still_there(key, new, made.targets)
            if few is None:
                difference(made.targets, now.targets, gone, come)
            else:
                gone += [target for one in few.left for target in made.targets.pop(one, ())]
                come += [target for some in now.targets.values() for target in some]
                made.targets.update(now.targets)
                now = now._replace(targets=made.targets)
            self._parts.setdefault(key, {})[new.name] = _Part(new, now)
            self._note_rejection(key, new.name, now.rejection)
        joined = self._swap(gone, come)
        joined.services |= keys
        joined.protected = protected
        return joined

    def on_pod(self, before: tuple[Target, ...], after: tuple[Target, ...]) -> Joined:
        """Take over the targets of a Pod, at whose places endpoints give way or come back."""
        was = {self._place(one): one.key for one in before}
        now = {self._place(one): one.key for one in after}
        places = was.keys() ^ now.keys()
        standings = {place: self._standing(place) for place in places}
        for place in places:
            if place in was:
                _take(self._pods, place, was[place])
            else:
                self._pods[place] = (*self._pods.get(place, ()), now[place])
        return self._compare(standings)

    def _resolve(
        self, key: ObjectKey, part: EndpointSlice, made: SliceTargets, few: FewChanged | None = None
    ) -> SliceTargets:
        """Return the targets of a slice, with those made before of the same endpoints, or only of the few that came."""
        service = self._services.get(key)
        if not isinstance(service, ServiceScrape):
            return SliceTargets({})
        if few is not None:
            return resolve_endpoints(service, part, few.came, made.ports, rules=self._rules, known={})
        return resolve_slice(service, part, self._rules, made.targets)

    def _still_there(
        self, key: ObjectKey, part: EndpointSlice, before: Mapping[SliceEndpoint, tuple[Target, ...]]
    ) -> set[str]:
        """Return the IDs of endpoints that a rejected slice still has: nothing proves that they are gone."""
        service = self._services[key]
        assert isinstance(service, ServiceScrape)
        there = {one.pod or one.address for one in part.endpoints if service.counts(one, part.family)}
        return {
            one.id for point, some in before.items() if (point.pod or point.address) in there for one in some
        }

    def _note_rejection(self, key: ObjectKey, name: str, rejection: Rejection | None) -> None:
        """Note why endpoints of a slice are rejected, None if none is."""
        if rejection is not None:
            self._rejected[key][name] = rejection
        elif parts := self._rejected.get(key):
            parts.pop(name, None)
            if not parts:
                del self._rejected[key]

    # Places

    def _swap(self, gone: Iterable[Target], come: Iterable[Target]) -> Joined:
        """Take some offers away and add others; return the changes at their places."""
        ids = {one.id for one in (*gone, *come)}
        before = {service_id: self._chosen(service_id) for service_id in ids}
        for target in gone:
            _take(self._offers, target.id, target)
        for target in come:
            # The usual case of one offer shares the tuple, for its memory.
            self._offers[target.id] = (*self._offers.get(target.id, ()), target)
        less: list[tuple[ScrapePlace, Target]] = []
        more: list[tuple[ScrapePlace, Target]] = []
        touched: set[ObjectKey] = set()
        for service_id, was in before.items():
            now = self._chosen(service_id)
            touched |= self._note_clashes(service_id)
            less += [(self._place(one), one) for one in was if one not in now]
            more += [(self._place(one), one) for one in now if one not in was]
        standings = {place: self._standing(place) for place, _ in (*less, *more)}
        for place, target in less:
            _take(self._places, place, target)
        for place, target in more:
            self._places[place] = (*self._places.get(place, ()), target)
        joined = self._compare(standings)
        joined.services |= touched
        return joined

    def _note_clashes(self, service_id: str) -> frozenset[ObjectKey]:
        """Note of which Services different endpoints lead to an ID; return those that began or ceased to."""
        offers = self._offers.get(service_id, ())
        if len(offers) < 2 and service_id not in self._clashing:
            return frozenset()
        before = self._clashing.pop(service_id, frozenset())
        counts = Counter(end[0] for end in {(one.key, one.address, one.port, _pod(one)) for one in offers})
        now = frozenset(key for key, count in counts.items() if count > 1)
        if now:
            self._clashing[service_id] = now
        for key in now - before:
            self._clashes[key][service_id] = None
        for key in before - now:
            del self._clashes[key][service_id]
            if not self._clashes[key]:
                del self._clashes[key]
        return before ^ now

    def _compare(self, standings: Mapping[ScrapePlace, _Standing]) -> Joined:
        """Return the changes at some places since the given state."""
        joined = Joined()
        for place, was in standings.items():
            now = self._standing(place)
            joined.removed += [one for one in was.asked if one not in now.asked]
            joined.added += [one for one in now.asked if one not in was.asked]
            if was.yielded or now.yielded:
                self._count(was, -1)
                self._count(now, 1)
                joined.services |= {one.key for one in (*was.yielded, *now.yielded) if not one.address}
            if was.service != now.service:
                joined.pods.update(self._pods.get(place, ()))
        return joined

    def _count(self, standing: _Standing, step: int) -> None:
        if standing.winner is not None:
            self.yielded[standing.winner] += step * len(standing.yielded)
            return
        for target in standing.yielded:
            self._unproxied[target.key] += step
            if not self._unproxied[target.key]:
                del self._unproxied[target.key]

    def _chosen(self, service_id: str) -> tuple[Target, ...]:
        """Return one target of each Service that offers an ID."""
        offers = self._offers.get(service_id, ())
        if len(offers) < 2:
            return offers
        chosen: dict[ObjectKey, Target] = {}
        for target in sorted(offers, key=lambda one: (one.address, one.port, one.meta)):
            chosen.setdefault(target.key, target)
        return tuple(chosen.values())

    def _standing(self, place: ScrapePlace) -> _Standing:
        chosen = self._places.get(place, ())
        if not chosen:
            return _Standing()
        first = min(chosen, key=_rank) if len(chosen) > 1 else chosen[0]
        if place in self._pods:
            return _Standing((), chosen, Winner.POD, first.key)
        if not first.address:
            return _Standing((), chosen, None, first.key)
        if len(chosen) == 1:
            return _Standing(chosen, (), None, first.key)
        # Scrapes of one Service with other parameters are different ones, as they are of one Pod.
        of_first = {
            _query(one): one for one in sorted(chosen, key=_rank, reverse=True) if one.key == first.key
        }
        asked = tuple(of_first.values())
        others = tuple([one for one in chosen if one not in asked])
        return _Standing(asked, others, Winner.SERVICE if others else None, first.key)

    def _place(self, target: Target) -> ScrapePlace:
        return place_of(target, self._rules)

    def _marked(self, target: Target) -> Target:
        service = self._standing(self._place(target)).service
        name = service.name if service is not None and service.namespace == target.key.namespace else ""
        rest = tuple([pair for pair in target.meta if pair[0] != SERVICE])
        meta = tuple(sorted((*rest, shared_pair((SERVICE, name))))) if name else rest
        return target if meta == target.meta else replace(target, meta=meta)


def _rank(target: Target) -> tuple[tuple[int, str, str], ObjectKey, str]:
    return target.rank, target.key, target.id


def _pod(target: Target) -> str:
    return next((value for name, value in target.meta if name == "pod"), "")


def _query(target: Target) -> tuple[tuple[str, str], ...]:
    """Return the parameters by which scrapes of one address, port and path differ."""
    return tuple([pair for pair in target.meta if pair[0] == "scheme" or pair[0].startswith(PARAM_PREFIX)])


def _take(table: dict[KeyT, tuple[ValueT, ...]], key: KeyT, value: ValueT) -> None:
    """Take one value out of a table of tuples."""
    values = list(table[key])
    values.remove(value)
    if values:
        table[key] = tuple(values)
    else:
        del table[key]
