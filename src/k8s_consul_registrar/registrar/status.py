"""What the reconciler last saw and did, as values an operator's endpoints can read."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from k8s_consul_registrar.model import ObjectKey, Rejection
from k8s_consul_registrar.registrar.brake import Held
from k8s_consul_registrar.registrar.plan import Conflict

# So many passes are remembered for whoever looks.
RECENT = 20


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass: what was written, what was left alone, and what went wrong.

    `refused` counts the writes that Consul refused one by one, or that somebody else came before.
    `seconds` is how long it took.
    """

    registered: int = 0
    updated: int = 0
    deregistered: int = 0
    unchanged: int = 0
    refused: int = 0
    rejected: int = 0
    conflicts: tuple[Conflict, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    held: tuple[Held, ...] = ()
    kept: int = 0
    seconds: float = 0.0

    @property
    def outcome(self) -> str:
        """One of `metrics.PASS_OUTCOMES`."""
        return "partial" if self.refused else "success"

    @property
    def writes(self) -> int:
        """How many services were written or removed."""
        return self.registered + self.updated + self.deregistered


class PassRecord(NamedTuple):
    """A pass that was made; `at` is when it ended, in seconds of the epoch."""

    is_full: bool
    at: float
    report: PassReport


class LostAgent(NamedTuple):
    """An agent that is gone, and what is to become of our services at its node.

    `since` is when it was first seen so, `due` when the node may be cleared, both in monotonic seconds;
    `stays` counts by reason the services that a clearing left, empty before the first.
    """

    node: str
    since: float
    due: float
    stays: Mapping[str, int]


@dataclass(slots=True)
class RegistrarStatus:
    """Where the registrar stands. `ticked_at` is when its loop last turned, or a pass last wrote, in monotonic seconds.

    `refused` says of service IDs why Consul refuses them, `conflicts` which IDs somebody else holds, `lost`
    which objects lost an ID to another; `held` is what the brake holds; `lost_agents` are those whose nodes
    may have services of ours.
    """

    recent: deque[PassRecord] = field(default_factory=lambda: deque(maxlen=RECENT))
    refused: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, Conflict] = field(default_factory=dict)
    lost: dict[ObjectKey, Rejection] = field(default_factory=dict)
    held: tuple[Held, ...] = ()
    lost_agents: tuple[LostAgent, ...] = ()
    is_standby: bool = False
    has_synced: bool = False
    is_draining: bool = False
    ticked_at: float = 0.0
    consul_problem: str = ""
    source_problems: dict[str, str] = field(default_factory=dict)

    def readiness(self) -> str:
        """Return why the registrar is not ready, empty when it is.

        Once it has synced it stays ready: losing sight of a server changes nothing that is registered.
        """
        if self.is_draining:
            return "stopping"
        if self.has_synced:
            return ""
        problems = [*self.source_problems.values(), *([self.consul_problem] if self.consul_problem else [])]
        return "not synced yet" + (f": {'; '.join(problems)}" if problems else "")
