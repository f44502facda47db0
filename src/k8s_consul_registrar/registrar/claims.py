"""Claims on service IDs: who asks for one, who is rejected, who gave way at a shared endpoint, who departed. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.kube.store import NamespaceGate
from k8s_consul_registrar.model import Kind, ObjectKey, Rejection, Resolved, Target
from k8s_consul_registrar.registrar.brake import Ground, Proof
from k8s_consul_registrar.registrar.observed import (
    AsDesired,
    ObservedState,
    Other,
    Unknown,
    object_behind,
)

# Departures that are remembered at most. One that is forgotten becomes an inference, which is safe.
MOST_DEPARTURES = 50_000
# Where more targets claim one endpoint, not all of them are looked at for each change.
MOST_CLAIMS = 100

_Place: TypeAlias = tuple[str, ObjectKey]


class Change(msgspec.Struct, frozen=True, gc=False):
    """Service IDs to decide again: those an object asks for, then those it no longer asks for.

    `heard_at` is when its event arrived, None for a change from a list. `rejection` is why the object has no targets.
    `wait` is the seconds that dropped IDs wait.
    """

    asked: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    heard_at: float | None = None
    rejection: Rejection | None = None
    wait: float = 0.0


class Claims:
    """The targets by the service ID that they ask for, without those that gave way to another Pod's."""

    def __init__(self, changed: Callable[[str], None], gate: NamespaceGate) -> None:
        self._changed = changed
        self._gate = gate
        self.by_id: dict[str, tuple[Target, ...]] = {}
        self.endpoints = Endpoints()
        # Number of targets with each note, those that gave way included.
        self.notes: Counter[str] = Counter()

    def add(self, targets: tuple[Target, ...]) -> None:
        """Note the targets of one object."""
        for target in targets:
            if target.has_own_address:
                self.endpoints.add(target)
            if target.notes:
                self.notes.update(target.notes)
            # The usual case of one target and one claim shares one tuple, for its memory.
            self._add(target, targets if len(targets) == 1 else (target,))

    def remove(self, targets: tuple[Target, ...]) -> None:
        """Forget the targets of one object."""
        for target in targets:
            if target.notes:
                self.notes.subtract(target.notes)
            if not (target.has_own_address and self.endpoints.remove(target)):
                self._remove(target)

    def endpoints_of(self, service_id: str, key: ObjectKey | None = None) -> tuple[Target, ...]:
        """Return the endpoints that ask for an ID, of one Service or of all."""
        claims = self.by_id.get(service_id, ())
        return tuple([one for one in claims if one.key.kind is Kind.ENDPOINT and key in (None, one.key)])

    def settle(self, changed: Sequence[Target]) -> tuple[list[Target], list[Target]]:
        """Return the targets that give way now, and those that come back, at the endpoints of some targets."""
        given_way, back = self.endpoints.settle(changed)
        for target in given_way:
            self._remove(target)
        for target in back:
            self._add(target, (target,))
        return given_way, back

    def select(self, namespace: str, *, is_selected: bool) -> tuple[str, ...]:
        """Let the targets of a namespace count, or not; return the IDs that this changes."""
        targets = self._gate.turn(namespace, self.by_id.values(), is_selected=is_selected)
        for target in targets:
            if is_selected:
                self._put(target, (target,))
            else:
                self._drop(target)
        return tuple([target.id for target in targets])

    def _add(self, target: Target, alone: tuple[Target, ...]) -> None:
        if self._gate.add(target, alone):
            self._put(target, alone)

    def _remove(self, target: Target) -> None:
        if self._gate.remove(target):
            self._drop(target)

    def _put(self, target: Target, alone: tuple[Target, ...]) -> None:
        self._changed(target.id)
        others = self.by_id.get(target.id)
        self.by_id[target.id] = (*others, target) if others else alone

    def _drop(self, target: Target) -> None:
        self._changed(target.id)
        rest = tuple(one for one in self.by_id[target.id] if one.key != target.key)
        if rest:
            self.by_id[target.id] = rest
        else:
            del self.by_id[target.id]


class _Shared(msgspec.Struct):
    """The targets at one endpoint, if there are several.

    `living` is the number of those whose Pod is not being deleted, `had_living` says whether there were any when
    all of them were last settled, None before that.
    """

    members: dict[_Place, Target]
    living: int
    had_living: bool | None = None


class Endpoints:
    """Which targets are at which address and port; only of Pods that have an address of their own.

    The usual case of one target at an endpoint costs one dictionary entry.
    """

    def __init__(self) -> None:
        self._alone: dict[int, Target] = {}
        self._shared: dict[int, _Shared] = {}
        # Number of targets of Pods that are being deleted: without them none gives way.
        self.terminating = 0
        # Moves whenever `shared` may yield anything else.
        self.generation = 0
        # Targets that gave way to another Pod.
        self._yielded: dict[_Place, Target] = {}

    def add(self, target: Target) -> None:
        """Note a target."""
        self.terminating += target.is_terminating
        key = _key(target)
        if (shared := self._shared.get(key)) is not None:
            self.generation += 1
            shared.members[_place(target)] = target
            shared.living += not target.is_terminating
            return
        before = self._alone.get(key)
        if before is None or _place(before) == _place(target):
            self._alone[key] = target
        else:
            del self._alone[key]
            self.generation += 1
            members = {_place(one): one for one in (before, target)}
            self._shared[key] = _Shared(members, sum(not one.is_terminating for one in members.values()))

    def remove(self, target: Target) -> bool:
        """Forget a target; return whether it had given way."""
        key = _key(target)
        shared = self._shared.get(key)
        removed: Target | None = None
        if shared is not None:
            self.generation += 1
            removed = shared.members.pop(_place(target), None)
            shared.living -= removed is not None and not removed.is_terminating
            if len(shared.members) == 1:
                del self._shared[key]
                (self._alone[key],) = shared.members.values()
        elif key in self._alone and _place(self._alone[key]) == _place(target):
            removed = self._alone.pop(key)
        self.terminating -= removed is not None and removed.is_terminating
        return self._yielded.pop(_place(target), None) is not None

    def settle(self, changed: Sequence[Target]) -> tuple[list[Target], list[Target]]:
        """Return the targets that give way now, and those that come back, at the endpoints of some targets."""
        given_way: list[Target] = []
        back: list[Target] = []
        for key in dict.fromkeys(_key(one) for one in changed if one.has_own_address):
            members, has_living = self._unsettled(key, changed)
            for member in members:
                place = _place(member)
                gives_way = has_living and member.is_terminating
                if gives_way and place not in self._yielded:
                    self._yielded[place] = member
                    given_way.append(member)
                elif not gives_way and place in self._yielded:
                    back.append(self._yielded.pop(place))
        return given_way, back

    def _unsettled(self, key: int, changed: Sequence[Target]) -> tuple[Sequence[Target], bool]:
        """Return the targets to settle at an endpoint, and whether a living Pod is there.

        In a crowd these are only the ones that changed, unless the first living Pod came or the last one went.
        """
        shared = self._shared.get(key)
        if shared is None:
            alone = self._alone.get(key)
            return () if alone is None else (alone,), False
        has_living = shared.living > 0
        if len(shared.members) > MOST_CLAIMS and shared.had_living is has_living:
            places = dict.fromkeys(_place(one) for one in changed)
            return [shared.members[one] for one in places if one in shared.members], has_living
        shared.had_living = has_living
        return tuple(shared.members.values()), has_living

    @property
    def is_settled(self) -> bool:
        """True if no target gives way or could: no Pod is being deleted, or none shares an endpoint."""
        return not (self._yielded or (self.terminating and self._shared))

    def without_yielded(self, key: ObjectKey, ids: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of an object's IDs whose targets have not given way: the others are not asked for now."""
        return tuple(one for one in ids if (one, key) not in self._yielded) if self._yielded else ids

    def shared(self) -> Iterator[tuple[Target, ...]]:
        """Yield the targets of each endpoint that several living Pods claim."""
        for shared in self._shared.values():
            if shared.living > 1:
                yield tuple(one for one in shared.members.values() if not one.is_terminating)


def _key(target: Target) -> int:
    return hash((target.address, target.port))


def _place(target: Target) -> _Place:
    return target.id, target.key


class Departures:
    """Departures by service ID and object, each with its generation.

    An object of None is a Node of the original program, which its service does not name.
    """

    def __init__(self, observed: ObservedState) -> None:
        self._observed = observed
        self._by_id: dict[str, dict[ObjectKey | None, int]] = {}
        self._by_key: dict[ObjectKey | None, set[str]] = {}
        self._dues: dict[str, float] = {}
        self._proofs: dict[str, Proof] = {}  # of departures that no event showed
        # IDs asked for before an object was rejected, or missing from a list: they depart with it.
        self._earlier: dict[ObjectKey, tuple[str, ...]] = {}
        self.generation = 0
        # Departures up to this generation were seen while another replica led.
        self.stale_until = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def ids(self) -> tuple[str, ...]:
        """Return every service ID with a departure."""
        return tuple(self._by_id)

    def record(
        self, service_id: str, key: ObjectKey | None, due: float = 0.0, proof: Proof | None = None
    ) -> None:
        """Record a departure, as a new generation; `due` is when the service may go, in monotonic seconds.

        Without `proof` an event showed it.
        """
        self.generation += 1
        self._proofs.pop(service_id, None)
        if proof is not None:
            self._proofs[service_id] = proof
        if due:
            self._dues[service_id] = due
        self._by_id.setdefault(service_id, {})[key] = self.generation
        self._observed.changed(service_id)
        self._by_key.setdefault(key, set()).add(service_id)
        while len(self._by_id) > MOST_DEPARTURES:
            self.end_all(next(iter(self._by_id)))

    def get(self, service_id: str, key: ObjectKey | None) -> int | None:
        """Return the generation of an object's departure from an ID, None if there is none."""
        found = self._by_id.get(service_id)
        return None if found is None else found.get(key)

    def proof(self, service_id: str, key: ObjectKey | None) -> Proof:
        """Return the proof of an object's departure from an ID; without a departure a list showed it."""
        generation = self.get(service_id, key)
        usual = Proof(Ground.LIST if generation is None else Ground.EVENT)
        return replace(self._proofs.get(service_id, usual), generation=generation or 0, key=key)

    def is_due(self, service_id: str, now: float) -> bool:
        """Return True if a service that its object departed from may go now."""
        return not self._dues or self._dues.get(service_id, now) <= now

    def keys(self, service_id: str) -> Mapping[ObjectKey | None, int]:
        """Return the objects that departed from an ID, with their generations."""
        return self._by_id.get(service_id, {})

    def of(self, key: ObjectKey) -> tuple[str, ...]:
        """Return the IDs that an object departed from."""
        return tuple(self._by_key.get(key, ()))

    def remember(self, key: ObjectKey, ids: Iterable[str]) -> None:
        """Remember IDs of an object that asks for nothing now, as long as there may be records under them."""
        ids = {*ids, *self.of(key), *self._earlier.pop(key, ())}
        if left := tuple(one for one in ids if not self._observed.is_absent(one)):
            self._earlier[key] = left

    def take_left(self, key: ObjectKey) -> tuple[str, ...]:
        """Return the IDs under which an object that no longer asks for them may have records, and forget them."""
        return (*self._observed.ids_of(key), *self._earlier.pop(key, ()))

    def settle(self, service_id: str, generation: int) -> None:
        """End the departures from an ID up to a generation."""
        for key, recorded in tuple(self.keys(service_id).items()):
            if recorded <= generation:
                self.end(service_id, key)

    def settle_by_read(self, generation: int) -> None:
        """End departures up to a generation by a complete read that began after them.

        An ID that the read shows as absent, foreign or another object's has no record of the object that departed.
        """
        for service_id in self.ids():
            record = self._observed.get(service_id)
            if isinstance(record, Unknown) or not (record or self._observed.is_absent(service_id)):
                continue
            is_ours = isinstance(record, (AsDesired, Other))
            holder = object_behind(record)
            for key, recorded in tuple(self.keys(service_id).items()):
                if recorded <= generation and not (is_ours and holder == key):
                    self.end(service_id, key)
        for one in tuple(self._earlier):
            self.remember(one, ())

    def end(self, service_id: str, key: ObjectKey | None) -> None:
        """Forget one departure."""
        found = self._by_id.get(service_id, {})
        if found.pop(key, None) is None:
            return
        self._observed.changed(service_id)
        if not found:
            del self._by_id[service_id]
            self._dues.pop(service_id, None)
            self._proofs.pop(service_id, None)
        ids = self._by_key[key]
        ids.discard(service_id)
        if not ids:
            del self._by_key[key]

    def end_all(self, service_id: str) -> None:
        """Forget every departure from an ID."""
        for key in tuple(self.keys(service_id)):
            self.end(service_id, key)


class Rejections:
    """The rejected objects, and the service IDs that they protect."""

    def __init__(self) -> None:
        self.by_key: dict[ObjectKey, Rejection] = {}
        self._ids: Counter[str] = Counter()
        self._without_id: Counter[Kind] = Counter()

    def put(self, key: ObjectKey, rejection: Rejection | None) -> bool:
        """Note why an object is rejected, None if it is not; return True if that is new."""
        before = self.by_key.get(key)
        if before == rejection:
            return False
        self.by_key.pop(key, None)
        if before is not None:
            self._count(before, -1)
        if rejection is not None:
            self.by_key[key] = rejection
            self._count(rejection, 1)
        return True

    def protects(self, service_id: str, kind: Kind, key: ObjectKey | None) -> bool:
        """Return True if the record under an ID belongs to a rejected object; a `key` of None may be any object."""
        if service_id in self._ids:
            return True
        return key in self.by_key if key is not None else bool(self._without_id[kind])

    def _count(self, rejection: Rejection, step: int) -> None:
        if not rejection.id:
            self._without_id[rejection.key.kind] += step
            return
        self._ids[rejection.id] += step
        if not self._ids[rejection.id]:
            del self._ids[rejection.id]


def ids_asked(resolved: Resolved | None) -> tuple[str, ...]:
    """Return the service IDs that an object asks for, or would if it were not rejected."""
    if resolved is None:
        return ()
    if isinstance(resolved, Rejection):
        return (resolved.id,) if resolved.id else ()
    return tuple([target.id for target in resolved])
