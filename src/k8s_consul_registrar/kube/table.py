"""What the objects of some sources amount to, one value each, told as it changes and never copied."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import ObjectKey, Source, Undecodable

ValueT = TypeVar("ValueT")

# More absences than these are inferred in slices of as many.
SLICE = 2000


@dataclass(slots=True)
class _Sight:
    """How well one source is seen: `blind_since` is None while it is followed."""

    has_listed: bool = False
    blind_since: float | None = None
    problem: str = ""
    unseen: set[ObjectKey] | None = None
    is_opaque: bool = False
    is_list_opaque: bool = False
    keys: set[ObjectKey] = field(default_factory=set)


class Table(Generic[ValueT]):
    """The values of every object followed that has one; a `Copy` for those who need no targets.

    `judge` makes an object's value, None where it is of no concern. `changed` hears each value that is new,
    differs or is gone (None), when it happens; `sighted` hears that a source was listed, was lost or is
    followed again. An object that cannot be read keeps the value it had.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        judge: Callable[[Item], ValueT | None],
        *,
        changed: Callable[[ObjectKey, ValueT | None], None],
        sighted: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._judge = judge
        self._changed = changed
        self._sighted = sighted
        self._clock = clock
        self._values: dict[ObjectKey, ValueT] = {}
        self._sights = {source: _Sight(blind_since=clock()) for source in sources}

    def values(self) -> Iterator[ValueT]:
        """Yield every value of this moment."""
        return iter(self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    @property
    def has_listed(self) -> bool:
        """Whether every source was listed completely at least once."""
        return all(sight.has_listed for sight in self._sights.values())

    @property
    def blind_since(self) -> float | None:
        """Since when some source is not followed, in seconds of the clock; None while all are."""
        return min(
            (at.blind_since for at in self._sights.values() if at.blind_since is not None), default=None
        )

    @property
    def problem(self) -> str:
        """Why not, empty while all are."""
        return next((sight.problem for sight in self._sights.values() if sight.problem), "")

    # What a follower tells

    def start_listing(self, source: Source) -> None:
        """Begin to take in a list: what it holds counts at once, what it lacks only at its end."""
        sight = self._sights[source]
        sight.unseen = set(sight.keys)
        sight.is_list_opaque = False

    def put(self, source: Source, item: Item, *, is_added: bool = True) -> None:  # noqa: ARG002 - of a `Copy`
        """Take in an object as it is now."""
        sight, key = self._sights[source], item.key
        if key is None:
            sight.is_opaque = sight.is_list_opaque = True
            return
        if sight.unseen:
            sight.unseen.discard(key)
        if not isinstance(item, Undecodable):
            self._replace(sight, key, self._judge(item))

    def remove(self, source: Source, item: Item) -> None:
        """Take in that an object is gone."""
        sight = self._sights[source]
        if item.key is None:
            sight.is_opaque = True
            return
        if sight.unseen:
            sight.unseen.discard(item.key)
        self._replace(sight, item.key, None)

    def infer_absences(self, source: Source) -> bool:
        """Take in a slice of what a complete list lacks; nothing where it held something nameless."""
        sight = self._sights[source]
        if sight.is_list_opaque:
            sight.unseen = set()
        unseen = sight.unseen
        if not unseen:
            return False
        for _ in range(min(SLICE, len(unseen))):
            self._replace(sight, unseen.pop(), None)
        return bool(unseen)

    def finish_listing(self, source: Source, at: float) -> None:  # noqa: ARG002 - of a `Copy`
        """Take in that a list is complete."""
        while self.infer_absences(source):
            pass
        sight = self._sights[source]
        sight.unseen = None
        sight.is_opaque = sight.is_list_opaque
        sight.has_listed, sight.blind_since, sight.problem = True, None, ""
        self._sighted()

    def fail(self, source: Source, problem: str) -> None:
        """Note that a source cannot be followed: its values stay as they were."""
        sight = self._sights[source]
        if sight.blind_since is not None and sight.problem == problem:
            return
        sight.problem = problem
        if sight.blind_since is None:
            sight.blind_since = self._clock()
        self._sighted()

    def resume(self, source: Source) -> None:
        """Note that a source that was listed is followed again."""
        sight = self._sights[source]
        if sight.has_listed and sight.blind_since is not None:
            sight.blind_since, sight.problem = None, ""
            self._sighted()

    def is_opaque(self, source: Source) -> bool:
        """Whether something nameless was seen there since the last list or in it."""
        return self._sights[source].is_opaque

    def _replace(self, sight: _Sight, key: ObjectKey, value: ValueT | None) -> None:
        before = self._values.get(key)
        if before == value:
            return
        if value is None:
            del self._values[key]
            sight.keys.discard(key)
        else:
            self._values[key] = value
            sight.keys.add(key)
        self._changed(key, value)
