"""What following one source amounts to, counted for whoever shows it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

# Beside `ClusterError.cause`: a watch that the server ended as it was asked to, in its own time.
ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Activity:
    """One source at one moment.

    `lists` were completed; `restarts` are watches that ended, by cause (`ClusterError.cause` or "ended");
    `heard_at` is when an event or a bookmark last came, in monotonic seconds, None before the first.
    """

    lists: int = 0
    restarts: Mapping[str, int] = field(default_factory=dict)
    heard_at: float | None = None


@dataclass(slots=True)
class ActivityCounter:
    """Counts for one source."""

    lists: int = 0
    restarts: Counter[str] = field(default_factory=Counter)
    heard_at: float | None = None

    def snapshot(self) -> Activity:
        """Return the counts as a value."""
        return Activity(self.lists, dict(self.restarts), self.heard_at)
