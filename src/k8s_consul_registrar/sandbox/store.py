"""A versioned object store with a history of changes, in the place of etcd.

All resources share one revision. Objects are stored as the JSON bytes that are sent, so that a long list needs
no encoding, beside the few fields that selectors use.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from k8s_consul_registrar.sandbox.resources import RESOURCES, Resource

_TYPE_FIELDS = frozenset({"kind", "apiVersion"})


class HistoryExpiredError(LookupError):
    """A revision older than the history; `oldest` is the oldest that the store can serve."""

    def __init__(self, oldest: int) -> None:
        super().__init__(f"the history begins at {oldest}")
        self.oldest = oldest


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of one object; `body` is its JSON without kind and apiVersion, as in lists."""

    key: str
    namespace: str
    name: str
    revision: int
    body: bytes
    labels: Mapping[str, str]
    fields: Mapping[str, str]

    def decode(self) -> dict[str, Any]:
        """Return the object as a new value."""
        decoded: dict[str, Any] = msgspec.json.decode(self.body)
        return decoded

    def at(self, revision: int) -> "Stored":
        """Return this object with another resourceVersion, as in DELETED events."""
        return encode(self.key, self.decode(), revision)


class Change(NamedTuple):
    """One write: the object before and after it, None where there is none."""

    revision: int
    before: Stored | None
    after: Stored | None


class Backup(NamedTuple):
    """The whole content of a store at one revision."""

    revision: int
    objects: Mapping[str, Mapping[str, Stored]]


@dataclass(slots=True)
class _Table:
    """The objects of one resource, their keys in order, and their changes."""

    objects: dict[str, Stored] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    floor: int = 0  # changes up to this revision are forgotten


def encode(key: str, obj: Mapping[str, Any], revision: int) -> Stored:
    """Return an object in its stored form with this resourceVersion."""
    metadata = {**obj["metadata"], "resourceVersion": str(revision)}
    body = {name: value for name, value in obj.items() if name not in _TYPE_FIELDS}
    body["metadata"] = metadata
    namespace = metadata.get("namespace", "")
    return Stored(
        key=key,
        namespace=namespace,
        name=metadata["name"],
        revision=revision,
        body=msgspec.json.encode(body),
        labels=metadata.get("labels") or {},
        fields={
            "metadata.name": metadata["name"],
            "metadata.namespace": namespace,
            "status.phase": (obj.get("status") or {}).get("phase", ""),
            "spec.nodeName": (obj.get("spec") or {}).get("nodeName", ""),
        },
    )


class Store:
    """Objects by resource and key, with their latest changes.

    The store keeps `history` changes of each resource. `epoch` counts restores: after one, a watch must start
    again.
    """

    def __init__(self, *, history: int = 10_000, revision: int = 1) -> None:
        self.revision = revision
        self.epoch = 0
        self._history = history
        self._tables = {resource.plural: _Table(floor=revision) for resource in RESOURCES}
        self._listeners: list[Callable[[], None]] = []

    def get(self, resource: Resource, key: str) -> Stored | None:
        """Return the current version of an object."""
        return self._tables[resource.plural].objects.get(key)

    def oldest(self, resource: Resource) -> int:
        """Return the oldest revision after which all changes are known."""
        return self._tables[resource.plural].floor

    def put(self, resource: Resource, key: str, obj: Mapping[str, Any]) -> Stored:
        """Write an object; an equal one is not written again."""
        table = self._tables[resource.plural]
        before = table.objects.get(key)
        if before is not None and before.decode() == encode(key, obj, before.revision).decode():
            return before
        after = encode(key, obj, self.revision + 1)
        if before is None:
            insort(table.keys, key)
        table.objects[key] = after
        self._record(table, before, after)
        return after

    def delete(self, resource: Resource, key: str) -> Stored:
        """Remove an object and return its last version with the revision of the removal."""
        table = self._tables[resource.plural]
        before = table.objects.pop(key)
        del table.keys[bisect_left(table.keys, key)]
        self._record(table, before, None)
        return before.at(self.revision)

    def select(self, resource: Resource, *, start: str = "", at: int | None = None) -> list[Stored]:
        """Return the objects from the key `start` on, in order, as of revision `at`.

        Raises HistoryExpiredError for a revision before the history.
        """
        table = self._tables[resource.plural]
        changes = [] if at is None else self.changes(resource, since=at)
        if not changes:
            objects = table.objects
            return [objects[key] for key in table.keys[bisect_left(table.keys, start) :]]
        past = dict(table.objects)
        for change in reversed(changes):
            if change.before is not None:
                past[change.before.key] = change.before
            elif change.after is not None:
                del past[change.after.key]
        return [past[key] for key in sorted(past) if key >= start]

    def page(
        self, resource: Resource, limit: int, *, start: str = "", at: int | None = None
    ) -> tuple[list[Stored], int]:
        """Return the first `limit` objects of `select`, and the number of those that follow."""
        if at is not None and self.changes(resource, since=at):
            items = self.select(resource, start=start, at=at)
            return items[:limit], max(0, len(items) - limit)
        table = self._tables[resource.plural]
        first = bisect_left(table.keys, start)
        keys = table.keys[first : first + limit]
        return [table.objects[key] for key in keys], len(table.keys) - first - len(keys)

    def changes(self, resource: Resource, *, since: int) -> list[Change]:
        """Return the changes after revision `since`; HistoryExpiredError if some are forgotten."""
        table = self._tables[resource.plural]
        if since < table.floor:
            raise HistoryExpiredError(table.floor)
        return table.changes[bisect_right(table.changes, since, key=lambda change: change.revision) :]

    def compact(self) -> None:
        """Forget all changes so far, like a compaction of etcd."""
        for table in self._tables.values():
            table.changes.clear()
            table.floor = self.revision

    def backup(self) -> Backup:
        """Return the current content."""
        objects = {plural: dict(table.objects) for plural, table in self._tables.items()}
        return Backup(self.revision, objects)

    def restore(self, backup: Backup) -> None:
        """Go back to a backup and its revision, like a restore of etcd from a snapshot."""
        self.revision = backup.revision
        for plural, objects in backup.objects.items():
            self._tables[plural] = _Table(dict(objects), sorted(objects), floor=backup.revision)
        self.epoch += 1
        self._notify()

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` after every change until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _record(self, table: _Table, before: Stored | None, after: Stored | None) -> None:
        self.revision += 1
        table.changes.append(Change(self.revision, before, after))
        if len(table.changes) > 2 * self._history:  # rarely, because it moves the whole list
            forgotten = len(table.changes) - self._history
            table.floor = table.changes[forgotten - 1].revision
            del table.changes[:forgotten]
        self._notify()

    def _notify(self) -> None:
        for listener in tuple(self._listeners):
            listener()
