"""Orphaned services: which services at the node of a lost agent may go. Pure.

An agent that ends without leaving stays in the catalog, with all its services, until Consul's servers remove
its node after 72 hours; a registrar whose Pod moved has an agent of another name meanwhile.
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from k8s_consul_registrar.model import CRITICAL, SERF_HEALTH, AgentHealth, ObjectKey, Service, Source
from k8s_consul_registrar.registrar.brake import (
    Absence,
    BrakeRules,
    Ground,
    Held,
    Memory,
    Proof,
    SourceAbsences,
    judge,
)
from k8s_consul_registrar.registrar.decide import Deregister, Infer, Keep, Kept, Rules, Withheld, decide
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.observed import Other, observe
from k8s_consul_registrar.registrar.ownership import Claim


class Watched(NamedTuple):
    """A lost agent: what its check says, and since when it was seen to say so, in monotonic seconds."""

    health: AgentHealth
    since: float


def observe_agents(
    watched: Mapping[str, Watched], seen: Iterable[AgentHealth], own_node: str, now: float
) -> dict[str, Watched]:
    """Return the lost agents by node, after a look that ended at `now` (monotonic seconds).

    An agent that a look does not show starts again, and so does one whose check changed in between: it came
    back and was lost again. A node without the check has no agent, and the registrar's own agent answers,
    whatever the others say of it.
    """
    lost = {}
    for one in seen:
        if one.check != SERF_HEALTH or one.status != CRITICAL or one.node.lower() == own_node.lower():
            continue
        before = watched.get(one.node)
        is_same = before is not None and before.health == one
        lost[one.node] = before if before is not None and is_same else Watched(one, now)
    return lost


def due(watched: Mapping[str, Watched], after: float, now: float) -> list[Watched]:
    """Return the agents that were seen lost for at least `after` seconds."""
    return [one for one in watched.values() if now - one.since >= after]


class Stays(StrEnum):
    """Reason why a service stays at the node of a lost agent: fit for a metric's label."""

    NOT_HERE = "not_here"  # it is desired, and the registrar's own agent does not have it yet
    POLICY = "policy"  # it may go, and the policy does not allow removals
    HELD = "held"  # its object is missing from a list, and the brake waits for another
    REJECTED = Kept.REJECTED
    BLIND = Kept.BLIND
    UNFOLLOWED = Kept.UNFOLLOWED
    UNPROVEN = Kept.UNPROVEN


class OrphanJudgement(NamedTuple):
    """Service IDs that may go, how many stay and why, what the brake wants back, and the proofs."""

    may_go: frozenset[str]
    stays: Counter[Stays]
    held: tuple[Held, ...]
    memory: Memory
    proofs: Mapping[str, Proof]


class Judge:
    """Takes the services of one lost agent's node one by one, and ends in a judgement.

    `here` are the IDs of this registrar's services that its own agent holds and the catalog shows at its
    node. What nothing asks for is judged by the rules of any other removal, the brake's among them.
    """

    def __init__(self, desired: DesiredState, rules: Rules, here: Container[str]) -> None:
        self._desired = desired
        self._rules = rules
        self._here = here
        self._may_go: dict[str, Proof] = {}
        self._stays: Counter[Stays] = Counter()
        self._absent: defaultdict[Source, dict[str, Absence]] = defaultdict(dict)
        self._keys: dict[str, ObjectKey | None] = {}
        self._held: Counter[Source] = Counter()

    def consider(self, service: Service) -> None:
        """Judge one service; one that belongs to something else counts for nothing."""
        desired, identity = self._desired, self._rules.identity
        record = observe(service, identity, desired.cluster_uid)
        if not isinstance(record, Other) or record.claim is not Claim.OURS:
            return
        if not identity.may_remove(record.claim, record.cluster_uid, desired.cluster_uid):
            self._stays[Stays.UNPROVEN] += 1
            return
        source = desired.source_of(record.kind, record.key)
        if source is not None:
            self._held[source] += 1
        if service.id in self._here:
            self._may_go[service.id] = Proof(Ground.ELSEWHERE, key=record.key)
        elif desired.claims.get(service.id):
            self._stays[Stays.NOT_HERE] += 1
        else:
            self._consider_unclaimed(service, record, source)

    def _consider_unclaimed(self, service: Service, record: Other, source: Source | None) -> None:
        match decide(self._desired.ask(service.id, record), record, self._rules):
            case Deregister() | Withheld():
                self._may_go[service.id] = self._desired.proof(service.id, record.key)
            case Keep(reason=reason):
                self._stays[Stays(reason.value)] += 1
            case Infer() if source is not None:
                lists = [self._desired.store.status(one).listed_at or 0.0 for one in source.needed]
                self._absent[source][service.id] = Absence(min(lists))
                self._keys[service.id] = record.key

    def judge(self, rules: BrakeRules, memory: Memory, now: float) -> OrphanJudgement:
        """Return the judgement over everything that was considered; `now` is in monotonic seconds."""
        statuses = self._desired.store.statuses()
        judged = judge(
            {
                source: SourceAbsences(self._absent[source], self._held[source], is_empty=not status.objects)
                for source, status in statuses.items()
                if status.proves_absence
            },
            memory,
            rules,
            now,
        )
        proofs = {
            one: Proof(Ground.ABSENCE, brake=judged.verdicts[one], key=self._keys[one])
            for one in judged.released
        }
        may_go, stays = frozenset(proofs | self._may_go), Counter(self._stays)
        if not self._rules.policy.removes:
            stays[Stays.POLICY] += len(may_go)
            may_go = frozenset()
        stays[Stays.HELD] += sum(len(one.ids) for one in judged.held)
        return OrphanJudgement(may_go, +stays, judged.held, judged.memory, proofs | self._may_go)
