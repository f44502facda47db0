"""Orphan collector: removes this registrar's services from nodes whose agent is gone."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec

from k8s_consul_registrar.consul.previous_location import Remove
from k8s_consul_registrar.errors import (
    ConsulBusy,
    ConsulError,
    ConsulFenced,
    ConsulFiltered,
    ConsulForbidden,
    ConsulRefused,
    ConsulUnreachable,
)
from k8s_consul_registrar.model import AgentHealth, Service, Source, Written
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.brake import BrakeRules, Memory
from k8s_consul_registrar.registrar.decide import Rules
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.orphans import Judge, OrphanJudgement, Stays, Watched, due, observe_agents
from k8s_consul_registrar.registrar.ownership import Claim
from k8s_consul_registrar.registrar.reporter import LogOnce
from k8s_consul_registrar.registrar.status import LostAgent
from k8s_consul_registrar.telemetry import get_logger

# Looks within a short wait.
LOOKS = 4
# Without a look for this many turns and seconds, an agent may have come back unnoticed: while Consul has no
# leader, the catalog does not show that an agent is back.
MISSED_LOOKS, SHORTEST_GAP = 4, 10.0
EVERY_NODE = "all"

log = get_logger("orphans")


class OrphanLocation(Protocol):
    """The node of a lost agent, as a place to clear; each raises a `ConsulError`."""

    def services(self) -> AsyncIterator[Service]:
        """Yield this registrar's services there."""

    async def clear(self, remove: Remove) -> Written:
        """Remove them by `remove`."""


class Agents(Protocol):
    """Reads of the catalog about agents; each raises a `ConsulError`."""

    async def own_node(self) -> str:
        """Return the node of the agent we talk to."""

    async def failing(self) -> Sequence[AgentHealth]:
        """Return the agents' checks that are critical now."""

    def services_here(self, own_node: str) -> AsyncIterator[Service]:
        """Yield what our own agent holds and the catalog shows at its node."""

    def location(self, lost: AgentHealth, may_go: Callable[[Service], bool]) -> OrphanLocation:
        """Return a lost agent's node as a location to clear, while its check says just this."""


class OrphanRules(msgspec.Struct, frozen=True):
    """An agent counts as lost for good after `after` seconds; a look is due every `look` seconds."""

    after: float
    look: float
    brake: BrakeRules

    @property
    def every(self) -> float:
        """Seconds between looks."""
        return min(self.look, self.after / LOOKS)

    @property
    def longest_gap(self) -> float:
        """Seconds between two looks beyond which they do not belong together."""
        return max(MISSED_LOOKS * self.every, SHORTEST_GAP)


class OrphanCollector:
    """Finds lost agents from time to time, and removes the registrar's services from their nodes after a resync.

    A look is one small read. Only when an agent was lost for long enough are services read: those of any
    registrar at its node, and our own agent's. A node without services of this registrar is not read again.
    """

    def __init__(
        self,
        agents: Agents,
        *,
        desired: DesiredState,
        decisions: Rules,
        rules: OrphanRules,
        relist: Callable[[Source, float], None],
        audit: Audit,
        metrics: RegistrarMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agents = agents
        self._desired = desired
        self._decisions = decisions
        self._rules = rules
        self._relist = relist
        self._audit = audit
        self._metrics = metrics
        self._clock = clock
        self._own_node = ""
        self._watched: dict[str, Watched] = {}
        self._looked_at = clock()
        # By what the lost agent's check says, so that one that came back and was lost again is a new case.
        self._announced: set[AgentHealth] = set()
        self._clean: set[AgentHealth] = set()
        self._memory: dict[AgentHealth, Memory] = {}
        self._stays: dict[AgentHealth, Counter[Stays]] = {}
        self._problems = LogOnce()
        self.look_due = clock()

    @property
    def lost(self) -> tuple[LostAgent, ...]:
        """The lost agents by node, without those known to have left no service of this registrar."""
        return tuple(
            LostAgent(
                node,
                one.since,
                one.since + self._rules.after,
                {why.value: count for why, count in self._stays.get(one.health, Counter()).items()},
            )
            for node, one in sorted(self._watched.items())
            if one.health not in self._clean
        )

    def rest(self) -> None:
        """Forget which agents are lost: the replica that leads looks after them."""
        self._watched = {}
        self._stays = {}
        self._show()

    async def look(self) -> bool:
        """Look which agents are lost; tell whether one has just been for long enough."""
        self.look_due = self._clock() + self._rules.every
        try:
            fresh = {one.health for one in await self._look()} - self._announced
        except ConsulError as error:
            self._report(error)
            return False
        self._problems.over(EVERY_NODE)
        self._announced |= fresh
        return bool(fresh)

    async def collect(self) -> None:
        """Clear the nodes of agents lost for long enough, as they are now; what fails waits for the next time.

        It is for the time after a resync: by then our own agent has what it lacked.
        """
        if not self._watched:
            return
        try:
            for lost in await self._look():
                try:
                    await self._clear(lost)
                except (ConsulForbidden, ConsulFiltered, ConsulRefused) as error:
                    self._report(error, lost.health.node)
        except ConsulError as error:
            self._report(error)
        self._show()

    async def _look(self) -> list[Watched]:
        """Return the agents whose nodes are to be cleared."""
        started = self._clock()
        seen = await self._agents.failing()
        if seen:
            self._own_node = await self._agents.own_node()
        ended = self._clock()
        before = self._watched if ended - self._looked_at <= self._rules.longest_gap else {}
        self._looked_at = ended
        self._watched = observe_agents(before, seen, self._own_node, ended)
        current = {one.health for one in self._watched.values()}
        self._clean &= current
        self._memory = {one: memory for one, memory in self._memory.items() if one in current}
        self._stays = {one: stays for one, stays in self._stays.items() if one in current}
        self._show()
        lost = due(self._watched, self._rules.after, started)
        uncleared = [one for one in lost if one.health not in self._clean]
        self._announced &= {one.health for one in uncleared}
        return uncleared

    async def _clear(self, lost: Watched) -> None:
        """Judge what is there, then remove what may go as a second read finds it."""
        identity, cluster_uid = self._decisions.identity, self._desired.cluster_uid

        def is_ours(service: Service) -> bool:
            return identity.claim(service, cluster_uid) is Claim.OURS

        seen = [one async for one in self._agents.location(lost.health, is_ours).services()]
        if not seen:
            self._clean.add(lost.health)
            self._stays.pop(lost.health, None)
            return
        services_here = self._agents.services_here(self._own_node)
        judge = Judge(self._desired, self._decisions, {one.id async for one in services_here if is_ours(one)})
        for service in seen:
            judge.consider(service)
        judgement = judge.judge(self._rules.brake, self._memory.get(lost.health, Memory()), self._clock())
        self._memory[lost.health] = judgement.memory
        for held in judgement.held:
            self._relist(held.source, held.due)
        self._say_what_stays(lost, judgement)
        if judgement.may_go:
            place = self._agents.location(
                lost.health, lambda one: one.id in judgement.may_go and is_ours(one)
            )
            self._say_what_went(
                lost,
                await place.clear(self._audit.remover(judgement.proofs, place=f"node {lost.health.node}")),
            )
            # An agent that lives, and is only out of reach for the others, brings its services back: it is
            # given as much time again, instead of a fight.
            self._watched[lost.health.node] = Watched(lost.health, self._clock())

    def _say_what_went(self, lost: Watched, written: Written) -> None:
        self._metrics.orphan_removals.labels("success").inc(written.done)
        self._metrics.orphan_removals.labels("refused").inc(len(written.failures))
        if not written.done and not written.failures:
            log.info("a lost agent is back, or something else writes to its node", node=lost.health.node)
            return
        log.warning(
            "services of a lost agent are removed",
            node=lost.health.node,
            removed=written.done,
            refused=len(written.failures),
            stale=len(written.stale),
            why=f"its agent is gone for {self._clock() - lost.since:.0f} s, and {self._own_node} holds what is "
            "still wanted",
        )

    def _say_what_stays(self, lost: Watched, judgement: OrphanJudgement) -> None:
        stays = judgement.stays
        if stays and stays != self._stays.get(lost.health):
            said = {why.value: count for why, count in stays.items()}
            log.info("services of a lost agent stay", node=lost.health.node, **said)
        self._stays[lost.health] = stays

    def _show(self) -> None:
        """Show what stays at the nodes that are lost now."""
        total: Counter[Stays] = sum(self._stays.values(), Counter())
        for why in Stays:
            self._metrics.orphans.labels(why.value).set(total[why])

    def _report(self, error: ConsulError, node: str = EVERY_NODE) -> None:
        """Log once what prevents it: the token may be allowed to use the agent only.

        That Consul cannot be used is logged elsewhere.
        """
        if isinstance(error, (ConsulUnreachable, ConsulBusy, ConsulFenced)):
            log.debug("nodes of lost agents are not looked after now", problem=str(error))
            return
        if self._problems.new(node, str(error)):
            log.info("nodes of lost agents cannot be looked after", node=node, problem=str(error))
