"""Brake: holds a mass removal that is only inferred, until later reads agree. Pure; moments are monotonic seconds.

A wrong kubeconfig, a broken selector or a half-restored cluster look like many objects that are gone. Facts
(a deletion seen in an event, a listed object that asks for nothing) never come here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from k8s_consul_registrar.model import Kind, ObjectKey, Source

LEAST = 3  # services
SHARE = 0.3  # of what is held


@dataclass(frozen=True, slots=True)
class BrakeRules:
    """Seconds for which reads must agree on a mass removal, and whether mass removals are held.

    A removal is a mass removal if at least LEAST services and more than SHARE of what is held would go, or
    if a source shows nothing at all while LEAST or more are held; in one source, or in all sources of a kind
    together. `confirm_start` applies to the latter and to the first judgement after a start: a wrong
    kubeconfig looks like that.
    """

    confirm: float = 60.0
    confirm_start: float = 600.0
    allow_mass: bool = False


class Ground(StrEnum):
    """Reason why a service may be removed."""

    EVENT = "event"  # an event showed that its object does not ask for it
    LIST = "list"  # a list, or a read of the object, showed that
    ABSENCE = "confirmed absence"  # its object is missing from a list, and a later read confirmed that
    QUOTA = "over the quota"  # its namespace has more targets than it may have
    ELSEWHERE = "held elsewhere"  # it is where the present settings want it
    LEFT = "left by the agent"  # the agent has removed it, and the catalog still shows it
    PURGE = "purge"  # an operator asked for it


class Proof(msgspec.Struct, frozen=True, gc=False):
    """Proof that a service may go: the object that it was of, and the generation of the departure, 0 without one.

    `brake` is its decision; facts do not come to it.
    """

    ground: Ground
    generation: int = 0
    brake: str = "not asked"
    key: ObjectKey | None = None


class Absence(msgspec.Struct, frozen=True):
    """A service whose object is confirmed absent, or that the settings leave out.

    `confirmed_at` is when the read that confirmed it began. `is_proven_at_start` is True if the short wait
    is enough even right after a start: the object was asked for by name, or its Node is proven deleted.
    `is_unselected` is True if the object exists, or could not be asked for, and the settings leave it out: it is no
    longer selected, or over the quota, as `ground` says.
    """

    confirmed_at: float
    is_proven_at_start: bool = False
    is_unselected: bool = False
    ground: Ground = Ground.ABSENCE


class SourceAbsences(msgspec.Struct, frozen=True):
    """The confirmed absences of one source that proves absence.

    `held` is how many services of this registrar's belong to the source, the absent ones included;
    `is_empty` is True if its last list showed no object. `unconfirmed` absences are not judged yet, and count:
    a source is not known before the first time that there are none.
    """

    absent: Mapping[str, Absence]
    held: int
    is_empty: bool = False
    unconfirmed: int = 0


class Held(msgspec.Struct, frozen=True):
    """Removals that the brake holds: of which source, since when, until when reads must agree, and on what ground."""

    source: Source
    ids: tuple[str, ...]
    since: float
    due: float
    ground: Ground = Ground.ABSENCE


class SourceMemory(msgspec.Struct, frozen=True):
    """The time since which each service of a source is confirmed absent, and the seconds that each waits in all."""

    since: Mapping[str, float] = msgspec.field(default_factory=dict)
    waits: Mapping[str, float] = msgspec.field(default_factory=dict)


class Memory(msgspec.Struct, frozen=True):
    """The brake's memory, to be passed back at its next judgement.

    `removals` are the inferred removals it released: when, of which source, and how many. `judged` are the
    sources that were judged at least once.
    """

    sources: Mapping[Source, SourceMemory] = msgspec.field(default_factory=dict)
    judged: frozenset[Source] = frozenset()
    removals: tuple[tuple[float, Source, int], ...] = ()


class Judgement(msgspec.Struct, frozen=True):
    """The services that may go now, the removals that are held, and the memory for the next time.

    `verdicts` say why each of the former was let go.
    """

    released: frozenset[str]
    held: tuple[Held, ...]
    memory: Memory
    verdicts: Mapping[str, str] = msgspec.field(default_factory=dict)


class _Extent(msgspec.Struct, frozen=True):
    """The absences of a source as part of something larger, and whether they are its first ones."""

    is_mass: bool
    is_total: bool
    is_first: bool


def judge(
    absences: Mapping[Source, SourceAbsences],
    memory: Memory,
    rules: BrakeRules,
    now: float,
    *,
    unready: Iterable[Kind] = (),
) -> Judgement:
    """Decide which absent services may go, looking at each source and at each kind as a whole.

    `unready` are kinds of which some source was neither listed nor failed for long since the start: nothing
    inferred of these is released yet. An ID goes once reads at least its wait apart, and all between them,
    miss it; one that came back starts again.
    """
    removals = tuple(one for one in memory.removals if now - one[0] < rules.confirm_start)
    unready = frozenset(unready)
    mass, total = _mass_sources(absences, removals)
    released: dict[Source, frozenset[str]] = {}
    held: list[Held] = []
    verdicts: dict[str, str] = {}
    sources = {source: one for source, one in memory.sources.items() if source not in absences}
    for source, found in absences.items():
        before = memory.sources.get(source, SourceMemory())
        extent = _Extent(source in mass, source in total, is_first=source not in memory.judged)
        waits = _waits(found, before, rules, extent)
        since = {one: before.since.get(one, absence.confirmed_at) for one, absence in found.absent.items()}
        is_ready = source.kind not in unready
        released[source] = frozenset(
            one
            for one, absence in found.absent.items()
            if is_ready and absence.confirmed_at - since[one] >= waits[one]
        )
        verdicts |= {one: _verdict(waits[one], rules) for one in released[source]}
        kept = {one: since[one] for one in since if one not in released[source]}
        if kept:
            sources[source] = SourceMemory(kept, {one: waits[one] for one in kept})
        if is_ready:
            held += _held(source, kept, waits, found, now)
    removals += tuple((now, source, len(ids)) for source, ids in released.items() if ids)
    return Judgement(
        frozenset().union(*released.values()),
        tuple(held),
        Memory(sources, memory.judged | _judged(absences, unready), removals),
        verdicts,
    )


def _held(
    source: Source, since: Mapping[str, float], waits: Mapping[str, float], found: SourceAbsences, now: float
) -> Iterator[Held]:
    """Yield the removals of a source that are held, by ground."""
    for ground in (Ground.ABSENCE, Ground.QUOTA):
        ids = tuple(sorted(one for one in since if found.absent[one].ground is ground))
        if ids:
            due = min(since[one] + waits[one] for one in ids)
            yield Held(source, ids, min(since[one] for one in ids), max(due, now), ground)


def _verdict(wait: float, rules: BrakeRules) -> str:
    if rules.allow_mass:
        return "ALLOW_MASS_DEREGISTER"
    return f"held for {wait:g} s" if wait else "no mass removal"


def _judged(absences: Mapping[Source, SourceAbsences], unready: frozenset[Kind]) -> set[Source]:
    return {one for one, found in absences.items() if one.kind not in unready and not found.unconfirmed}


def _waits(
    found: SourceAbsences, before: SourceMemory, rules: BrakeRules, extent: _Extent
) -> dict[str, float]:
    """Return how long reads must agree on each absence, in seconds; 0 lets it go at once.

    While a mass removal lasts, no wait becomes shorter, unless the absence itself was proven meanwhile.
    """
    longest = max(before.waits.values(), default=0.0)
    waits: dict[str, float] = {}
    for service_id, absence in found.absent.items():
        if rules.allow_mass:
            wait = 0.0
        elif absence.is_unselected:
            wait = rules.confirm_start
        elif not extent.is_mass:
            wait = 0.0
        elif extent.is_total:
            wait = rules.confirm_start
        elif absence.is_proven_at_start:
            wait = rules.confirm
        else:
            wait = rules.confirm_start if extent.is_first else rules.confirm
            wait = max(wait, before.waits.get(service_id, longest))
        waits[service_id] = wait
    return waits


def _mass_sources(
    absences: Mapping[Source, SourceAbsences],
    removals: Sequence[tuple[float, Source, int]],
) -> tuple[frozenset[Source], frozenset[Source]]:
    """Return the sources in a mass removal, their own or their kind's, and those where nothing is left.

    Recent inferred removals count as if they were still held and absent, so that a mass removal
    in small portions is one.
    """
    gone: defaultdict[Source, int] = defaultdict(int)
    for _, source, count in removals:
        gone[source] += count
    mass: set[Source] = set()
    total: set[Source] = set()
    of_kinds = [[source for source in absences if source.kind is kind] for kind in Kind]
    for sources in (*([source] for source in absences), *of_kinds):
        absent = sum(len(absences[one].absent) + absences[one].unconfirmed + gone[one] for one in sources)
        held = sum(absences[one].held + gone[one] for one in sources)
        is_total = all(absences[one].is_empty for one in sources) and held >= LEAST
        if is_total:
            total.update(sources)
        if is_total or (absent >= LEAST and absent > SHARE * held):
            mass.update(sources)
    return frozenset(mass), frozenset(total)
