"""How long changes take from the event that tells of them to Consul."""

import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet


class Lag:
    """Remembers when events told of changes that are not written yet; bounded by what is owed to Consul.

    `observe` is told of each change that is written how many seconds that took.
    """

    def __init__(self, observe: Callable[[float], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._observe = observe
        self._clock = clock
        self._heard: dict[str, float] = {}

    def __len__(self) -> int:
        """Return of how many service IDs a write is awaited."""
        return len(self._heard)

    def heard(self, moments: Mapping[str, float]) -> None:
        """Take in changes by service ID; of several to one that were not written the first counts."""
        for service_id, at in moments.items():
            self._heard.setdefault(service_id, at)

    def written(self, ids: Iterable[str]) -> None:
        """Note that Consul has acknowledged writes of these services."""
        if self._heard:
            now = self._clock()
            for service_id in ids:
                if (at := self._heard.pop(service_id, None)) is not None:
                    self._observe(now - at)

    def still_owed(self, ids: AbstractSet[str]) -> None:
        """Forget all but these: nothing of the rest had to be written."""
        if self._heard:
            self._heard = {one: at for one, at in self._heard.items() if one in ids}
