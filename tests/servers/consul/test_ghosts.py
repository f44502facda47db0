"""Services that an agent left in the catalog: finding and removing them, and services that come back meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
from aiohttp import web

from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.ghosts import AgentGhosts
from k8s_consul_registrar.errors import ConsulRefused
from k8s_consul_registrar.model import Service
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions
from support.builders import make_service, our_pod_service
from support.doors import HttpDoor, TcpProxy
from support.processes import LOOPBACK
from support.scripted import client_of

A, B, C = (our_pod_service(name) for name in "abc")
# Requests of one removal: the agent's name and the service, before and after it, and the transaction.
REQUESTS = 7


class SlowDoor(HttpDoor):
    """Stands before a Consul; `delay` is awaited before each request is carried on."""

    delay: Callable[[web.Request], Awaitable[None]] | None = None

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if self.delay is not None:
            await self.delay(request)
        return await super()._serve(request)


class World(NamedTuple):
    """An agent without the right to change its node, the door before it, and a registry behind that."""

    consul: Consul
    door: SlowDoor
    registry: AgentRegistry

    def in_catalog(self) -> set[str]:
        """Return the IDs that the catalog shows at the agent's node."""
        return {one.id for one in self.consul.catalog.services_of("agent-1")}


@asynccontextmanager
async def leaving(*services: Service) -> AsyncIterator[World]:
    """Run an agent that held these services, deregistered them, and left them in the catalog."""
    options = ConsulOptions(NEWEST, is_server=False)
    async with (
        Consul(options) as consul,
        SlowDoor(consul.url) as door,
        client_of(f"http://{LOOPBACK}:{door.port}") as client,
    ):
        consul.agent.has_node_write = False
        registry = AgentRegistry(client)
        assert (await registry.register(services)).done == len(services)
        assert (await registry.deregister(services)).done == len(services)
        assert consul.agent.services == {}
        yield World(consul, door, registry)


async def test_ghosts_are_what_the_catalog_shows_and_the_agent_does_not_hold() -> None:
    """A registrar wrote them; it is known which of them the agent deregistered for this process."""
    started = time.monotonic()
    async with leaving(A, B, make_service("hand-made")) as world:
        await world.registry.register([B, C])
        found = await AgentGhosts(world.registry).find()
        assert (found.node, found.services, found.deregistered) == ("agent-1", (A,), frozenset({A.id}))
        assert found.services[0].index > 0
        assert world.registry.traffic.deregistered_at > started
        world.consul.agent.restart(is_wiped=True)
        found = await AgentGhosts(world.registry).find()
        assert set(found.services) == {A, B, C}
        assert found.deregistered == {A.id}


async def test_ghosts_are_removed_by_the_record_that_was_read() -> None:
    """One that changed since is stale and stays."""
    async with leaving(A, B) as world:
        found = await AgentGhosts(world.registry).find()
        changed = world.consul.catalog.service("agent-1", B.id)
        assert changed is not None
        with world.consul.catalog.apply():
            world.consul.catalog.put_service("agent-1", type(changed)(B.id, "edited"))
        written = await AgentGhosts(world.registry).remove("agent-1", found.services)
        assert (written.done, written.failures, written.stale) == (1, (), (B.id,))
        assert world.in_catalog() == {B.id}


@pytest.mark.parametrize("number", range(REQUESTS + 1))
@pytest.mark.parametrize("is_own", [True, False], ids=["by us", "by another"])
async def test_service_that_comes_back_during_its_removal_is_not_removed(number: int, is_own: bool) -> None:
    """It is registered just before each request of the removal in turn, with the very same content."""
    async with leaving(A, B) as world, client_of(world.consul.url) as direct:
        found = await AgentGhosts(world.registry).find()
        registry = world.registry if is_own else AgentRegistry(direct)
        returned: list[asyncio.Task[object]] = []
        left = number

        async def delay(request: web.Request) -> None:
            nonlocal left
            left -= 1
            if left or request.path.endswith("/register"):
                return
            returned.append(asyncio.create_task(registry.register([A])))
            await asyncio.wait(returned, timeout=0.2)

        world.door.delay = delay if number else None
        written = await AgentGhosts(world.registry).remove(
            "agent-1", [one for one in found.services if one == A]
        )
        await asyncio.gather(*returned)
        assert len(returned) == (1 if number else 0)
        if not number:
            assert (written.done, world.in_catalog()) == (1, {B.id})
            return
        assert set(world.consul.agent.services) == {A.id}
        assert world.in_catalog() == {A.id, B.id}


async def test_registration_under_way_is_not_removed() -> None:
    """Its record may be in the catalog before the agent is asked."""
    async with leaving(A) as world:
        found = await AgentGhosts(world.registry).find()
        async with world.registry.traffic.registering(A.id):
            written = await AgentGhosts(world.registry).remove("agent-1", found.services)
        assert (written.done, written.stale, world.in_catalog()) == (0, (A.id,), {A.id})


async def test_answers_of_another_agent_remove_nothing() -> None:
    """Behind a load balancer another agent answers, which holds nothing of the first one's node."""
    async with leaving(A) as world:
        found = await AgentGhosts(world.registry).find()
        other = world.consul.peer("agent-2", is_server=False)
        async with other, client_of(other.url) as client:
            with pytest.raises(ConsulRefused, match="different nodes"):
                await AgentGhosts(AgentRegistry(client)).remove("agent-1", found.services)
        assert world.in_catalog() == {A.id}


async def test_connections_that_lead_to_different_agents_find_nothing_of_each_other() -> None:
    """Each look keeps to one connection, so it compares an agent with its own node."""
    async with (
        Consul(ConsulOptions(NEWEST, is_server=False)) as first,
        first.peer("agent-2", is_server=False) as second,
        client_of(first.url) as at_first,
        client_of(second.url) as at_second,
    ):
        await AgentRegistry(at_first).register([A])
        await AgentRegistry(at_second).register([B])
        ports = (int(one.address.rpartition(":")[2]) for one in (first, second))
        async with (
            TcpProxy(LOOPBACK, *ports) as service,
            client_of(f"http://{service.address}") as client,
        ):
            registry = AgentRegistry(client)
            found = [await AgentGhosts(registry).find() for _ in range(4)]
        assert {one.node for one in found} == {"agent-1", "agent-2"}
        assert not any(one.services for one in found)
