"""The nodes of lost agents, as the whole daemon looks after them in the sandbox."""

import asyncio
import time
from typing import Any

import aiohttp
import pytest

from k8s_consul_registrar.model import Service
from k8s_consul_registrar.sandbox.consul_release import ConsulOptions, ConsulRelease
from support.builders import our_pod_service
from support.lab import SandboxLab, each_release, running_lab

QUICK_LOSS = {"ORPHAN_AFTER": "1"}
REMOVED = "services of a lost agent are removed"
STAY = "services of a lost agent stay"


async def put(lab: SandboxLab, path: str, body: Any) -> None:
    """Send Consul a write as another client, past the door."""
    async with aiohttp.ClientSession() as session, session.put(lab.consul.url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()


async def agent_at(lab: SandboxLab, node: str, status: str, *services: Service, **meta: str) -> None:
    """Have the catalog show an agent's node with this state and these services."""
    check = {"CheckID": "serfHealth", "Name": "Serf Health Status", "Status": status}
    await put(
        lab, "/v1/catalog/register", {"Node": node, "Address": "192.0.2.7", "Check": check, "NodeMeta": meta}
    )
    for one in services:
        body = {"ID": one.id, "Service": one.name, "Address": one.address, "Port": one.port}
        entry = {**body, "Meta": dict(one.meta), "Tags": list(one.tags)}
        await put(lab, "/v1/catalog/register", {"Node": node, "SkipNodeUpdate": True, "Service": entry})


def at(lab: SandboxLab, node: str = "old") -> set[str]:
    """Return the names of the services at a node."""
    return {one.id.rpartition("--")[2] for one in lab.consul.catalog.services_of(node)}


@each_release()
async def test_lost_agents_node_is_cleared_of_ours(release: ConsulRelease) -> None:
    """Services that our agent has, or whose objects are gone, go; others' services, and the node itself, stay."""
    async with running_lab(ConsulOptions(release)) as lab:
        await lab.cluster.add_pod()
        others = [
            our_pod_service("theirs", cluster="other"),
            Service("hand-made", "hand-made", "192.0.2.8", 1),
        ]
        ours = [our_pod_service("web-1"), our_pod_service("gone")]
        await agent_at(lab, "old", "critical", *ours, *others)
        async with await lab.registrar(**QUICK_LOSS) as daemon:
            await daemon.until(lambda: at(lab) == {"theirs", "hand-made"})
            line = await daemon.until_said(REMOVED)
            assert (line["node"], line["removed"], line["refused"]) == ("old", 2, 0)
            assert await daemon.metric('orphan_removals_total{outcome="success"}') == 2
            await daemon.passes(3)
            assert (len(daemon.said(REMOVED)), len(daemon.said(STAY))) == (1, 0)
        assert lab.consul.catalog.node("old") is not None
        assert lab.has("pod--shop--web-1")


async def test_lost_agent_asks_for_a_full_pass() -> None:
    """However long the period is, its node is cleared when its time has come."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await agent_at(lab, "old", "critical", our_pod_service("web-1"))
        async with await lab.registrar(**QUICK_LOSS, SYNC_PERIOD="600") as daemon:
            await daemon.until(lambda: at(lab) == set())


async def test_only_an_agent_that_is_lost_loses_anything() -> None:
    """A healthy agent's node, our own agent's and one that is no agent's are left alone."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        one = our_pod_service("web-1")
        await agent_at(lab, "healthy", "passing", one)
        await agent_at(lab, "external", "critical", one, **{"external-node": "true"})
        async with await lab.registrar(**QUICK_LOSS) as daemon:
            await daemon.until(lambda: lab.has("pod--shop--web-1"))
            await agent_at(lab, "agent-1", "critical")
            await agent_at(lab, "old", "critical", one)
            await daemon.until(lambda: at(lab) == set())
            await daemon.passes(3)
            assert len(daemon.said(REMOVED)) == 1
        for node in ("healthy", "external", "agent-1"):
            assert "web-1" in at(lab, node), node


async def test_agent_that_is_back_in_time_keeps_everything() -> None:
    """A loss that is over before its time is nothing, however long the registrar runs after it."""
    for orphan_after in (3, 12, 48):
        async with running_lab() as lab, await lab.registrar(ORPHAN_AFTER=str(orphan_after)) as daemon:
            await lab.cluster.add_pod()
            await daemon.until(lambda: lab.has("pod--shop--web-1"))
            lost_at = time.monotonic()
            await agent_at(lab, "old", "critical", our_pod_service("web-1"))
            await daemon.passes(2)
            await agent_at(lab, "old", "passing")
            if time.monotonic() - lost_at > orphan_after / 2:
                continue  # the machine is too busy for a loss this short
            await asyncio.sleep(orphan_after)
            await daemon.passes(2)
            assert at(lab) == {"web-1"}
            assert daemon.said(REMOVED) == []
            return
    pytest.fail("two passes took 24 seconds")


async def test_service_our_agent_lacks_stays_at_the_lost_one() -> None:
    """A desired service whose ID is foreign at our agent stays at the lost agent's node."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        holder = await lab.seed("pod--shop--web-1", {"cluster": "other"})
        await agent_at(lab, "old", "critical", our_pod_service("web-1"))
        async with await lab.registrar(**QUICK_LOSS) as daemon:
            line = await daemon.until_said(STAY)
            assert (line["node"], line["not_here"]) == ("old", 1)
            await daemon.until(lambda: _shows(daemon, 'orphaned_services{why="not_here"}', 1))
            assert at(lab) == {"web-1"}
            await lab.unseed(holder.id)
            await daemon.until(lambda: at(lab) == set())
            await daemon.until(lambda: _shows(daemon, 'orphaned_services{why="not_here"}', 0))


async def _shows(daemon: Any, sample: str, value: float) -> bool:
    shown: float | None = await daemon.metric(sample)
    return shown == value


async def test_nothing_goes_that_a_blind_source_would_have_to_prove() -> None:
    """While Pods cannot be listed, what our agent does not hold stays; what it holds goes all the same."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await agent_at(lab, "old", "passing", our_pod_service("gone"), our_pod_service("web-1"))
        async with await lab.registrar(**QUICK_LOSS) as daemon:
            await daemon.ready()
            lab.api_door.refuse()
            lab.api_door.cut()
            await daemon.until_said("cannot list; nothing of it is deregistered meanwhile")
            await agent_at(lab, "old", "critical")
            await daemon.until(lambda: at(lab) == {"gone"})
            await daemon.until(lambda: _shows(daemon, 'orphaned_services{why="blind"}', 1))
            await daemon.passes(5)
            assert at(lab) == {"gone"}


async def test_catalog_backend_leaves_lost_agents_alone() -> None:
    """There, services belong to no agent that could be lost."""
    async with running_lab() as lab:
        await lab.cluster.add_pod()
        await agent_at(lab, "old", "critical", our_pod_service("web-1"), our_pod_service("gone"))
        async with await lab.registrar(**QUICK_LOSS, CONSUL_BACKEND="catalog") as daemon:
            await daemon.passes(8)
        assert at(lab) == {"web-1", "gone"}
