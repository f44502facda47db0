"""What the admin endpoints show of a registrar: frozen values, and the Protocol they are read through."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from k8s_consul_registrar.model import Kind, ObjectKey, Rejection, Service, Source


class TargetState(StrEnum):
    """Where a target stands in Consul."""

    REGISTERED = "registered"
    PENDING = "pending"  # not written yet
    REFUSED = "refused"  # Consul refuses the write
    CONFLICT = "conflict"  # the ID is held by something not ours
    STANDBY = "standby"  # another replica leads and writes
    KEPT = "kept"  # nothing asks for it now, and nothing proves that it may go


class SeenTarget(NamedTuple):
    """A target and where it stands; `detail` says why where that needs saying.

    `service` is what Consul holds or is to hold, with meta keys as the registrar names them: a renaming for
    Consul is the reader's (`MetaNames`).
    """

    service: Service
    key: ObjectKey
    state: TargetState
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SeenConflict:
    """An ID that an object asks for and something not ours holds."""

    id: str
    key: ObjectKey
    holder: str


@dataclass(frozen=True, slots=True)
class SeenBrake:
    """Removals of one source that the brake holds.

    `count` is how many, `sample` names some of them by ID; `since` and `until` are in seconds of the epoch.
    """

    source: str
    count: int
    sample: tuple[str, ...]
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class SeenLostAgent:
    """An agent that is gone: its node is cleared of ours when `due`, apart from what `stays`, by reason.

    `since` and `due` are in seconds of the epoch.
    """

    node: str
    since: float
    due: float
    stays: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SeenSource:
    """How well a source is known; `listed_at` is in seconds of the epoch, None before the first list."""

    name: str
    is_followed: bool
    listed_at: float | None = None
    objects: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SeenPass:
    """One pass: `kind` is `full` or `changes`, `at` when it ended in seconds of the epoch.

    `counts` is in the order it is to be shown in (`registered`, `updated`, …); `outcome` is `success`,
    `partial` or `failure`.
    """

    kind: str
    outcome: str
    at: float
    seconds: float
    counts: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SeenConsul:
    """Consul as the registrar last found it; `backend` is `agent`, `catalog` or `none`."""

    backend: str
    address: str = ""
    is_up: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SeenLeader:
    """Whether this replica writes: `role` is `single`, `leader` or `standby`; `holder` names who leads."""

    role: str = "single"
    holder: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it may be shown to anybody who reaches the page."""

    name: str
    value: str

    @classmethod
    def secret(cls, name: str, *, is_set: bool) -> "Setting":
        """Return a setting whose value nobody is to see."""
        return cls(name, "set" if is_set else "not set")


@dataclass(frozen=True, slots=True)
class Status:
    """Everything about a registrar but its targets and rejections.

    `unready` is why it is not ready, empty when it is. `passes` has the latest first. `started_at` is in
    seconds of the epoch.
    """

    version: str
    cluster: str
    instance: str
    started_at: float
    unready: str
    leader: SeenLeader
    consul: SeenConsul
    sources: tuple[SeenSource, ...] = ()
    conflicts: tuple[SeenConflict, ...] = ()
    brakes: tuple[SeenBrake, ...] = ()
    lost_agents: tuple[SeenLostAgent, ...] = ()
    passes: tuple[SeenPass, ...] = ()
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True, slots=True)
class Scope:
    """The kinds and namespaces of a request; an empty set stands for all of them.

    The namespace of a Node is empty.
    """

    kinds: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset()

    def includes(self, source: Source) -> bool:
        """Return whether a source can show an object of this scope."""
        if self.kinds and source.kind not in self.kinds:
            return False
        if not self.namespaces:
            return True
        if source.kind is Kind.POD and not source.namespace:
            return bool(self.namespaces - {""})
        return source.namespace in self.namespaces


EVERYTHING = Scope()


class Targets(Protocol):
    """Targets that can be rendered."""

    @property
    def generation(self) -> int:
        """A number that is another one whenever `targets` would yield anything else."""

    def targets(self) -> Iterator[SeenTarget]:
        """Yield every target, each ID once.

        The reader gives way to the loop in between, so the iterator stays good while targets come and go:
        it may show either of what changes meanwhile, and `generation` then has moved on.
        """


class TargetsView(Targets, Protocol):
    """The targets of a registrar."""

    def unlisted(self, scope: Scope = EVERYTHING) -> str:
        """Return which sources of a scope were never listed in this process and why, empty if all were."""


class SavedTargets(Targets, Protocol):
    """The targets that an earlier process saved."""

    @property
    def since(self) -> float:
        """The time until which they were up to date, in seconds of the epoch."""


class RegistrarView(TargetsView, Protocol):
    """Everything the status page shows of a registrar."""

    def rejections(self) -> Iterable[Rejection]:
        """Return every object that asks to be scraped and cannot be."""

    def status(self) -> Status:
        """Return the rest; cheap enough for every few seconds."""


class MetaNames(Protocol):
    """What Consul calls a meta key of ours, where the operator renamed some."""

    def __call__(self, key: str, /) -> str:
        """Return the name in Consul."""


def as_they_are(key: str) -> str:
    """Return the same name: nothing was renamed."""
    return key
