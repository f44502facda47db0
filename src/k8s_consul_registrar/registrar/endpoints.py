"""Endpoints that several Pods claim: an address and port that was given to another Pod too early. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from k8s_consul_registrar.model import ObjectKey, Target

# An endpoint that more targets claim is none that moves from one Pod to the next: no Pod gives way there.
MOST_CLAIMS = 100

_Place: TypeAlias = tuple[str, ObjectKey]


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
