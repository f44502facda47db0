"""The ghost collector on the sandbox's agents of each release, by the test's own clock."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from k8s_consul_registrar.consul.agent import AgentRegistry, AgentTraffic
from k8s_consul_registrar.consul.ghosts import AgentGhosts
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import Ghosts, ObjectKey, Service, Written
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.decide import Rules
from k8s_consul_registrar.registrar.ghosts import GhostAgent, GhostCollector
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Identity, Policy
from k8s_consul_registrar.registrar.schedule import GhostChecks
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions, ConsulRelease
from k8s_consul_registrar.targets.service_names import RandomShards
from support.builders import make_pod, our_pod_service
from support.lab import each_release
from support.memory import MemoryCluster
from support.scripted import client_of
from support.waiting import Clock

LEFT = "the agent left services in the catalog"
UID = "uid-1"


class Lab:
    """A collector over a cluster, between an agent and the catalog."""

    def __init__(self, registry: AgentRegistry, consul: Consul) -> None:
        self.clock = Clock(follows=time.monotonic)
        self.consul = consul
        self.registry = registry
        self.cluster = MemoryCluster(clock=self.clock)
        self.cluster.desired.learn_cluster_uid(UID)
        self.start(AgentGhosts(registry))

    def start(self, agent: GhostAgent, policy: Policy = Policy.SYNC) -> None:
        """Begin with a collector that has seen nothing yet."""
        self.metrics = CollectorRegistry()
        self.audit = Audit(leader="lab-1")
        self.collector = GhostCollector(
            agent,
            desired=self.cluster.desired,
            decisions=Rules(Identity("lab"), RandomShards(), policy=policy),
            cluster=self.cluster,
            checks=GhostChecks(),
            audit=self.audit,
            metrics=RegistrarMetrics(self.metrics),
            clock=self.clock,
        )

    async def register(self, *names: str, uid: str = UID) -> None:
        """Register the services of these Pods."""
        written = await self.registry.register([our_pod_service(name, cluster_uid=uid) for name in names])
        assert written.done == len(names)

    async def look_for(self, seconds: float) -> int:
        """Make every look that is due within this many seconds from now; return how many there were."""
        end, looks = self.clock() + seconds, 0
        while (due := self.collector.look_due) <= end:
            self.clock.skip(max(0.0, due - self.clock()))
            await self.collector.look()
            looks += 1
        self.clock.skip(max(0.0, end - self.clock()))
        return looks

    def in_catalog(self) -> set[str]:
        """Return the Pods whose services the catalog shows at the agent's node."""
        return {one.id.rpartition("--")[2] for one in self.consul.catalog.services_of("agent-1")}

    def value(self, name: str, **labels: str) -> float:
        """Return a figure."""
        found = self.metrics.get_sample_value(f"k8s_consul_registrar_{name}", labels)
        assert found is not None
        return found


@asynccontextmanager
async def running(release: ConsulRelease = NEWEST, *, has_rights: bool = False) -> AsyncIterator[Lab]:
    """Run an agent whose tokens do not let it remove anything from the catalog, unless told otherwise."""
    options = ConsulOptions(release, is_server=False, token="root")
    async with Consul(options) as consul:
        consul.tokens.create("old")
        consul.tokens.create("new")
        consul.agent.has_node_write = has_rights
        async with client_of(consul.url, token="old") as old, client_of(consul.url, token="new") as new:
            services = [our_pod_service(name, cluster_uid=UID) for name in "abc"]
            assert (await AgentRegistry(old).register(services)).done == len(services)
            if not has_rights:
                consul.tokens.revoke("old")  # the agent of 1.8 uses the token of the registration
            lab = Lab(AgentRegistry(new), consul)
            lab.cluster.put_list([make_pod(name) for name in "abc"])
            yield lab


@each_release()
async def test_service_that_the_agent_left_goes_within_90_seconds(release: ConsulRelease) -> None:
    """Two looks show it; it is named once, counted, and removed by the second."""
    async with running(release) as lab:
        lab.cluster.remove(make_pod("a"))
        await lab.registry.deregister([our_pod_service("a")])
        with capture_logs() as logs:
            assert await lab.look_for(64) == 1
            assert lab.in_catalog() == set("abc"), "one look proves nothing"
            assert await lab.look_for(20) == 1
        assert lab.in_catalog() == set("bc")
        (warning,) = [line for line in logs if line["event"] == LEFT]
        assert (warning["log_level"], warning["services"]) == ("warning", "pod--shop--a")
        assert lab.value("ghost_services") == 0
        assert lab.value("ghost_removals_total", outcome="success") == 1
        assert await lab.look_for(3600) == 0, "nothing is left to look for"


@pytest.mark.parametrize("policy", [Policy.UPSERT_ONLY, Policy.OBSERVE])
async def test_policy_that_removes_nothing_keeps_ghosts(policy: Policy) -> None:
    """They are named and counted."""
    async with running(NEWEST) as lab:
        lab.start(AgentGhosts(lab.registry), policy)
        lab.cluster.remove(make_pod("a"))
        await lab.registry.deregister([our_pod_service("a")])
        await lab.look_for(180)
        assert lab.in_catalog() == set("abc")
        assert lab.value("ghost_services") == 1


@each_release()
async def test_agent_that_lost_its_data_leaves_no_ghost_and_loses_nothing(release: ConsulRelease) -> None:
    """The Pod that is gone goes, once the API server confirms it; those that are there get registered again."""
    async with running(release) as lab:
        lab.cluster.put_list([make_pod("b"), make_pod("c")])
        lab.consul.agent.restart(is_wiped=True)
        lab.start(AgentGhosts(lab.registry))
        assert await lab.look_for(90) == 2
        assert lab.in_catalog() == set("bc")
        assert [key.name for key in lab.cluster.reads] == ["a"]


@each_release()
async def test_agent_with_rights_leaves_nothing(release: ConsulRelease) -> None:
    """Looks find nothing, and end."""
    async with running(release, has_rights=True) as lab:
        lab.cluster.remove(make_pod("a"))
        await lab.registry.deregister([our_pod_service("a")])
        with capture_logs() as logs:
            assert await lab.look_for(90) == 2
        assert (lab.in_catalog(), logs) == (set("bc"), [])


async def test_service_that_came_back_between_the_looks_stays() -> None:
    """It stays if it is desired, if the agent holds it, or if its record changed."""
    async with running() as lab:
        services = [our_pod_service(name, cluster_uid=UID) for name in "abc"]
        for name in "abc":
            lab.cluster.remove(make_pod(name))
        await lab.registry.deregister(services)
        assert await lab.look_for(40) == 1
        lab.cluster.put(make_pod("a"))
        await lab.register("b")
        record = lab.consul.catalog.service("agent-1", services[2].id)
        assert record is not None
        with lab.consul.catalog.apply():
            lab.consul.catalog.put_service("agent-1", type(record)(services[2].id, "new", meta=record.meta))
        assert await lab.look_for(40) == 1
        assert lab.in_catalog() == set("abc")
        await lab.look_for(60)
        assert lab.in_catalog() == set("ab"), "the changed record was seen twice by now"


@pytest.mark.parametrize(
    "why", ["not listed", "exists", "api server is down", "another cluster's", "uid unknown"]
)
async def test_ghost_that_is_not_proven_stays_and_is_counted(why: str) -> None:
    """A wiped agent says nothing about the cluster: the proof is that of any removal."""
    async with running() as lab:
        await lab.register("gone", uid="" if why == "uid unknown" else "uid-2" if "another" in why else UID)
        lab.consul.agent.restart(is_wiped=True)
        if why == "not listed":
            lab.cluster = MemoryCluster(clock=lab.clock)
            lab.cluster.desired.learn_cluster_uid(UID)
        if why == "exists":
            lab.cluster.objects[make_pod("gone").key] = make_pod("gone")
        lab.cluster.is_down = why == "api server is down"
        lab.start(AgentGhosts(lab.registry))
        with capture_logs() as logs:
            await lab.look_for(100)
        assert lab.in_catalog() == {*"abc", "gone"}
        if why != "another cluster's":
            assert [line["event"] for line in logs] == [LEFT]
            assert lab.value("ghost_services") == (4 if why == "not listed" else 1)


class RacingAgent:
    """Ghosts of an agent; the object comes back while the API server is asked."""

    def __init__(self, ghost: Service) -> None:
        self.traffic = AgentTraffic()
        self.ghost = ghost
        self.removed: list[str] = []

    async def find(self) -> Ghosts:
        """Return one."""
        return Ghosts("agent-1", (self.ghost,))

    async def remove(self, node: str, services: Sequence[Service]) -> Written:
        """Note what is removed."""
        assert node == "agent-1"
        self.removed += [one.id for one in services]
        return Written(len(services))


async def test_object_that_comes_back_while_others_are_asked_for_keeps_its_service() -> None:
    """A service that is desired by the time of the removal stays."""
    async with running() as lab:
        ghost = our_pod_service("late", cluster_uid=UID)
        agent = RacingAgent(replace(ghost, index=7))
        lab.start(agent)
        read = lab.cluster.read_object

        async def read_and_return(key: ObjectKey) -> Item | None:
            item = await read(key)
            lab.cluster.put(make_pod("late"))
            return item

        lab.cluster.read_object = read_and_return  # type: ignore[method-assign]
        await lab.look_for(90)
        assert [key.name for key in lab.cluster.reads] == ["late"]
        assert agent.removed == []


async def test_answers_of_several_agents_remove_nothing() -> None:
    """Each may be about another node than the one that was written to; what is left is counted."""
    async with running() as lab:
        lab.cluster.remove(make_pod("a"))
        await lab.registry.deregister([our_pod_service("a")])
        lab.collector._is_steady = lambda: False
        await lab.look_for(90)
        assert (lab.in_catalog(), lab.value("ghost_services")) == (set("abc"), 1)
