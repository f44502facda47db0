"""What Consul holds and no list shows any more, gathered source by source and judged at the end: pure."""

from collections import defaultdict
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from k8s_consul_registrar.model import ObjectKey, Service, Source
from k8s_consul_registrar.registrar.brake import Absence, BrakeRules, Held, Memory, judge_absence
from k8s_consul_registrar.registrar.ownership import kind_of
from k8s_consul_registrar.targets.wanted import Wanted


@dataclass(slots=True)
class _Gathered:
    """What Consul holds of one source: how many services, and which of them its last list does not show."""

    held: int = 0
    absent: list[Service] = field(default_factory=list)


class Judged(NamedTuple):
    """Which services may go, what the brake holds, and what it wants back the next time."""

    released: list[Service]
    held: list[Held]
    memory: Memory


class Absences:
    """Counts services of ours by source as they pass by, and keeps those that are absent from it."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._sources: defaultdict[Source, _Gathered] = defaultdict(_Gathered)

    def count(self, service: Service, key: ObjectKey | None) -> Source | None:
        """Count a service among what its source holds, and return that, None where we follow no such source.

        `key` is its object, None where it does not say (the original program's Nodes).
        """
        if key is not None:
            source = self._wanted.source_of(key)
        else:
            kind = kind_of(service)
            bare = Source(kind) if kind is not None else None
            source = bare if bare in self._wanted.sources else None
        if source is not None:
            self._sources[source].held += 1
        return source

    def add(self, source: Source, service: Service) -> None:
        """Keep a service, counted before, whose object its source does not show."""
        self._sources[source].absent.append(service)

    def leave(self, ids: AbstractSet[str]) -> None:
        """Forget that these are absent."""
        for gathered in self._sources.values():
            gathered.absent = [service for service in gathered.absent if service.id not in ids]

    def judge(self, rules: BrakeRules, memory: Memory) -> Judged:
        """Ask the brake what may go of each source whose list proves absence."""
        released: list[Service] = []
        held: list[Held] = []
        remembered = dict(memory)
        for source, state in self._wanted.sources.items():
            if state.listed_at is None or not state.proves_absence:
                continue
            gathered = self._sources[source]
            absence = Absence(
                source,
                {service.id for service in gathered.absent},
                gathered.held,
                state.objects == 0,
                state.listed_at,
            )
            judgement = judge_absence(absence, memory.get(source), rules)
            remembered[source] = judgement.memory
            released.extend(one for one in gathered.absent if one.id in judgement.released)
            if judgement.held is not None:
                held.append(judgement.held)
        return Judged(released, held, remembered)
