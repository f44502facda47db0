"""Three real servers behind one address, as consul-k8s sets them up without agents: both ways to meet them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from support.daemon import Daemon
from support.doors import TcpProxy
from support.lab import Lab, running_lab_with
from support.processes import LOOPBACK
from support.real_servers import REAL, RealConsul, real_servers

pytestmark = [REAL, pytest.mark.long]

NODE = "k8s-lab"
PODS = tuple(f"web-{number}" for number in range(8))
UNFIT = "CONSUL_ADDRESS does not suit the agent backend"
Servers = tuple[RealConsul, ...]


def ids(*names: str) -> set[str]:
    """Return the service IDs of Pods."""
    return {f"pod--shop--{name}" for name in names}


@asynccontextmanager
async def three_servers() -> AsyncIterator[tuple[Servers, Lab]]:
    """Run three servers whose connections are shared out in turn, beside a cluster with some Pods."""
    async with real_servers(3) as servers:
        ports = [int(one.address.rpartition(":")[2]) for one in servers]
        async with TcpProxy(LOOPBACK, *ports) as service, running_lab_with(service.address) as lab:
            for number, name in enumerate(PODS):
                await lab.cluster.add_pod(name, ips=[f"198.51.100.{number + 10}"])
            yield servers, lab


async def everywhere(servers: Servers) -> list[tuple[str, str]]:
    """Return node and ID of every service of the catalog that is not Consul's own, each record once."""
    _, nodes = await servers[0].request("GET", "/v1/catalog/nodes?consistent")
    found = []
    for name in sorted(one["Node"] for one in nodes):
        _, node = await servers[0].request("GET", f"/v1/catalog/node/{name}?consistent")
        found += [(name, one) for one in node["Services"] if one != "consul"]
    return found


async def keeps(daemon: Daemon, servers: Servers, *names: str) -> None:
    """Wait until the catalog has just these Pods' services, each once and at the registrar's node."""

    async def is_one_set() -> bool:
        return sorted(await everywhere(servers)) == sorted((NODE, one) for one in ids(*names))

    await daemon.until(is_one_set)


async def test_auto_keeps_exactly_one_set_of_services() -> None:
    """From the first sync on, over removals, a restart, and a server that goes."""
    async with three_servers() as (servers, lab):
        async with await lab.registrar(CONSUL_BACKEND="auto") as daemon:
            await keeps(daemon, servers, *PODS)
            assert daemon.said("CONSUL_BACKEND=auto has chosen")[0]["backend"] == "catalog"
            for name in PODS[:3]:
                await lab.cluster.delete_pod(name)
            await keeps(daemon, servers, *PODS[3:])
            await daemon.passes(3)
            await keeps(daemon, servers, *PODS[3:])
            assert daemon.said(UNFIT) == []
        async with await lab.registrar(CONSUL_BACKEND="auto") as daemon:
            await daemon.ready()
            await lab.cluster.delete_pod(PODS[3])
            await keeps(daemon, servers, *PODS[4:])
        for one in servers:
            _, held = await one.request("GET", "/v1/agent/services")
            assert held == {}


async def test_agent_backend_says_what_is_wrong_within_one_resync() -> None:
    """Before the first resync has ended, both problems and their remedy are in the log."""
    async with three_servers() as (_, lab), await lab.registrar() as daemon:
        await daemon.passes(1)
        events = [(line["event"], line.get("about", "")) for line in daemon.lines]
        first = next(at for at, (event, _) in enumerate(events) if event == "resync")
        said = {about for event, about in events[:first] if event == UNFIT}
        assert said == {"server", "several_nodes"}
        assert all("CONSUL_BACKEND=catalog" in line["problem"] for line in daemon.said(UNFIT))
        for problem in said:
            await daemon.measures(f'agent_problem{{problem="{problem}"}}', 1)
