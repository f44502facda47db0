"""What following one source amounts to, counted for whoever shows it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from k8s_consul_registrar.errors import (
    ClusterAhead,
    ClusterBusy,
    ClusterError,
    ClusterExpired,
    ClusterForbidden,
    ClusterRefused,
    ClusterSilent,
    ClusterUnauthorized,
    ClusterUnreachable,
)

# Beside `ClusterError.cause`: a watch that the server ended as it was asked to, in its own time; and one
# that we ended since a new list was due.
ENDED, RELIST = "ended", "relist"
CAUSES = (
    ENDED,
    RELIST,
    *(
        error.cause
        for error in (
            ClusterUnreachable,
            ClusterUnauthorized,
            ClusterForbidden,
            ClusterExpired,
            ClusterAhead,
            ClusterSilent,
            ClusterBusy,
            ClusterRefused,
            ClusterError,
        )
    ),
)


@dataclass(frozen=True, slots=True)
class Activity:
    """One source at one moment.

    `lists` were completed; `restarts` are lists and watches that ended, by cause, with every one of `CAUSES`;
    `heard_at` is when an event, a bookmark or a complete list last came, in monotonic seconds, None before the
    first.
    """

    lists: int = 0
    restarts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    heard_at: float | None = None


@dataclass(slots=True)
class ActivityCounter:
    """Counts for one source."""

    lists: int = 0
    restarts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(CAUSES, 0)))
    heard_at: float | None = None

    def ended(self, cause: str) -> None:
        """Count a list or a watch that ended; a cause that is none of `CAUSES` counts as an error."""
        self.restarts[cause if cause in self.restarts else ClusterError.cause] += 1

    def snapshot(self) -> Activity:
        """Return the counts as a value."""
        return Activity(self.lists, dict(self.restarts), self.heard_at)
