"""The registrar's state, as values that the admin endpoints read, and the progress of its first sync."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from operator import add
from typing import NamedTuple

import msgspec
from msgspec.structs import astuple

from k8s_consul_registrar.model import Rejection, Target
from k8s_consul_registrar.registrar.brake import Held, Proof
from k8s_consul_registrar.registrar.decide import Conflict
from k8s_consul_registrar.telemetry import get_logger

# Resyncs and seconds of changes that are remembered for the status page.
RECENT = 20
# Removals that are remembered for it.
MOST_REMOVALS = 1000
# Seconds after which a loop that has not turned counts as hanging: no request may take a tenth of that.
HANG = 600.0
# Seconds between two lines about a first sync; one that is done sooner has none.
PROGRESS_INTERVAL = 5.0
# Looks in a row that show one node, after which no other is expected; nodes that are remembered until then.
STEADY_LOOKS, MOST_NODES = 3, 10

log = get_logger("registrar")


class Counts(msgspec.Struct, frozen=True):
    """Results of a resync or of some batches; `refused` counts writes that Consul refused or that came too late.

    `held` and `kept` are services that stay though nothing asks for them: by the brake, and for other reasons.
    """

    registered: int = 0
    updated: int = 0
    deregistered: int = 0
    unchanged: int = 0
    refused: int = 0
    rejected: int = 0
    conflicts: int = 0
    held: int = 0
    kept: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(add, astuple(self), astuple(other)))

    @property
    def outcome(self) -> str:
        """One of `metrics.PASS_OUTCOMES`."""
        return "partial" if self.refused else "success"

    @property
    def writes(self) -> int:
        """Number of services written or removed."""
        return self.registered + self.updated + self.deregistered


class Activity(NamedTuple):
    """A resync, or the batches of about a second; `at` is when it ended, in seconds of the epoch."""

    is_resync: bool
    at: float
    counts: Counts


class Removal(msgspec.Struct, frozen=True, gc=False):
    """A service that was removed: when, in seconds of the epoch, from where, and why that was allowed.

    `place` is empty for the place of the present settings. `is_answered` is False if Consul did not say that it was done.
    """

    at: float
    id: str
    proof: Proof
    leader: str
    place: str = ""
    is_answered: bool = True


class LostAgent(NamedTuple):
    """An agent that is gone, and the state of this registrar's services at its node.

    `since` is when it was first seen lost, `due` when the node may be cleared, both in monotonic seconds;
    `stays` counts by reason the services that a clearing left, empty before the first.
    """

    node: str
    since: float
    due: float
    stays: Mapping[str, int]


class AgentProblem(StrEnum):
    """Reason why CONSUL_ADDRESS does not suit the agent backend: fit for a metric's label."""

    SERVER = "server"
    SEVERAL_NODES = "several_nodes"


class AgentsSeen(msgspec.Struct, frozen=True):
    """The nodes whose agents have answered; a value that each look replaces.

    Behind a load balancer one look may well show a single node. So earlier nodes count until `STEADY_LOOKS`
    in a row have shown the same node only.
    """

    nodes: frozenset[str] = frozenset()
    latest: frozenset[str] = frozenset()
    steady: int = 0
    servers: frozenset[str] = frozenset()

    def looked(self, nodes: Collection[str], servers: Collection[str]) -> "AgentsSeen":
        """Return the knowledge after another look."""
        latest = frozenset(nodes)
        steady = self.steady + 1 if latest == self.latest and len(latest) == 1 else 1
        is_settled = steady >= STEADY_LOOKS or len(self.nodes) > MOST_NODES
        if is_settled:
            return AgentsSeen(latest, latest, steady, frozenset(servers))
        return AgentsSeen(self.nodes | latest, latest, steady, self.servers.union(servers))

    def problems(self, *, accepts_server: bool = False) -> dict[str, str]:
        """Return what is wrong with these agents, with the remedy, by `AgentProblem`."""
        found = {}
        if self.servers and not accepts_server:
            found[AgentProblem.SERVER.value] = (
                f"a Consul server answers, so the services belong to its node {', '.join(sorted(self.servers))}. "
                "Where CONSUL_ADDRESS leads to several servers, set CONSUL_BACKEND=catalog; for a single one that "
                "is meant, CONSUL_AGENT_IS_SERVER=true"
            )
        if len(self.nodes) > 1:
            found[AgentProblem.SEVERAL_NODES.value] = (
                f"agents of several nodes answer: {', '.join(sorted(self.nodes))}. Services are registered twice "
                "and stay after their targets. Set CONSUL_BACKEND=catalog, or CONSUL_ADDRESS to one agent"
            )
        return found


class RegistrarStatus(msgspec.Struct):
    """The registrar at this moment.

    `ticked_at` is when its loop last turned, in monotonic seconds. `refused` says of service IDs why Consul
    refuses them, `conflicts` which IDs belong to something else, `lost` which service IDs objects did not get,
    `awaiting_proxy` which stay at their Pods' own addresses until the proxy serves Pods, and `proxy_problem` why,
    `withheld` the verb of the write that the policy does not allow; `withheld_changes` moves with each change.
    `blocked` are IDs for which their namespace has no place. `removals` are the latest, the newest first.
    """

    recent: deque[Activity] = msgspec.field(default_factory=lambda: deque(maxlen=RECENT))
    refused: dict[str, str] = msgspec.field(default_factory=dict)
    conflicts: dict[str, Conflict] = msgspec.field(default_factory=dict)
    lost: dict[str, tuple[Rejection, ...]] = msgspec.field(default_factory=dict)
    removals: deque[Removal] = msgspec.field(default_factory=lambda: deque(maxlen=MOST_REMOVALS))
    awaiting_proxy: dict[str, Target] = msgspec.field(default_factory=dict)
    proxy_problem: str = ""
    withheld: dict[str, str] = msgspec.field(default_factory=dict)
    withheld_changes: int = 0
    blocked: dict[str, str] = msgspec.field(default_factory=dict)
    held: tuple[Held, ...] = ()
    lost_agents: tuple[LostAgent, ...] = ()
    is_standby: bool = False
    has_synced: bool = False
    is_draining: bool = False
    ticked_at: float = 0.0
    consul_problem: str = ""
    agent_problems: dict[str, str] = msgspec.field(default_factory=dict)
    source_problems: dict[str, str] = msgspec.field(default_factory=dict)

    def is_alive(self) -> bool:
        """Return True if the loop has turned lately."""
        return time.monotonic() - self.ticked_at < HANG

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

    def lost_rejections(self) -> list[Rejection]:
        """Return the objects that lost a service ID to another, each once."""
        return list({one.key: one for losers in self.lost.values() for one in losers}.values())


class Progress(msgspec.Struct, frozen=True):
    """A first sync at one moment.

    `listed` objects were read of the API server; `is_listed` says that those were all. `targets` came of them,
    `registered` of which are known to stand in Consul, `rejected` objects cannot be targets.
    """

    listed: int
    is_listed: bool
    targets: int
    registered: int
    rejected: int = 0


def describe(now: Progress, before: Progress | None, seconds: float) -> Mapping[str, object]:
    """Return the log fields of a first sync, given its progress at the previous line (None: at its beginning).

    The remaining time is estimated once the lists are complete and targets are being registered.
    """
    registered = now.registered - (before.registered if before else 0)
    listed = now.listed - (before.listed if before else 0)
    facts: dict[str, object] = {
        "doing": "registering" if now.is_listed else "listing",
        "listed": now.listed,
        "targets": now.targets,
        "registered": now.registered,
        "rejected": now.rejected,
        "per_second": round(max(0, registered if now.is_listed else listed) / seconds, 1),
    }
    left = now.targets - now.registered
    if now.is_listed and registered > 0 and left > 0:
        facts["seconds_left"] = round(left * seconds / registered)
    return facts


async def tell_progress(
    read: Callable[[], Progress | None],
    backend: str,
    every: float = PROGRESS_INTERVAL,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Log how far the first sync is each `every` seconds, until `read` returns None: it is done."""
    before, then = None, clock()
    while True:
        await asyncio.sleep(every)
        if (now := read()) is None:
            return
        at = clock()
        log.info("first sync under way", backend=backend, **describe(now, before, max(at - then, 0.001)))
        before, then = now, at
