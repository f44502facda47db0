"""The state and the counts of one followed source, as values, and the order of resource versions."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import TypeAlias

import msgspec

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
from k8s_consul_registrar.model import Kind

# Kinds whose first list waits for those of others, and the most seconds that it waits.
AFTER: Mapping[Kind, tuple[tuple[Kind, ...], float]] = {
    Kind.POD: ((Kind.NODE, Kind.NAMESPACE), 1.0),
    Kind.SERVICE: ((Kind.POD, Kind.NAMESPACE), 60.0),
    Kind.ENDPOINT: ((Kind.SERVICE,), 60.0),
}
# The form in which versions can be compared (Kubernetes API concepts, "Resource versions"; KEP-5504).
_NUMERIC = re.compile(r"0|[1-9][0-9]*", re.ASCII)


class Listing(msgspec.Struct, frozen=True):
    """A list is due or arriving, and nothing has failed since it was."""


class CatchingUp(msgspec.Struct, frozen=True):
    """The watch was resumed, and events up to version `until` may still be missing.

    `until` is empty while the API server has not named its version yet.
    """

    until: str


class Synced(msgspec.Struct, frozen=True):
    """The Store holds everything the API server had when the list or the resumed watch began."""


class Failed(msgspec.Struct, frozen=True):
    """The source cannot be listed or watched since a moment of the monotonic clock.

    `problem` is for people; `cause` is a bounded word for metrics (`ClusterError.cause`).
    """

    since: float
    problem: str
    cause: str


SourceState: TypeAlias = Listing | CatchingUp | Synced | Failed


class SourceStatus(msgspec.Struct, frozen=True):
    """One source at one moment.

    `listed_at` is when the last complete list ended and `list_began_at` when its first request was sent,
    both in monotonic seconds. `has_nameless` is True while the last list, or an event since, held an object
    without a readable name: any absence may be that object's.
    """

    state: SourceState = Listing()
    listed_at: float | None = None
    list_began_at: float | None = None
    objects: int = 0
    has_nameless: bool = False

    @property
    def proves_absence(self) -> bool:
        """True if an object the Store does not hold did not exist when the list or the resume began."""
        return isinstance(self.state, Synced) and self.listed_at is not None and not self.has_nameless

    @property
    def is_followed(self) -> bool:
        """True if the source was listed once and has not failed since it last worked."""
        return self.listed_at is not None and not isinstance(self.state, Failed)

    @property
    def problem(self) -> str:
        """The reason why the source has failed, empty while it has not."""
        return self.state.problem if isinstance(self.state, Failed) else ""


def compare_versions(one: str, other: str) -> int | None:
    """Return -1, 0 or 1 as one version is older, equal or newer; None where the order is unknown.

    Versions are compared as text of a length, since a server may send more digits than `int` accepts.
    """
    if one == other:
        return 0
    if not (_NUMERIC.fullmatch(one) and _NUMERIC.fullmatch(other)):
        return None
    return -1 if (len(one), one) < (len(other), other) else 1


def is_reached(version: str, until: str) -> bool:
    """Return whether a version is known to be at least another; an empty one reaches nothing."""
    order = compare_versions(version, until) if version and until else None
    return order is not None and order >= 0


# Beside `ClusterError.cause`: a watch that the server ended in its own time, and one that we ended because
# a new list was due.
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


class WatchStats(msgspec.Struct, frozen=True):
    """One source at one moment.

    `lists` were completed; `restarts` are lists and watches that ended, by cause, with every one of `CAUSES`;
    `heard_at` is when an event, a bookmark or a complete list last came, in monotonic seconds, None before
    the first. `internal_errors` are exceptions that no answer of a server should cause.
    """

    lists: int = 0
    restarts: Mapping[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    heard_at: float | None = None
    internal_errors: int = 0


class WatchCounts(msgspec.Struct):
    """The counts of one source as they grow; `heard_at` is when it last brought anything, in monotonic seconds."""

    lists: int = 0
    restarts: Counter[str] = msgspec.field(default_factory=lambda: Counter(dict.fromkeys(CAUSES, 0)))
    heard_at: float | None = None
    internal_errors: int = 0

    def ended(self, cause: str) -> None:
        """Count a list or a watch that ended; a cause that is none of `CAUSES` counts as an error."""
        self.restarts[cause if cause in self.restarts else ClusterError.cause] += 1

    def stats(self) -> WatchStats:
        """Return the counts as a value."""
        return WatchStats(self.lists, dict(self.restarts), self.heard_at, self.internal_errors)
