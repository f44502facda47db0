"""Departures: objects that were seen to stop asking for a service ID. Pure."""

from collections.abc import Mapping

from k8s_consul_registrar.model import ObjectKey

# Departures that are remembered at most. One that is forgotten becomes an inference, which is safe.
MOST_DEPARTURES = 50_000


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
