"""Claims on service IDs: who asks for one, who gave way at a shared endpoint, and who departed. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from k8s_consul_registrar.model import ObjectKey, Target

# Departures that are remembered at most. One that is forgotten becomes an inference, which is safe.
MOST_DEPARTURES = 50_000
# An endpoint that more targets claim is none that moves from one Pod to the next: no Pod gives way there.
MOST_CLAIMS = 100

_Place: TypeAlias = tuple[str, ObjectKey]


class Claims:
    """The targets by the service ID that they ask for, without those that gave way to another Pod's."""

    def __init__(self) -> None:
        self.by_id: dict[str, tuple[Target, ...]] = {}
        self.endpoints = Endpoints()

    def add(self, targets: tuple[Target, ...]) -> None:
        """Note the targets of one object."""
        for target in targets:
            if target.has_own_address:
                self.endpoints.add(target)
            # The usual case of one target and one claim shares one tuple, for its memory.
            self._add(target, targets if len(targets) == 1 else (target,))

    def remove(self, targets: tuple[Target, ...]) -> None:
        """Forget the targets of one object."""
        for target in targets:
            if not (target.has_own_address and self.endpoints.remove(target)):
                self._remove(target)

    def settle(self, changed: Iterable[Target]) -> tuple[list[Target], list[Target]]:
        """Return the targets that give way now, and those that come back, at the endpoints of some targets."""
        given_way, back = self.endpoints.settle(changed)
        for target in given_way:
            self._remove(target)
        for target in back:
            self._add(target, (target,))
        return given_way, back

    def _add(self, target: Target, alone: tuple[Target, ...]) -> None:
        others = self.by_id.get(target.id)
        self.by_id[target.id] = (*others, target) if others else alone

    def _remove(self, target: Target) -> None:
        rest = tuple(one for one in self.by_id[target.id] if one.key != target.key)
        if rest:
            self.by_id[target.id] = rest
        else:
            del self.by_id[target.id]


class Endpoints:
    """Which targets are at which address and port; only of Pods that have an address of their own.

    The usual case of one target at an endpoint costs one dictionary entry.
    """

    def __init__(self) -> None:
        self._alone: dict[int, Target] = {}
        self._shared: dict[int, dict[_Place, Target]] = {}
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
        if key in self._shared:
            self.generation += 1
            self._shared[key][_place(target)] = target
            return
        before = self._alone.get(key)
        if before is None or _place(before) == _place(target):
            self._alone[key] = target
        else:
            del self._alone[key]
            self.generation += 1
            self._shared[key] = {_place(before): before, _place(target): target}

    def remove(self, target: Target) -> bool:
        """Forget a target; return whether it had given way."""
        key = _key(target)
        members = self._shared.get(key)
        if members is not None:
            self.generation += 1
            removed = members.pop(_place(target), None)
            if len(members) == 1:
                del self._shared[key]
                (self._alone[key],) = members.values()
        elif key in self._alone and _place(self._alone[key]) == _place(target):
            removed = self._alone.pop(key)
        else:
            removed = None
        self.terminating -= removed is not None and removed.is_terminating
        return self._yielded.pop(_place(target), None) is not None

    def settle(self, changed: Iterable[Target]) -> tuple[list[Target], list[Target]]:
        """Return the targets that give way now, and those that come back, at the endpoints of some targets."""
        given_way: list[Target] = []
        back: list[Target] = []
        for target in {(one.address, one.port): one for one in changed if one.has_own_address}.values():
            alone = self._alone.get(_key(target))
            members = self.at(target) or (() if alone is None else (alone,))
            yields = {_place(one) for one in yielding(members)}
            for member in members:
                place = _place(member)
                if place in yields and place not in self._yielded:
                    self._yielded[place] = member
                    given_way.append(member)
                elif place not in yields and place in self._yielded:
                    back.append(self._yielded.pop(place))
        return given_way, back

    @property
    def is_settled(self) -> bool:
        """True if no target gives way or could: no Pod is being deleted."""
        return not (self.terminating or self._yielded)

    def without_yielded(self, key: ObjectKey, ids: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of an object's IDs whose targets have not given way: the others are not asked for now."""
        return tuple(one for one in ids if (one, key) not in self._yielded) if self._yielded else ids

    def at(self, target: Target) -> tuple[Target, ...]:
        """Return the targets at the endpoint of a target, if there are several and no more than usual."""
        members = self._shared.get(_key(target), {})
        if len(members) > MOST_CLAIMS:
            return ()
        return tuple(
            one for one in members.values() if (one.address, one.port) == (target.address, target.port)
        )

    def shared(self) -> Iterator[tuple[Target, ...]]:
        """Yield the targets of each endpoint that several living Pods claim."""
        for members in self._shared.values():
            living = tuple(one for one in members.values() if not one.is_terminating)
            if len(living) > 1:
                yield living


def yielding(members: Sequence[Target]) -> list[Target]:
    """Return the targets that give way at one endpoint: of Pods being deleted, while another one lives."""
    if all(one.is_terminating for one in members):
        return []
    return [one for one in members if one.is_terminating]


def _key(target: Target) -> int:
    return hash((target.address, target.port))


def _place(target: Target) -> _Place:
    return target.id, target.key


class Departures:
    """Departures by service ID and object, each with its generation.

    An object of None is a Node of the original program, which its service does not name.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, dict[ObjectKey | None, int]] = {}
        self._by_key: dict[ObjectKey | None, set[str]] = {}
        self.generation = 0
        # Departures up to this generation were seen while another replica led.
        self.stale_until = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def ids(self) -> tuple[str, ...]:
        """Return every service ID with a departure."""
        return tuple(self._by_id)

    def record(self, service_id: str, key: ObjectKey | None) -> None:
        """Record a departure, as a new generation."""
        self.generation += 1
        self._by_id.setdefault(service_id, {})[key] = self.generation
        self._by_key.setdefault(key, set()).add(service_id)
        while len(self._by_id) > MOST_DEPARTURES:
            self.end_all(next(iter(self._by_id)))

    def get(self, service_id: str, key: ObjectKey | None) -> int | None:
        """Return the generation of an object's departure from an ID, None if there is none."""
        found = self._by_id.get(service_id)
        return None if found is None else found.get(key)

    def keys(self, service_id: str) -> Mapping[ObjectKey | None, int]:
        """Return the objects that departed from an ID, with their generations."""
        return self._by_id.get(service_id, {})

    def of(self, key: ObjectKey) -> tuple[str, ...]:
        """Return the IDs that an object departed from."""
        return tuple(self._by_key.get(key, ()))

    def end(self, service_id: str, key: ObjectKey | None) -> None:
        """Forget one departure."""
        found = self._by_id.get(service_id, {})
        if found.pop(key, None) is None:
            return
        if not found:
            del self._by_id[service_id]
        ids = self._by_key[key]
        ids.discard(service_id)
        if not ids:
            del self._by_key[key]

    def end_all(self, service_id: str) -> None:
        """Forget every departure from an ID."""
        for key in tuple(self.keys(service_id)):
            self.end(service_id, key)
