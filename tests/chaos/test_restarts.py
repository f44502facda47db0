"""Faults: the registrar killed at random moments, and restarted with its agent, its data kept or lost."""

import asyncio
import random
import signal
import time

import pytest

from real.test_deploy import agent_flags
from support.lab import HEAL_WITHIN, ChaosLab, chaos, chaos_lab, scaled
from support.real_servers import RealConsul, empty, real_consul
from support.waiting import until

pytestmark = chaos("chaos-restarts", soak_seconds=900)

SHARDS = "a,b,c,d,e,f,g,h"


async def test_killed_at_random_moments_of_a_sync() -> None:
    """After each kill -9 the next run goes on; in the end nothing is missing, doubled or created twice."""
    pick = random.Random(5)
    seen: dict[str, tuple[int, str]] = {}
    async with real_consul() as consul, chaos_lab(consul) as lab:
        lab.put_pods(2000)
        lab.put_nodes(20)

        async def look(when: str) -> None:
            for key, one in (await lab.records()).items():
                first = seen.setdefault(key, (one.created, one.shard))
                assert (one.created, one.shard) == first, f"{key} was removed and made again, {when}"

        for number in range(scaled(10, 100)):
            async with await lab.chaotic(SHARD_PATHS=SHARDS) as daemon:
                await asyncio.sleep(pick.uniform(0.3, 1.6))
                daemon.send(signal.SIGKILL)
                await daemon.ended()
            await look(f"by kill {number}")
            lab.drop_pod(f"web-{number}")
            lab.put_pods(scaled(200, 20), prefix=f"batch-{number}")
        async with await lab.chaotic(SHARD_PATHS=SHARDS) as daemon:
            await lab.equal(daemon)
            await daemon.ready()
            await look("in the end")
            assert await lab.is_quiet_for(1)
        lab.assert_nothing_wrongful()


async def _with_agent(lab: ChaosLab, agent: RealConsul) -> dict[str, str]:
    """Return the settings that aim a registrar at an agent instead of the lab's own Consul."""
    return {"CONSUL_BACKEND": "agent", "CONSUL_ADDRESS": agent.address, "SHARD_PATHS": SHARDS}


@pytest.mark.parametrize("first", ["agent", "registrar"])
async def test_restarted_with_its_agent_and_the_data(first: str) -> None:
    """No target is missing from the catalog at any moment, none is made again, and no shard moves."""
    node, flags = agent_flags()
    async with (
        real_consul(node="server") as server,
        real_consul(*flags, join=server.serf, node=node) as agent,
        chaos_lab(server) as lab,
    ):
        lab.put_pods(300)
        lab.put_nodes(3)
        settings = await _with_agent(lab, agent)
        async with await lab.chaotic(**settings) as daemon:
            await lab.equal(daemon, node=node)
            before = await lab.records(node)
            looking = asyncio.create_task(_watch_for_gaps(lab, node))
            if first == "registrar":
                await daemon.terminate()
            await agent.program.stop(signal.SIGTERM)
            if first == "agent":
                await daemon.terminate()
        await asyncio.sleep(1)
        agent.program.launch()
        async with await lab.chaotic(**settings) as daemon:
            await daemon.until(agent.is_ready, within=HEAL_WITHIN)
            await daemon.ready()
            lab.put_pod("later")
            await lab.equal(daemon, node=node)
            await asyncio.sleep(2)
            after = await lab.records(node)
        looking.cancel()
        gaps = (await asyncio.gather(looking, return_exceptions=True))[0]
        assert isinstance(gaps, asyncio.CancelledError), gaps
        assert {key: after[key] for key in before} == before


async def _watch_for_gaps(lab: ChaosLab, node: str) -> None:
    """Fail as soon as the catalog lacks something that the cluster wants."""
    wanted = set(lab.wanted)
    while True:
        if lacks := wanted - (await lab.records(node)).keys():
            raise AssertionError(f"{len(lacks)} are missing, {min(lacks)} among them")
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("lost", ["by the agent alone", "at a restart of both"])
async def test_restarted_with_its_agent_whose_data_is_lost(lost: str) -> None:
    """The catalog is filled again within 30 seconds, each service in the shard it was in."""
    node, flags = agent_flags()
    async with (
        real_consul(node="server") as server,
        real_consul(*flags, join=server.serf, node=node) as agent,
        chaos_lab(server) as lab,
    ):
        lab.put_pods(300)
        settings = await _with_agent(lab, agent)
        async with await lab.chaotic(**settings) as daemon:
            await lab.equal(daemon, node=node)
            before = {key: one.shard for key, one in (await lab.records(node)).items()}
            assert len(set(before.values())) == 8
            if lost == "by the agent alone":
                await agent.program.stop(signal.SIGKILL)
                empty(agent)
                agent.program.launch()
                began = time.monotonic()
                await _refilled(lab, agent, node, began)
        if lost != "by the agent alone":
            await agent.program.stop(signal.SIGKILL)
            empty(agent)
            agent.program.launch()
            async with await lab.chaotic(**settings) as daemon:
                await _refilled(lab, agent, node, time.monotonic())
        after = {key: one.shard for key, one in (await lab.records(node)).items()}
        assert after == before


async def _refilled(lab: ChaosLab, agent: RealConsul, node: str, began: float) -> None:
    """Wait until the fresh agent itself holds everything, and the catalog shows it."""

    async def is_refilled() -> bool:
        _, held = await agent.request("GET", "/v1/agent/services")
        return set(held or ()) == set(lab.wanted) and await lab.is_equal(node)

    await until(is_refilled, within=HEAL_WITHIN - (time.monotonic() - began), every=0.1)
