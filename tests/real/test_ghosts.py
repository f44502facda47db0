"""Services that a real agent leaves in the catalog: a rotated token, and an agent whose data was wiped."""

import functools
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from k8s_consul_registrar.commands.check.consul import check_ghosts
from k8s_consul_registrar.commands.check.report import Result
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.ghosts import AgentGhosts
from k8s_consul_registrar.registrar.audit import Audit
from k8s_consul_registrar.registrar.decide import Rules
from k8s_consul_registrar.registrar.ghosts import GhostCollector
from k8s_consul_registrar.registrar.metrics import RegistrarMetrics
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.registrar.schedule import GhostChecks
from k8s_consul_registrar.targets.service_names import RandomShards
from servers.consul.test_ghosts import SlowDoor
from support.builders import make_pod, our_pod_service
from support.memory import MemoryCluster
from support.processes import LOOPBACK
from support.real_servers import PATIENT, REAL, RealConsul, Token, connected, make_token, real_consul, revoke
from support.scripted import client_of
from support.waiting import Clock, until

pytestmark = REAL

UID = "uid-1"
RIGHTS = 'node_prefix "" { policy = "read" } service_prefix "" { policy = "write" } agent_prefix "" { policy = "read" }'
# The agent's own token, set when it starts: Consul does not know it, so it may not change the agent's node.
POWERLESS = "7c1f5a1e-3c0d-4e0b-9a54-6f0d4f3b2a10"
AGENT_TOKEN = f'-hcl=acl {{ tokens {{ agent = "{POWERLESS}" default = "{POWERLESS}" }} }}'


# Requests of two looks and of a removal, at least: the agent's name and its services around the catalog's list, and
# the agent's name and the service around the transaction.
LEAST_REQUESTS = 2 * 4 + 7


class Lab:
    """A cluster of three Pods, and the collector between a real agent and the catalog."""

    def __init__(self, registry: AgentRegistry) -> None:
        self.clock = Clock(follows=time.monotonic)
        self.registry = registry
        self.cluster = MemoryCluster(clock=self.clock)
        self.cluster.desired.learn_cluster_uid(UID)
        self.cluster.put_list([make_pod(name) for name in "abc"])
        self.collector = GhostCollector(
            AgentGhosts(registry),
            desired=self.cluster.desired,
            decisions=Rules(Identity("lab"), RandomShards()),
            cluster=self.cluster,
            checks=GhostChecks(),
            audit=Audit(),
            metrics=RegistrarMetrics(CollectorRegistry()),
            clock=self.clock,
        )

    async def look_for(self, seconds: float) -> None:
        """Make every look that is due within this many seconds from now."""
        end = self.clock() + seconds
        while (due := self.collector.look_due) <= end:
            self.clock.skip(max(0.0, due - self.clock()))
            await self.collector.look()


async def in_catalog(consul: RealConsul) -> set[str]:
    """Return the Pods whose services the catalog shows at the agent's node."""
    _, found = await consul.request("GET", f"/v1/catalog/node/{consul.node}?consistent")
    return {one.rpartition("--")[2] for one in found["Services"]} - {"consul"}


@asynccontextmanager
async def powerless_agent() -> AsyncIterator[tuple[RealConsul, RealConsul, Token]]:
    """Run a server and an agent whose own token has no rights; yields a registrar's token besides."""
    async with (
        real_consul(acl=True, node="server") as server,
        real_consul(AGENT_TOKEN, join=server.serf, acl=True, node="agent") as agent,
    ):
        yield server, agent, await make_token(server, "new", RIGHTS)


async def seed(server: RealConsul, agent: RealConsul, names: str) -> None:
    """Register services at the agent by a token that is revoked once the catalog shows them."""
    old = await make_token(server, f"old-{time.monotonic_ns()}", RIGHTS)
    async with connected(agent, token=old.secret) as client:
        services = [our_pod_service(name, cluster_uid=UID) for name in names]
        assert (await AgentRegistry(client).register(services)).done == len(services)

    async def are_shown() -> bool:
        return set(names) <= await in_catalog(agent)

    await until(are_shown)
    await revoke(server, old)


@asynccontextmanager
async def agent_with_three() -> AsyncIterator[tuple[RealConsul, RealConsul, Lab]]:
    """Run a server and an agent without rights that has the three services, by a token that is revoked then."""
    async with powerless_agent() as (server, agent, new):
        await seed(server, agent, "abc")
        async with connected(agent, token=new.secret) as client:
            yield server, agent, Lab(AgentRegistry(client))


async def test_rotated_token_leaves_no_ghost() -> None:
    """The agent answers 200 and keeps what it may not remove in the catalog; 90 s later that is gone as well."""
    async with agent_with_three() as (_, agent, lab):
        lab.cluster.remove(make_pod("a"))
        assert (await lab.registry.deregister([our_pod_service("a")])).done == 1
        await lab.look_for(40)
        assert await in_catalog(agent) == set("abc")
        await lab.look_for(50)
        assert await in_catalog(agent) == set("bc")


async def test_agent_that_may_not_write_its_node_is_known_before_it_leaves_anything() -> None:
    """Its node in the catalog is as the servers made it; that of an agent with rights has the agent's meta."""
    async with agent_with_three() as (server, _, lab):
        assert (await AgentGhosts(lab.registry).find()).may_write is False
        (finding,) = await check_ghosts(AgentGhosts(lab.registry), Identity("lab"), UID)
        assert (finding.outcome, "has never written its node agent" in finding.detail) == (Result.WARN, True)
        async with connected(server) as client:

            async def has_written() -> bool:
                return (await AgentGhosts(AgentRegistry(client)).find()).may_write

            await until(has_written)


async def test_wiped_agent_leaves_no_ghost_and_loses_nothing_that_is_wanted() -> None:
    """It comes back empty, and may not remove anything; the Pods' services stay until they are registered again."""
    async with agent_with_three() as (_, agent, lab):
        lab.cluster.put_list([make_pod("b"), make_pod("c")])
        await agent.program.stop(signal.SIGKILL)
        shutil.rmtree(agent.program.log.parent / "data" / "services")
        await agent.start()

        async def is_empty() -> bool:
            return not [one async for one in lab.registry.services()]

        await until(is_empty)
        await lab.look_for(90)
        assert await in_catalog(agent) == set("bc")


@pytest.mark.long
async def test_service_that_comes_back_at_any_request_of_both_looks_or_of_the_removal_stays() -> None:
    """It is registered with the same content just before each request in turn; left out, it is removed."""
    a, count = our_pod_service("a", cluster_uid=UID), 0
    async with (
        powerless_agent() as (server, agent, new),
        SlowDoor(agent.url) as door,
        client_of(f"http://{LOOPBACK}:{door.port}", token=new.secret, timing=PATIENT) as client,
        connected(agent, token=new.secret) as direct,
    ):
        other = AgentRegistry(direct)
        has_returned = True
        while has_returned:
            await seed(server, agent, "a")
            lab = Lab(AgentRegistry(client))
            lab.cluster.remove(make_pod("a"))
            assert (await lab.registry.deregister([a])).done == 1
            count += 1
            left, has_returned = count, False

            async def delay(_: web.Request) -> None:
                nonlocal left, has_returned
                left -= 1
                if not left:
                    has_returned = True
                    await other.register([a])

            door.delay = delay
            await lab.look_for(90)
            door.delay = None

            async def is_settled(wanted: set[str]) -> bool:
                held = {one.id async for one in other.services()}
                return held == {a.id for _ in wanted} and await in_catalog(agent) == wanted

            await until(functools.partial(is_settled, {"a"} if has_returned else set()), f"request {count}")
            # Anti-entropy, which would repair a removal later, has nothing to repair.
            assert await in_catalog(agent) == ({"a"} if has_returned else set())
    assert count > LEAST_REQUESTS
