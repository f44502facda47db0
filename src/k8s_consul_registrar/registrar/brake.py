"""Holds a mass removal that is only inferred from a list, until later lists agree."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from k8s_consul_registrar.model import Source


@dataclass(frozen=True, slots=True)
class BrakeRules:
    """When a removal is a mass removal, and how long lists must agree on it, in seconds.

    It is one where at least `least` services and more than `share` of what a source holds would go, or
    where a source shows nothing at all while it holds `least` or more. `confirm_start` is for the latter
    and for the first list after a start: a wrong kubeconfig looks like that.
    """

    least: int = 3
    share: float = 0.3
    confirm: float = 60.0
    confirm_start: float = 600.0
    allow_mass: bool = False


@dataclass(frozen=True, slots=True)
class Absence:
    """What one complete list of a source does not show.

    `absent` are the IDs of services whose object is missing, `held` is how many services of ours the
    source has in Consul, the absent ones included; `is_empty` says the list showed no object.
    `listed_at` is when the list ended, in seconds of a monotonic clock.
    """

    source: Source
    absent: AbstractSet[str]
    held: int
    is_empty: bool
    listed_at: float


@dataclass(frozen=True, slots=True)
class Held:
    """A removal the brake holds: which services, since when, and how long lists must agree in all."""

    source: Source
    ids: tuple[str, ...]
    since: float
    wait: float

    @property
    def due(self) -> float:
        """When a list that still agrees would release it, in seconds of the same clock."""
        return self.since + self.wait


@dataclass(frozen=True, slots=True)
class SourceMemory:
    """What earlier lists of a source said: since when each ID is absent, and the wait they owe."""

    since: Mapping[str, float] = field(default_factory=dict)
    wait: float = 0.0


Memory = Mapping[Source, SourceMemory]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Which absent IDs may go now, what is held, and what to remember of this source."""

    released: frozenset[str]
    held: Held | None
    memory: SourceMemory


def judge_absence(absence: Absence, memory: SourceMemory | None, rules: BrakeRules) -> Judgement:
    """Decide which absent services may go; `memory` is None when no list of the source was judged yet.

    An ID is released once two lists at least `wait` seconds apart, and all between them, miss it: one
    that came back is forgotten, so it starts anew.
    """
    before = memory or SourceMemory()
    is_total = absence.is_empty and absence.held >= rules.least
    is_mass = is_total or (
        len(absence.absent) >= rules.least and len(absence.absent) > rules.share * absence.held
    )
    if not is_mass or rules.allow_mass:
        return Judgement(frozenset(absence.absent), None, SourceMemory())
    wait = rules.confirm_start if is_total or memory is None else rules.confirm
    if before.since:
        wait = max(wait, before.wait)
    since = {service_id: before.since.get(service_id, absence.listed_at) for service_id in absence.absent}
    released = frozenset(
        service_id
        for service_id, at in since.items()
        if absence.listed_at > at and absence.listed_at - at >= wait
    )
    waiting = sorted(since.keys() - released)
    held = None
    if waiting:
        held = Held(absence.source, tuple(waiting), min(since[one] for one in waiting), wait)
    return Judgement(released, held, SourceMemory(since, wait))
