"""Care for the agent: what it left in the catalog is removed, and an agent that does not suit is reported."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from k8s_consul_registrar.consul.acl import AgentSelf
from k8s_consul_registrar.consul.agent import AgentTraffic
from k8s_consul_registrar.errors import (
    ClusterError,
    ConsulBusy,
    ConsulError,
    ConsulFenced,
    ConsulUnreachable,
)
from k8s_consul_registrar.model import Ghosts, ObjectKey, Rejection, Service, Written
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.brake import Ground, Proof
from k8s_consul_registrar.registrar.decide import Deregister, Infer, Rules, decide
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.interfaces import ClusterReader
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.observed import Other, observe
from k8s_consul_registrar.registrar.ownership import Claim
from k8s_consul_registrar.registrar.reporter import LogOnce
from k8s_consul_registrar.registrar.schedule import GhostChecks
from k8s_consul_registrar.registrar.status import AgentProblem, AgentsSeen, LostAgent, RegistrarStatus
from k8s_consul_registrar.telemetry import get_logger

# Ghosts that a log line names.
MOST_NAMED = 20
# Objects that one look asks the API server for.
MOST_BY_NAME = 100

log = get_logger("ghosts")


class GhostAgent(Protocol):
    """The agent beside its node in the catalog; each method raises a `ConsulError`."""

    traffic: AgentTraffic

    async def find(self) -> Ghosts:
        """Return what the catalog shows at the agent's node and the agent does not hold."""
        ...

    async def remove(self, node: str, services: Sequence[Service]) -> Written:
        """Remove these very records, except those that the agent holds by now."""
        ...


class _Seen(NamedTuple):
    """A ghost's record, and when a look first showed it."""

    version: int
    since: float


class GhostCollector:
    """Looks for ghosts after deregistrations, resyncs and the start, and removes those of this registrar.

    A ghost is a record that two looks show unchanged. It is removed under the same proof of ownership as any
    service, and never while an object asks for its ID: the agent is about to get that service. The brake does
    not apply, since the agent has confirmed the removal or has lost the service. In the second case the cluster
    must be the one that the record names, and its API server must confirm by name that the object is gone.
    """

    lost: tuple[LostAgent, ...] = ()

    def __init__(
        self,
        agent: GhostAgent,
        *,
        desired: DesiredState,
        decisions: Rules,
        cluster: ClusterReader,
        checks: GhostChecks,
        audit: Audit,
        metrics: RegistrarMetrics,
        is_steady: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the collector; `is_steady` returns False while the agents of several nodes answer."""
        self._agent = agent
        self._is_steady = is_steady
        self._desired = desired
        self._decisions = decisions
        self._cluster = cluster
        self._audit = audit
        self._metrics = metrics
        self._clock = clock
        self._checks = checks
        # When to look again, in seconds of the clock.
        self.look_due = math.inf
        self._note(clock())
        agent.traffic.on_deregistered = self._note
        self._node = ""
        self._seen: dict[str, _Seen] = {}
        self._problems, self._named = LogOnce(), LogOnce()

    def _note(self, deregistered_at: float) -> None:
        """Have looks some time after a deregistration."""
        self._plan(self._checks.noted(deregistered_at))

    def _plan(self, checks: GhostChecks) -> None:
        self._checks, self.look_due = checks, checks.due

    async def collect(self) -> None:
        """Have one look some time after a resync."""
        self._plan(self._checks.noted_once(self._clock()))

    def rest(self) -> None:
        """Forget what was seen, since another replica leads."""
        self._seen = {}
        self._metrics.ghosts.set(0)

    async def look(self) -> bool:
        """Look once, and remove what may go; return False, since no resync is wanted for it."""
        started, noted_at = self._clock(), self._agent.traffic.deregistered_at
        try:
            ghosts = await self._agent.find()
            is_pending = await self._settle(ghosts, started)
        except ConsulError as error:
            self._report(error)
            self._plan(self._checks.failed(self._clock()))
        else:
            self._problems.over("look")
            ended = self._clock()
            self._plan(self._checks.looked(ended, ended - started, is_pending=is_pending))
        if self._agent.traffic.deregistered_at > noted_at:
            self._note(self._agent.traffic.deregistered_at)
        return False

    async def _settle(self, ghosts: Ghosts, started: float) -> bool:
        """Compare with the looks before, and remove what may go; return True if another look can settle more."""
        before = self._seen if ghosts.node == self._node else {}
        self._node = ghosts.node
        unwanted = self._unwanted(ghosts)
        now = self._clock()
        self._seen = {}
        for service, _ in unwanted:
            known = before.get(service.id)
            is_same = known is not None and known.version == service.index
            self._seen[service.id] = known if known and is_same else _Seen(service.index, now)
        due = [
            (service, record)
            for service, record in unwanted
            if started - self._seen[service.id].since >= self._checks.first
        ]
        going, is_pending = await self._may_go(due, ghosts.deregistered)
        self._name([service.id for service, _ in due])
        # An object may have come back while others were asked for.
        may_remove = self._is_steady() and self._decisions.policy.removes
        services = [
            one for one, _ in due if may_remove and one.id in going and one.id not in self._desired.claims
        ]
        written = Written()
        if services:
            remove = partial(self._agent.remove, ghosts.node)
            written = await self._audit.remove(remove, services, going, place=f"node {ghosts.node}")
        self._metrics.ghosts.set(len(due) - written.done)
        self._say_what_went(written)
        return is_pending or bool(written.stale) or len(due) < len(unwanted)

    def _unwanted(self, ghosts: Ghosts) -> list[tuple[Service, Other]]:
        """Return the records of this registrar that no object asks for."""
        identity, cluster_uid = self._decisions.identity, self._desired.cluster_uid
        records = ((one, observe(one, identity, cluster_uid)) for one in ghosts.services)
        return [
            (service, record)
            for service, record in records
            if isinstance(record, Other)
            and record.claim is Claim.OURS
            and service.id not in self._desired.claims
        ]

    async def _may_go(
        self, due: Sequence[tuple[Service, Other]], deregistered: frozenset[str]
    ) -> tuple[dict[str, Proof], bool]:
        """Return what may go with its proof, and True if the API server could not be asked for everything."""
        going: dict[str, Proof] = {}
        asked = 0
        is_pending = False
        for service, record in due:
            match decide(self._desired.ask(service.id, record), record, self._decisions):
                case Deregister():
                    going[service.id] = self._desired.proof(service.id, record.key)
                case Infer() if service.id in deregistered:
                    going[service.id] = Proof(Ground.LEFT, key=record.key)
                case Infer() if record.key is not None and self._is_same_cluster(record):
                    asked += 1
                    is_gone = await self._is_gone(service.id, record.key) if asked <= MOST_BY_NAME else None
                    if is_gone:
                        going[service.id] = Proof(Ground.ABSENCE, key=record.key)
                    is_pending = is_pending or is_gone is None
        return going, is_pending

    def _is_same_cluster(self, record: Other) -> bool:
        return bool(record.cluster_uid) and record.cluster_uid == self._desired.cluster_uid

    async def _is_gone(self, service_id: str, key: ObjectKey) -> bool | None:
        """Return True if an object is gone or does not ask for the ID, None if the API server cannot say."""
        try:
            item = await self._cluster.read_object(key)
        except ClusterError:
            return None
        resolved = None if item is None else self._desired.resolved(item)
        if isinstance(resolved, Rejection):
            return False
        return all(target.id != service_id for target in resolved or ())

    def _name(self, ids: Sequence[str]) -> None:
        if not ids:
            self._named.over(self._node)
            return
        text = " ".join(sorted(ids)[:MOST_NAMED])
        if self._named.new(self._node, text):
            log.warning(
                "the agent left services in the catalog",
                node=self._node,
                count=len(ids),
                services=text,
                remedy='give the agent a token with node "<its name>" { policy = "write" } (acl.tokens.agent)',
            )

    def _say_what_went(self, written: Written) -> None:
        self._metrics.ghost_removals.labels("success").inc(written.done)
        self._metrics.ghost_removals.labels("refused").inc(len(written.failures))
        if written.done:
            log.info(
                "removed services that the agent left in the catalog", node=self._node, removed=written.done
            )
        if not written.failures:
            self._problems.over("removal")
        elif self._problems.new("removal", written.failures[0].problem):
            log.warning(
                "services that the agent left in the catalog cannot be removed",
                node=self._node,
                refused=len(written.failures),
                problem=written.failures[0].problem,
            )

    def _report(self, error: ConsulError) -> None:
        """Log, once, why there is no look; an outage is reported by the client's health."""
        if isinstance(error, (ConsulUnreachable, ConsulBusy, ConsulFenced)):
            log.debug("no look for services that the agent left in the catalog", problem=str(error))
        elif self._problems.new("look", str(error)):
            log.info("services that the agent left in the catalog cannot be looked for", problem=str(error))


class AgentWatch:
    """Reports agents that the agent backend cannot rely on."""

    def __init__(
        self, metrics: RegistrarMetrics, status: RegistrarStatus, *, accepts_server: bool = False
    ) -> None:
        """Make the watch; with `accepts_server` the agent may be a single server."""
        self._metrics = metrics
        self._status = status
        self._accepts_server = accepts_server
        self._seen = AgentsSeen()
        self._logged = LogOnce()

    def looked(self, agents: Sequence[AgentSelf]) -> None:
        """Take over which agents answer now."""
        servers = [one.node for one in agents if one.is_server]
        self._seen = self._seen.looked([one.node for one in agents], servers)
        self._status.agent_problems = problems = self._seen.problems(accepts_server=self._accepts_server)
        for about, text in self._logged.only(problems):
            log.warning("CONSUL_ADDRESS does not suit the agent backend", about=about, problem=text)
        for problem in AgentProblem:
            self._metrics.agent_problem.labels(problem.value).set(problem.value in problems)

    @property
    def is_steady(self) -> bool:
        """True unless the agents of several nodes answer."""
        return AgentProblem.SEVERAL_NODES not in self._status.agent_problems
