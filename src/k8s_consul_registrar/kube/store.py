"""One resolved value per Kubernetes object, changed by reflectors and reported to an observer."""

import time
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from itertools import chain
from typing import Generic, Protocol, TypeVar

import msgspec

from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.source_state import (
    CatchingUp,
    Failed,
    Listing,
    SourceState,
    SourceStatus,
    Synced,
)
from k8s_consul_registrar.model import Kind, ObjectKey, Source, Target

ValueT = TypeVar("ValueT")
ValueT_contra = TypeVar("ValueT_contra", contravariant=True)

# Absences inferred in one step; a few milliseconds of work.
SLICE = 2000


class Evidence(Enum):
    """The way a change became known."""

    EVENT = "event"  # seen in a watch event
    LISTED = "listed"  # seen in a list
    ABSENT = "absent"  # missing from a complete list: an inference


class Unreadable(Enum):
    """The result of resolving an object that cannot be read and keeps the value it had."""

    KEEP = "keep"


KEEP = Unreadable.KEEP


class StoreObserver(Protocol[ValueT_contra]):
    """Hears every change of a Store, while it happens."""

    def on_object(
        self,
        key: ObjectKey,
        before: ValueT_contra | None,
        after: ValueT_contra | None,
        evidence: Evidence,
        heard_at: float | None,
    ) -> None:
        """Note a value that changed, or an object that was seen without one (`before` and `after` None).

        `heard_at` is the moment of the event; None for a list, which tells about the past.
        """

    def on_source(self, source: Source, status: SourceStatus) -> None:
        """Note another state of a source; the text of a failure may change without a call."""


class _Record(msgspec.Struct, Generic[ValueT]):
    """One source.

    `unseen` are the objects that the arriving list has not shown yet, None between lists. What the arriving
    list has shown so far counts only once it is complete.
    """

    values: dict[ObjectKey, ValueT] = msgspec.field(default_factory=dict)
    state: SourceState = msgspec.field(default_factory=Listing)
    listed_at: float | None = None
    list_began_at: float | None = None
    objects: int = 0
    has_nameless: bool = False
    unseen: set[ObjectKey] | None = None
    began_at: float | None = None
    arrived_objects: int = 0
    arrived_nameless: bool = False

    def status(self) -> SourceStatus:
        objects = self.arrived_objects if self.listed_at is None else self.objects
        return SourceStatus(self.state, self.listed_at, self.list_began_at, objects, self.has_nameless)


class Store(Generic[ValueT]):
    """The values of all objects of some sources; memory follows values, not objects.

    `resolve` makes an object's value: None where it has none, KEEP where it cannot be read and keeps the
    one it had. An `Undecodable` item with a key is resolved like any other.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        resolve: Callable[[Item], ValueT | Unreadable | None],
        observer: StoreObserver[ValueT],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolve = resolve
        self._observer = observer
        self._clock = clock
        self._records: dict[Source, _Record[ValueT]] = {source: _Record() for source in sources}
        self._sources: dict[tuple[Kind, str], Source] = {source: source for source in self._records}

    def get(self, key: ObjectKey) -> ValueT | None:
        """Return an object's value, None where it has none."""
        source = self.source_of(key)
        return None if source is None else self._records[source].values.get(key)

    def values(self) -> Iterator[ValueT]:
        """Iterate over every value; the Store must not change meanwhile."""
        return chain.from_iterable(record.values.values() for record in self._records.values())

    def items(self) -> Iterator[tuple[ObjectKey, ValueT]]:
        """Iterate over every object that has a value; the Store must not change meanwhile."""
        return chain.from_iterable(record.values.items() for record in self._records.values())

    def __len__(self) -> int:
        return sum(len(record.values) for record in self._records.values())

    def statuses(self) -> dict[Source, SourceStatus]:
        """Return every source's status."""
        return {source: record.status() for source, record in self._records.items()}

    def status(self, source: Source) -> SourceStatus:
        """Return one source's status."""
        return self._records[source].status()

    def source_of(self, key: ObjectKey) -> Source | None:
        """Return the source that an object belongs to, None where no followed source can show it."""
        return self._sources.get((key.kind, "")) or self._sources.get((key.kind, key.namespace))

    def revise(self, key: ObjectKey, value: ValueT) -> None:
        """Replace the value of an object that has one; the observer is not called."""
        source = self.source_of(key)
        if source is not None and key in self._records[source].values:
            self._records[source].values[key] = value

    # For reflectors

    def start_listing(self, source: Source, began_at: float) -> None:
        """Begin a list, or begin it again: what it shows counts at once, what it lacks only at its end.

        `began_at` is when its request was sent, in monotonic seconds. A source that has failed stays so until the list is complete.
        """
        record = self._records[source]
        record.unseen = set(record.values)
        record.began_at = began_at
        record.arrived_objects, record.arrived_nameless = 0, False
        if not isinstance(record.state, Failed):
            self._change_state(source, record, Listing())

    def put(self, source: Source, item: Item, *, is_added: bool = True) -> None:
        """Record an object as it is now; `is_added` is False for one that was there before."""
        record, key = self._records[source], item.key
        if is_added:
            _count(record, 1)
        if key is None:
            self._note_nameless(source, record)
            return
        if record.unseen:
            record.unseen.discard(key)
        value = self._resolve(item)
        if value is not KEEP:
            self._replace(record, key, value)

    def remove(self, source: Source, item: Item) -> None:
        """Record that an object was deleted; `item` is its last state."""
        record, key = self._records[source], item.key
        _count(record, -1)
        if key is None:
            self._note_nameless(source, record)
            return
        if record.unseen:
            record.unseen.discard(key)
        self._replace(record, key, None)

    def infer_absences(self, source: Source) -> bool:
        """Remove one slice of what the list that has arrived lacks; return True while more is left.

        A list with a nameless object removes nothing: any of the missing objects may be that one.
        """
        record = self._records[source]
        if not record.unseen:
            return False
        if record.arrived_nameless:
            record.unseen.clear()
            return False
        for _ in range(min(SLICE, len(record.unseen))):
            key = record.unseen.pop()
            before = record.values.pop(key)
            self._observer.on_object(key, before, None, Evidence.ABSENT, None)
        return bool(record.unseen)

    def finish_listing(self, source: Source, at: float) -> None:
        """Record that the list is complete; `at` is when it ended, in seconds of the clock."""
        while self.infer_absences(source):
            pass
        record = self._records[source]
        record.unseen = None
        record.objects, record.has_nameless = record.arrived_objects, record.arrived_nameless
        record.listed_at, record.list_began_at = at, record.began_at
        self._change_state(source, record, Synced())

    def fail(self, source: Source, problem: str, cause: str) -> None:
        """Record that a source cannot be listed or watched: its values stay."""
        record = self._records[source]
        record.unseen = None
        since = record.state.since if isinstance(record.state, Failed) else self._clock()
        self._change_state(source, record, Failed(since, problem, cause))

    def resume(self, source: Source, until: str) -> None:
        """Record that a listed source is watched again, and behind until it reaches a version."""
        record = self._records[source]
        if record.listed_at is not None and record.unseen is None:
            self._change_state(source, record, CatchingUp(until))

    def caught_up(self, source: Source) -> None:
        """Record that a resumed source has reached the version it had to."""
        record = self._records[source]
        if isinstance(record.state, CatchingUp):
            self._change_state(source, record, Synced())

    def _replace(self, record: _Record[ValueT], key: ObjectKey, value: ValueT | None) -> None:
        before = record.values.get(key)
        if value is not None:
            if before == value:
                return
            record.values[key] = value
        elif before is not None:
            del record.values[key]
        if record.unseen is None:
            self._observer.on_object(key, before, value, Evidence.EVENT, self._clock())
        else:
            self._observer.on_object(key, before, value, Evidence.LISTED, None)

    def _note_nameless(self, source: Source, record: _Record[ValueT]) -> None:
        record.arrived_nameless = True
        if not record.has_nameless:
            record.has_nameless = True
            self._observer.on_source(source, record.status())

    def _change_state(self, source: Source, record: _Record[ValueT], state: SourceState) -> None:
        before, record.state = record.state, state
        if _essence(before) != _essence(state) or isinstance(state, Synced):
            self._observer.on_source(source, record.status())


class NamespaceGate:
    """The namespaces that a selector opens, and the targets of those that it shuts; without `selects` everything counts.

    What has no namespace always does.
    """

    def __init__(self, *, selects: bool) -> None:
        self._selects = selects
        self._open: set[str] = set()
        # Targets that do not count, by namespace and ID.
        self._shut: dict[str, dict[str, tuple[Target, ...]]] = {}

    def is_shut(self, namespace: str) -> bool:
        """Return True if the targets of a namespace do not count."""
        return self._selects and bool(namespace) and namespace not in self._open

    def needed(self, source: Source) -> tuple[Source, ...]:
        """Return the sources that show together which objects of a source are there and selected."""
        is_gated = self._selects and source.kind is not Kind.NODE
        return (*source.needed, Source(Kind.NAMESPACE)) if is_gated else source.needed

    def turn(
        self, namespace: str, counting: Iterable[tuple[Target, ...]], *, is_selected: bool
    ) -> tuple[Target, ...]:
        """Open or shut a namespace; return its targets if that is a change, of all that are `counting`."""
        if not self._selects or is_selected is (namespace in self._open):
            return ()
        if is_selected:
            self._open.add(namespace)
            return tuple(chain.from_iterable(self._shut.pop(namespace, {}).values()))
        self._open.discard(namespace)
        targets = tuple([one for one in chain.from_iterable(counting) if one.key.namespace == namespace])
        for target in targets:
            self.add(target, (target,))
        return targets

    def add(self, target: Target, alone: tuple[Target, ...]) -> bool:
        """Return True if a target counts, and note it otherwise; `alone` holds it by itself."""
        if not self.is_shut(target.key.namespace):
            return True
        targets = self._shut.setdefault(target.key.namespace, {})
        others = targets.get(target.id)
        targets[target.id] = (*others, target) if others else alone
        return False

    def remove(self, target: Target) -> bool:
        """Return True if a target counted, and forget it otherwise."""
        if not self.is_shut(target.key.namespace):
            return True
        targets = self._shut.get(target.key.namespace, {})
        if rest := tuple(one for one in targets.pop(target.id, ()) if one.key != target.key):
            targets[target.id] = rest
        if not targets:
            self._shut.pop(target.key.namespace, None)
        return False


def _count(record: _Record[ValueT], step: int) -> None:
    if record.unseen is not None:
        record.arrived_objects = max(0, record.arrived_objects + step)
    else:
        record.objects = max(0, record.objects + step)


def _essence(state: SourceState) -> tuple[type, str]:
    """Return what makes a state another one to observers."""
    return type(state), state.problem if isinstance(state, Failed) else ""
