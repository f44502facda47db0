"""Decides which services of a lost agent may go: pure.

An agent that ends without leaving stays in the catalog, with all its services, until Consul's servers remove
its node after 72 hours; a registrar whose Pod moved has an agent of another name meanwhile.
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from k8s_consul_registrar.model import CRITICAL, SERF_HEALTH, AgentHealth, Service
from k8s_consul_registrar.registrar.brake import BrakeRules, Held, Memory
from k8s_consul_registrar.registrar.ownership import Claim, Identity
from k8s_consul_registrar.registrar.plan import Kept
from k8s_consul_registrar.registrar.planner import Planner
from k8s_consul_registrar.targets.sharding import RandomShards
from k8s_consul_registrar.targets.wanted import Wanted


class Watched(NamedTuple):
    """A lost agent: what its check says, and since when we have seen it say so, in monotonic seconds."""

    health: AgentHealth
    since: float


def observe(
    watched: Mapping[str, Watched], seen: Iterable[AgentHealth], own_node: str, now: float
) -> dict[str, Watched]:
    """Return which agents are lost, by node, after a look that ended at `now`.

    Whatever a look does not show starts anew, and so does a check that changed in between: an agent that
    came back and was lost again has another version. A node without the check is nobody we know of, and
    our own agent answers us, whatever the others say of it.
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
    """Why a service of ours stays at the node of a lost agent: fit for a metric's label."""

    NOT_HERE = "not_here"  # the cluster wants it, and our own agent does not have it yet
    HELD = "held"  # its object is missing from a list, and the brake waits for another
    REJECTED = Kept.REJECTED
    BLIND = Kept.BLIND
    UNFOLLOWED = Kept.UNFOLLOWED
    UNPROVEN = Kept.UNPROVEN


class Verdict(NamedTuple):
    """Which service IDs may go, how many stay and why, and what the brake wants back the next time."""

    may_go: frozenset[str]
    stays: Counter[Stays]
    held: tuple[Held, ...]
    memory: Memory


class Judge:
    """Takes the services of one lost agent's node one by one, and ends in a verdict.

    `here` are the IDs of the services of ours that our own agent holds and the catalog shows at its node.
    What nobody wants is judged by the rules of any other removal, the brake's among them.
    """

    def __init__(self, wanted: Wanted, identity: Identity, here: Container[str]) -> None:
        self._wanted = wanted
        self._identity = identity
        self._here = here
        self._planner = Planner(wanted, identity, RandomShards())
        self._may_go: set[str] = set()
        self._stays: Counter[Stays] = Counter()

    def consider(self, service: Service) -> None:
        """Judge one service; one that is not ours counts for nothing."""
        if not is_ours(service, self._identity, self._wanted.cluster_uid):
            return
        if not self._identity.may_remove(service, Claim.OURS, self._wanted.cluster_uid):
            self._stays[Stays.UNPROVEN] += 1
        elif service.id in self._here:
            self._may_go.add(service.id)
            self._planner.count(service)
        elif self._wanted.claims.get(service.id):
            self._stays[Stays.NOT_HERE] += 1
            self._planner.count(service)
        else:
            self._planner.consider(service)

    def verdict(self, rules: BrakeRules, memory: Memory) -> Verdict:
        """Return the verdict over all that were considered."""
        held, remembered = self._planner.brake(rules, memory)
        plan = self._planner.plan(held, remembered)
        stays = Counter(self._stays)
        for why, count in plan.kept.items():
            stays[Stays(why.value)] += count
        stays[Stays.HELD] += sum(len(one.ids) for one in held)
        gone = {service.id for service in plan.deregister}
        return Verdict(frozenset(self._may_go | gone), +stays, plan.held, plan.memory)


def is_ours(service: Service, identity: Identity, cluster_uid: str) -> bool:
    """Whether a service is proven ours; the original program's, which only a name says, are not."""
    return identity.claim(service, cluster_uid) is Claim.OURS
