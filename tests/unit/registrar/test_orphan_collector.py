"""The orphan collector: when it looks at the nodes of lost agents and clears them, by the test's own clock."""

from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.consul.previous_location import Remove
from k8s_consul_registrar.errors import ConsulError, ConsulForbidden, ConsulUnreachable
from k8s_consul_registrar.model import AgentHealth, Service, Written
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.brake import BrakeRules
from k8s_consul_registrar.registrar.decide import Rules
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.orphan_collector import OrphanCollector, OrphanRules
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.status import LostAgent
from k8s_consul_registrar.targets.service_names import RandomShards
from support.builders import make_pod, our_pod_service
from support.memory import MemoryCluster

AFTER, EVERY = 600.0, 30.0
LOST = AgentHealth("old", "serfHealth", "critical", 7)


class MemoryLocation:
    """A lost agent's node."""

    def __init__(self, agents: "MemoryAgents", node: str, may_go: Callable[[Service], bool]) -> None:
        self.name = node
        self._agents = agents
        self._may_go = may_go

    async def services(self) -> AsyncIterator[Service]:
        """Yield what may go."""
        self._agents.reads.append(self.name)
        if self.name in self._agents.forbidden:
            raise ConsulForbidden("no")
        for one in list(self._agents.nodes[self.name]):
            if self._may_go(one):
                yield one

    async def clear(self, remove: Remove) -> Written:
        """Remove it."""
        return await remove(self._deregister, [one async for one in self.services()])

    async def _deregister(self, services: Sequence[Service]) -> Written:
        self._agents.nodes[self.name] = [one for one in self._agents.nodes[self.name] if one not in services]
        return Written(len(services))


class MemoryAgents:
    """A catalog in memory; `problem` is what a look raises."""

    def __init__(self) -> None:
        self.seen: list[AgentHealth] = [LOST]
        self.here: list[Service] = []
        self.nodes: dict[str, list[Service]] = {"old": [], "other": []}
        self.forbidden: set[str] = set()
        self.reads: list[str] = []
        self.problem: ConsulError | None = None

    async def own_node(self) -> str:
        """Return a name."""
        if self.problem is not None:
            raise self.problem
        return "new"

    async def failing(self) -> Sequence[AgentHealth]:
        """Return what a test says."""
        return self.seen

    async def services_here(self, own_node: str) -> AsyncIterator[Service]:
        """Yield what a test says."""
        assert own_node == "new"
        for one in self.here:
            yield one

    def location(self, lost: AgentHealth, may_go: Callable[[Service], bool]) -> MemoryLocation:
        """Return a node."""
        return MemoryLocation(self, lost.node, may_go)


class Lab:
    """A collector over a cluster with one Pod, `a`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.cluster = MemoryCluster(clock=lambda: self.now)
        self.cluster.put_list([make_pod("a")])
        self.agents = MemoryAgents()
        self.registry = CollectorRegistry()
        self.audit = Audit(leader="lab-1")
        self.collector = OrphanCollector(
            self.agents,
            desired=self.cluster.desired,
            decisions=Rules(Identity("lab"), RandomShards()),
            rules=OrphanRules(AFTER, EVERY, BrakeRules()),
            relist=self.cluster.relist,
            audit=self.audit,
            metrics=RegistrarMetrics(self.registry),
            clock=lambda: self.now,
        )

    async def look_for(self, seconds: float) -> int:
        """Look every so often for so long; return how many looks asked for a resync."""
        asked = 0
        for _ in range(int(seconds / EVERY)):
            self.now += EVERY
            asked += await self.collector.look()
        return asked

    def left(self, node: str = "old") -> set[str]:
        """Return the names of what is at a node."""
        return {one.id.rpartition("--")[2] for one in self.agents.nodes[node]}

    def stays(self, why: str) -> float | None:
        """Return the metric."""
        return self.registry.get_sample_value("k8s_consul_registrar_orphaned_services", {"why": why})


@pytest.fixture
def lab() -> Lab:
    """Return a lab in which our own agent has what the lost one has."""
    lab = Lab()
    lab.agents.here = [our_pod_service("a")]
    lab.agents.nodes["old"] = [our_pod_service("a")]
    return lab


async def test_node_is_cleared_when_its_time_has_come(lab: Lab) -> None:
    """Nothing is read before, one resync is asked for then, and the collection after it removes."""
    assert await lab.look_for(AFTER) == 0
    await lab.collector.collect()
    assert (lab.left(), lab.agents.reads) == ({"a"}, [])
    assert await lab.look_for(3 * EVERY) == 1
    await lab.collector.collect()
    assert lab.left() == set()


async def test_time_starts_again_after_it_was_seen_back(lab: Lab) -> None:
    """One look that does not show it as lost is enough."""
    await lab.look_for(AFTER)
    lab.agents.seen = []
    await lab.look_for(EVERY)
    lab.agents.seen = [LOST]
    assert await lab.look_for(AFTER) == 0
    await lab.collector.collect()
    assert lab.left() == {"a"}


async def test_collection_looks_again_before_it_removes(lab: Lab) -> None:
    """An agent that is back since the look that asked for the resync keeps everything."""
    assert await lab.look_for(AFTER + EVERY) == 1
    lab.agents.seen = []
    await lab.collector.collect()
    assert lab.left() == {"a"}


async def test_time_without_looking_does_not_count_as_lost(lab: Lab) -> None:
    """After an outage of Consul the time starts again, though the check says what it said before."""
    await lab.look_for(EVERY)
    lab.agents.problem = ConsulUnreachable("no leader")
    assert await lab.look_for(AFTER) == 0
    lab.agents.problem = None
    assert await lab.look_for(AFTER) == 0
    await lab.collector.collect()
    assert lab.left() == {"a"}
    assert await lab.look_for(EVERY * 2) == 1


async def test_agent_that_brings_its_services_back_is_given_time(lab: Lab) -> None:
    """It lives, and is only out of reach: no removal follows the other at once."""
    await lab.look_for(AFTER + EVERY)
    await lab.collector.collect()
    lab.agents.nodes["old"] = [our_pod_service("a")]
    await lab.look_for(AFTER - EVERY)
    await lab.collector.collect()
    assert lab.left() == {"a"}
    assert await lab.look_for(2 * EVERY) == 1
    await lab.collector.collect()
    assert lab.left() == set()


async def test_node_without_anything_of_ours_is_read_once(lab: Lab) -> None:
    """However long its agent is lost; only when that is another loss is it read again."""
    lab.agents.nodes["old"] = [our_pod_service("a", cluster="other")]
    await lab.look_for(AFTER + EVERY)
    for _ in range(3):
        await lab.collector.collect()
    assert await lab.look_for(AFTER) == 0
    assert lab.agents.reads == ["old"]
    lab.agents.seen = [LOST._replace(version=9)]
    await lab.look_for(AFTER + EVERY)
    await lab.collector.collect()
    assert lab.agents.reads == ["old", "old"]


async def test_node_that_cannot_be_read_does_not_hold_up_another(lab: Lab) -> None:
    """Each is by itself."""
    lab.agents.seen = [LOST, LOST._replace(node="other")]
    lab.agents.nodes["other"] = [our_pod_service("a")]
    lab.agents.forbidden = {"old"}
    await lab.look_for(AFTER + EVERY)
    await lab.collector.collect()
    assert (lab.left(), lab.left("other")) == ({"a"}, set())


async def test_services_that_stay_are_shown_until_the_node_is_gone(lab: Lab) -> None:
    """And the brake asks for the list that it waits for."""
    lab.agents.here = []
    lab.agents.nodes["old"] += [our_pod_service(f"gone-{number}") for number in range(3)]
    await lab.look_for(AFTER + EVERY)
    await lab.collector.collect()
    assert (lab.stays("not_here"), lab.stays("held")) == (1, 3)
    assert len(lab.cluster.relists) == 1
    lab.agents.seen = []
    await lab.look_for(EVERY)
    assert (lab.stays("not_here"), lab.stays("held")) == (0, 0)


async def test_lost_agents_are_shown_until_nothing_of_ours_is_there(lab: Lab) -> None:
    """With the time their node may be cleared at, and what a clearing left; not those without our services."""
    lab.agents.seen = [LOST._replace(node="other"), LOST]
    lab.agents.here = []
    lab.agents.nodes["other"] = [our_pod_service("a", cluster="other")]
    assert not lab.collector.lost
    await lab.look_for(EVERY)
    began = lab.now
    assert lab.collector.lost == tuple(LostAgent(node, began, began + AFTER, {}) for node in ("old", "other"))
    await lab.look_for(AFTER)
    await lab.collector.collect()
    assert lab.collector.lost == (LostAgent("old", began, began + AFTER, {"not_here": 1}),)
    lab.agents.seen = []
    await lab.look_for(EVERY)
    assert not lab.collector.lost


async def test_standby_forgets_what_it_saw(lab: Lab) -> None:
    """Nothing is shown of it, and the time starts again when it leads again."""
    lab.agents.here = []
    await lab.look_for(AFTER + EVERY)
    await lab.collector.collect()
    lab.collector.rest()
    assert (lab.collector.lost, lab.stays("not_here")) == ((), 0)
    lab.agents.here = [our_pod_service("a")]
    await lab.look_for(AFTER)
    await lab.collector.collect()
    assert lab.left() == {"a"}
