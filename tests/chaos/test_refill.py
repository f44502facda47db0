"""Faults: an agent that lost everything is filled again in time, and costs it no long lists meanwhile."""

import asyncio
import logging
import signal
import time
from typing import NamedTuple

import pytest
from aiohttp import web

from real.test_deploy import agent_flags
from support.daemon import Daemon
from support.doors import HttpDoor
from support.lab import IS_SOAK, ChaosLab, chaos, chaos_lab, scaled
from support.real_servers import RealConsul, empty, real_consul
from support.waiting import PATIENCE, PATIENCE_FACTOR, until

pytestmark = chaos("chaos-restarts", soak_seconds=600)

log = logging.getLogger(__name__)

NODES = 200
REST = scaled(20, 60)  # seconds


class Size(NamedTuple):
    """A number of targets, and the seconds within which an empty agent holds them again."""

    targets: int
    within: float


# The figures; the short run has three times as long on a machine it shares.
SIZES = [
    Size(1000, scaled(30, 10) * PATIENCE_FACTOR),
    *([Size(8200, 30 * PATIENCE_FACTOR)] if IS_SOAK else []),
]


class Counted(HttpDoor):
    """Stands before a Consul and notes the paths that are read."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.reads: list[str] = []

    def saw(self, request: web.Request, body: bytes) -> None:
        """Note a read."""
        if request.method == "GET":
            self.reads.append(request.path_qs)

    def lists(self, node: str) -> int:
        """Count the reads that all services of the agent, or of its node in the catalog, come back for."""
        whole = ("/v1/agent/services", f"/v1/catalog/node-services/{node}", f"/v1/catalog/node/{node}")
        return sum(read.startswith(whole) and "filter=" not in read for read in self.reads)


def _populate(lab: ChaosLab, targets: int) -> None:
    nodes = NODES if targets > 2 * NODES else 0
    lab.put_pods(targets - nodes)
    lab.put_nodes(nodes)


async def _holds_all(lab: ChaosLab, agent: RealConsul, node: str) -> bool:
    """Return True if the agent holds what the cluster wants, and the catalog shows it."""
    _, held = await agent.request("GET", "/v1/agent/services")
    return set(held or ()) == lab.wanted.keys() and await lab.is_equal(node)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size.targets))
async def test_empty_agent_is_filled_again(size: Size) -> None:
    """Killed and started without its data, a client agent holds everything again in time.

    In time is also what takes little longer than the first filling did: nearly all of either is the agent's own
    work, which a busy machine stretches.
    """
    node, flags = agent_flags()
    async with (
        real_consul(node="server") as server,
        real_consul(*flags, join=server.serf, node=node) as agent,
        chaos_lab(server) as lab,
    ):
        _populate(lab, size.targets)
        began = time.monotonic()
        async with await lab.chaotic(CONSUL_BACKEND="agent", CONSUL_ADDRESS=agent.address) as daemon:
            await daemon.until(lambda: bool(daemon.said("resync")), within=5 * PATIENCE)
            first = time.monotonic() - began
            await lab.equal(daemon, within=2 * PATIENCE, node=node)
            registered = await _registered(daemon)
            await agent.program.stop(signal.SIGKILL)
            empty(agent)
            agent.program.launch()
            began = time.monotonic()

            async def is_through() -> bool:
                return await _registered(daemon) >= registered + size.targets

            # Asking Consul for all it holds, again and again, would take its time.
            within = max(size.within, 1.3 * first)
            await daemon.until(is_through, within=within)
            told = time.monotonic() - began
            await until(lambda: _holds_all(lab, agent, node), within=within - told + 5, every=0.5)
            log.info("%s: first %.1f s, refilled %.1f s", size, first, told)
        lab.assert_nothing_wrongful()


async def _registered(daemon: Daemon) -> float:
    return await daemon.metric('writes_total{outcome="success",verb="register"}') or 0.0


async def test_at_rest_an_agent_is_not_listed() -> None:
    """With nothing to do the whole is read once in a period, whatever is asked in between."""
    async with real_consul() as consul, Counted(consul.url) as door, chaos_lab(consul) as lab:
        _populate(lab, scaled(1000, 8200))
        address = f"127.0.0.1:{door.port}"
        async with await lab.chaotic(
            CONSUL_BACKEND="agent", CONSUL_ADDRESS=address, SYNC_PERIOD="60"
        ) as daemon:
            await lab.equal(daemon, within=10 * PATIENCE, node=consul.node)
            await daemon.until(lambda: bool(daemon.said("resync")), within=2 * PATIENCE)
            await asyncio.sleep(5)
            door.reads.clear()
            await asyncio.sleep(REST)
            assert door.lists(consul.node) <= 2, door.reads
            assert len(door.reads) > REST / 4, "the agent is looked at"
