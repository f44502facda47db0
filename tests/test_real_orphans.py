"""Services of an agent that was killed, on real Consul: a server, two agents, the registrar between them."""

import asyncio
import signal
from collections.abc import Callable

import pytest

from builders import make_service, our_pod_service
from consul_kit import connected, make_token
from daemon import Daemon
from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.lost_agents import LostAgents
from k8s_consul_registrar.model import AgentHealth, Service
from lab import Lab, running_lab_with
from real_process import wait_until
from real_servers import REAL, RealConsul, real_consul

pytestmark = [*REAL, pytest.mark.timeout(120)]

# The servers suspect a silent member for seconds instead of the usual half minute.
QUICK_GOSSIP = (
    '-hcl=gossip_lan { probe_interval = "200ms" probe_timeout = "100ms" suspicion_mult = 2 '
    'gossip_interval = "50ms" }'
)
SETTINGS = {"ORPHAN_AFTER": "2", "SYNC_PERIOD": "1"}
LOST_WITHIN = 40.0
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

    await wait_until(is_so, LOST_WITHIN)


async def until_at(server: RealConsul, node: str, is_so: Callable[[set[str]], bool]) -> None:
    """Wait until the IDs at a node are as wanted."""

    async def look() -> bool:
        return is_so(await names_at(server, node))

    await wait_until(look, 20)


async def sync(lab: Lab, agent: RealConsul, count: int) -> None:
    """Have a registrar of ours bring Pods into the catalog through an agent, and end."""
    async with await lab.registrar(CONSUL_ADDRESS=agent.address, **SETTINGS) as daemon:
        await until_at(lab_server(lab), agent.node, lambda ids: len(ids) >= count)
        assert await daemon.terminate() == 0


_SERVERS: dict[int, RealConsul] = {}


def lab_server(lab: Lab) -> RealConsul:
    """Return the server that a lab's agents belong to."""
    return _SERVERS[id(lab)]
