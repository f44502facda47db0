"""The service IDs whose targets changed and that nobody has looked at since, with when an event told of them."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet


class Dirty:
    """Collects service IDs until they are taken; only what is in here carries a moment."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._heard: dict[str, float] = {}

    def mark(self, service_id: str, at: float | None) -> None:
        """Note a change heard of at a moment of the clock, None where a list told; the first moment stays."""
        if service_id:
            self._ids.add(service_id)
            if at is not None:
                self._heard.setdefault(service_id, at)

    def take(self) -> tuple[AbstractSet[str], Mapping[str, float]]:
        """Return the IDs and the moments, and begin anew."""
        taken = self._ids, self._heard
        self._ids, self._heard = set(), {}
        return taken
