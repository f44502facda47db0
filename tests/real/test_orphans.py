"""Services of an agent that was killed, on real Consul: a server, two agents, the registrar between them."""

import asyncio
import signal
from collections.abc import Callable

import pytest

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.client import ConsulClient, Fence
from k8s_consul_registrar.consul.lost_agents import LostAgents
from k8s_consul_registrar.errors import ConsulFenced
from k8s_consul_registrar.model import AgentHealth, Service
from support.builders import make_service, our_pod_service, unaudited
from support.lab import running_lab_with
from support.real_servers import REAL, RealConsul, connected, make_token, real_consul
from support.waiting import until

pytestmark = [REAL, pytest.mark.long]

# The servers suspect a silent member for seconds instead of the usual half minute.
QUICK_GOSSIP = (
    '-hcl=gossip_lan { probe_interval = "200ms" probe_timeout = "100ms" suspicion_mult = 2 '
    'gossip_interval = "50ms" }'
)
SETTINGS = {"ORPHAN_AFTER": "2", "SYNC_PERIOD": "1"}
LOST_WITHIN = 90.0  # the servers' own half minute, on a busy machine
REMOVED = "services of a lost agent are removed"


async def names_at(server: RealConsul, node: str) -> set[str]:
    """Return the IDs at a node of the catalog."""
    _, found = await server.request("GET", f"/v1/catalog/node/{node}?consistent")
    return set(found["Services"]) if found else set()


async def health_of(server: RealConsul, node: str) -> str:
    """Return what the node's own check says."""
    _, checks = await server.request("GET", f"/v1/health/node/{node}?consistent")
    (status,) = [one["Status"] for one in checks if one["CheckID"] == "serfHealth"]
    return str(status)


async def until_health(server: RealConsul, node: str, status: str) -> None:
    """Wait until a node's own check says this."""

    async def is_so() -> bool:
        return await health_of(server, node) == status

    await until(is_so, within=LOST_WITHIN)


async def until_at(server: RealConsul, node: str, is_so: Callable[[set[str]], bool]) -> None:
    """Wait until the IDs at a node are as wanted."""

    async def look() -> bool:
        return is_so(await names_at(server, node))

    await until(look)


async def put_at(agent: RealConsul, *services: Service) -> None:
    """Register services at an agent as another tool, and wait until the catalog has them."""
    async with connected(agent) as client:
        written = await AgentRegistry(client).register(services)
    assert written.done == len(services)
    wanted = {one.id for one in services}
    await until_at(agent, agent.node, lambda ids: wanted <= ids)


async def test_orphans_go_and_nothing_else_does() -> None:
    """Services that the new agent has, or whose objects are gone, go; others', those not here, and the node stay."""
    async with (
        real_consul(QUICK_GOSSIP, node="server") as server,
        real_consul(QUICK_GOSSIP, join=server.serf, node="old") as old,
        real_consul(QUICK_GOSSIP, join=server.serf, node="new") as new,
        running_lab_with(old.address) as lab,
    ):
        for name in ("web-1", "web-2", "conflict", "gone"):
            await lab.cluster.add_pod(name)
        async with await lab.registrar(**SETTINGS) as daemon:
            await until_at(server, "old", lambda ids: len(ids) == 4)
            assert await daemon.terminate() == 0
        await put_at(old, our_pod_service("theirs", cluster="other"), make_service("hand-made"))
        await put_at(new, our_pod_service("conflict", cluster="other"))
        await lab.cluster.delete_pod("gone")
        await old.program.stop(signal.SIGKILL)
        async with await lab.registrar(CONSUL_ADDRESS=new.address, **SETTINGS) as daemon:
            await until_at(server, "new", lambda ids: {"pod--shop--web-1", "pod--shop--web-2"} <= ids)
            assert len(await names_at(server, "old")) == 6, "it is not known to be lost yet"
            stay = {"pod--shop--conflict", "pod--shop--theirs", "hand-made"}
            await daemon.until(lambda: _are_at(server, "old", stay), within=LOST_WITHIN)
            line = await daemon.until_said(REMOVED)
            assert (line["node"], line["removed"], line["refused"], line["stale"]) == ("old", 3, 0, 0)
            await daemon.passes(6)
            assert await names_at(server, "old") == stay
            assert await health_of(server, "old") == "critical"
            assert len(daemon.said(REMOVED)) == 1
            # No agent holds the ID here any more: the new agent gets the service, the old one loses it.
            await new.request("PUT", "/v1/agent/service/deregister/pod--shop--conflict")
            await daemon.until(
                lambda: _are_at(server, "old", stay - {"pod--shop--conflict"}), within=LOST_WITHIN
            )
        _, found = await server.request("GET", "/v1/catalog/node/old?consistent")
        assert found["Node"]["Node"] == "old"


async def _are_at(server: RealConsul, node: str, ids: set[str]) -> bool:
    return await names_at(server, node) == ids


async def test_agent_that_is_back_before_its_time_keeps_everything() -> None:
    """Its services stay at its node, the very records, though the new agent has them too."""
    async with (
        real_consul(QUICK_GOSSIP, node="server") as server,
        real_consul(QUICK_GOSSIP, join=server.serf, node="old") as old,
        real_consul(QUICK_GOSSIP, join=server.serf, node="new") as new,
        running_lab_with(old.address) as lab,
    ):
        await lab.cluster.add_pod()
        async with await lab.registrar(**SETTINGS) as daemon:
            await until_at(server, "old", lambda ids: len(ids) == 1)
            assert await daemon.terminate() == 0
        await old.program.stop(signal.SIGKILL)
        async with await lab.registrar(
            CONSUL_ADDRESS=new.address, **SETTINGS | {"ORPHAN_AFTER": "30"}
        ) as daemon:
            await until_health(server, "old", "critical")
            await until_at(server, "new", lambda ids: len(ids) == 1)
            _, before = await server.request("GET", "/v1/catalog/node-services/old")
            old.program.launch()
            await until_health(server, "old", "passing")
            await asyncio.sleep(31)
            _, after = await server.request("GET", "/v1/catalog/node-services/old")
            assert after["Services"] == before["Services"]
            assert daemon.said(REMOVED) == []


async def _failing(agents: LostAgents) -> list[AgentHealth]:
    return [one for one in await agents.failing() if one.node == "old"]


async def test_node_is_cleared_only_while_its_agent_is_lost() -> None:
    """Rights on our services and to read nodes do; an agent that is back keeps all; a standby removes nothing."""
    rules = (
        'service_prefix "pod--" { policy = "write" } service_prefix "" { policy = "read" } '
        'node_prefix "" { policy = "read" } agent_prefix "" { policy = "read" }'
    )
    async with (
        real_consul(QUICK_GOSSIP, node="server", acl=True) as server,
        real_consul(QUICK_GOSSIP, join=server.serf, node="old", acl=True) as old,
    ):
        services = [our_pod_service(f"p{number}") for number in range(100)]
        await put_at(old, *services, make_service("other-1"))
        token = await make_token(server, "registrar", rules)
        async with connected(server, token=token.secret) as client:
            agents = LostAgents(client)
            assert await agents.own_node() == "server"
            assert await _failing(agents) == []
            await old.program.stop(signal.SIGKILL)
            await until_health(server, "old", "critical")
            (lost,) = await _failing(agents)
            old.program.launch()
            await until_health(server, "old", "passing")
            late = await agents.location(lost, lambda _: True).clear(unaudited)
            assert (late.done, len(late.stale)) == (0, 100)
            await old.program.stop(signal.SIGKILL)
            await until_health(server, "old", "critical")
            old_case = await agents.location(lost, lambda _: True).clear(unaudited)
            assert (old_case.done, len(old_case.stale)) == (0, 100), "it was back in between"
            (again,) = await _failing(agents)
            assert again.version > lost.version
            fenced = ConsulAccess(ConsulAddress(server.url), token=token.secret)
            async with ConsulClient(fenced, Timing(), fence=Fence(left=lambda: 0.0, grace=1.0)) as standby:
                with pytest.raises(ConsulFenced):
                    await LostAgents(standby).location(again, lambda _: True).clear(unaudited)
            assert len(await names_at(server, "old")) == 101
            cleared = await agents.location(again, lambda one: one.id != "pod--shop--p7").clear(unaudited)
            assert (cleared.done, cleared.failures, cleared.stale) == (99, (), ())
            assert await names_at(server, "old") == {"pod--shop--p7", "other-1"}


async def test_service_missing_from_the_catalog_is_not_here() -> None:
    """A service that our agent holds counts only while the catalog has it too, and has it just so."""
    async with real_consul() as consul, connected(consul) as client:
        names = ("shown", "edited", "lacking")
        await put_at(consul, *(our_pod_service(name) for name in names))
        edited = {"ID": "pod--shop--edited", "Service": "pod--shop--edited", "Port": 1}
        body = {"Node": "test-node", "SkipNodeUpdate": True, "Service": edited}
        lost = {"Node": "test-node", "ServiceID": "pod--shop--lacking"}

        async def is_only_what_is_shown_here() -> bool:
            # A full comparison of a young agent may undo these writes at any moment: then again.
            assert (await consul.request("PUT", "/v1/catalog/register", body))[0] == 200
            assert (await consul.request("PUT", "/v1/catalog/deregister", lost))[0] == 200
            held = [one.id async for one in LostAgents(client).services_here("test-node")]
            return held == ["pod--shop--shown"]

        await until(is_only_what_is_shown_here)
        status, there = await consul.request("GET", "/v1/agent/services")
        assert (status, len(there)) == (200, 3)


async def test_purge_clears_the_node_of_a_lost_agent() -> None:
    """It is shown and cleared of our services without waiting; others', and the node itself, stay."""
    async with (
        real_consul(QUICK_GOSSIP, node="server") as server,
        real_consul(QUICK_GOSSIP, join=server.serf, node="old") as old,
        running_lab_with(server.address) as lab,
    ):
        ours = [our_pod_service("a"), our_pod_service("b", cluster_uid="uid-of-another")]
        await put_at(old, *ours, make_service("hand-made"))
        await put_at(server, our_pod_service("c"))
        settings = {"CLUSTER_NAME": "lab", "CONSUL_ADDRESS": server.address}
        uid = await lab.cluster.uid()
        async with lab.daemon("purge", "--yes", "--cluster-uid", uid, **settings) as command:
            assert await command.ended() == 0
        assert await names_at(server, "server") == {"consul"}
        assert len(await names_at(server, "old")) == 3, "its agent lives"
        await old.program.stop(signal.SIGKILL)
        await until_health(server, "old", "critical")
        async with lab.daemon("purge", "--yes", "--cluster-uid", uid, **settings) as command:
            assert await command.ended() == 0
        assert "1 services of cluster lab at node old, whose agent is gone" in command.output
        assert await names_at(server, "old") == {"pod--shop--b", "hand-made"}
        assert await health_of(server, "old") == "critical"
