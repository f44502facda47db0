"""The registrar's life on each release of the sandbox's Consul, and on Consul's set-ups of today.

Releases after 1.8 are simulated (see `sandbox/test_consul_releases.py`).
"""

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_model import Service
from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions, ConsulRelease
from support.cluster import REGISTRAR_RULES, rule, running_cluster
from support.daemon import Daemon
from support.doors import TcpProxy
from support.lab import Lab, SandboxLab, each_release, running_lab
from support.processes import LOOPBACK
from support.waiting import PATIENCE

CATALOG = {"CONSUL_BACKEND": "catalog"}
NODE = "k8s-lab"
REFUSED = "Consul refuses a service"
LEASES = rule("get create update", "leases", group="coordination.k8s.io")
PODS = tuple(f"web-{number}" for number in range(6))
IDS = {f"pod--shop--{name}" for name in PODS}


def held(lab: SandboxLab, node: str = NODE) -> Mapping[str, Service]:
    """Return the services at a node of the catalog."""
    return {service.id: service for service in lab.consul.catalog.services_of(node)}


def names(lab: SandboxLab) -> set[str]:
    """Return the names of the services in the catalog."""
    return {service.name for service in held(lab).values()}


async def populate(lab: SandboxLab) -> None:
    """Add the Pods."""
    for number, name in enumerate(PODS):
        await lab.cluster.add_pod(name, ips=[f"198.51.100.{number + 10}"])


async def synced(lab: SandboxLab, daemon: Daemon) -> None:
    """Wait until the catalog has just the Pods' services."""
    await daemon.until(lambda: set(held(lab)) == IDS)
    await daemon.ready()


async def renamed(lab: SandboxLab, daemon: Daemon, *expected: str) -> None:
    """Wait until no service has another name; fail as soon as Consul refuses one."""

    def is_over() -> bool:
        return bool(held(lab)) and (names(lab) <= set(expected) or bool(daemon.said(REFUSED)))

    await daemon.until(is_over)
    assert names(lab) <= set(expected)


@each_release()
async def test_life_of_services_in_the_catalog(release: ConsulRelease) -> None:
    """First sync, change, removal, repair by a resync, and a restart that writes nothing."""
    async with running_lab(ConsulOptions(release)) as lab:
        await populate(lab)
        async with await lab.registrar(**CATALOG) as daemon:
            await synced(lab, daemon)
            await lab.cluster.set_pod_status("web-0", phase="Running", ips=["203.0.113.1"])
            await daemon.until(lambda: held(lab)["pod--shop--web-0"].address == "203.0.113.1")
            await lab.cluster.delete_pod("web-1")
            await daemon.until(lambda: set(held(lab)) == IDS - {"pod--shop--web-1"})
            with lab.consul.catalog.apply():
                lab.consul.catalog.drop_service(NODE, "pod--shop--web-2")
            await daemon.until(lambda: "pod--shop--web-2" in held(lab))
        lab.consul.writes.clear()
        async with await lab.registrar(**CATALOG) as daemon:
            await daemon.ready()
            await daemon.passes(2)
            assert lab.consul.writes == []
            await lab.cluster.delete_pod("web-3")
            await daemon.until(lambda: "pod--shop--web-3" not in held(lab))


@each_release()
async def test_services_are_renamed_with_a_new_template(release: ConsulRelease) -> None:
    """Each service has the new name, none is missing and none is there twice."""
    async with running_lab(ConsulOptions(release)) as lab:
        await populate(lab)
        async with await lab.registrar(**CATALOG) as daemon:
            await synced(lab, daemon)
        async with await lab.registrar(**CATALOG, POD_SERVICE_NAME="{cluster}-pods") as daemon:
            await renamed(lab, daemon, "lab-pods")
            assert set(held(lab)) == IDS


@each_release()
async def test_services_are_renamed_with_a_new_set_of_shards(release: ConsulRelease) -> None:
    """A shard in the name moves the service when its shard is no longer offered."""
    template = {"POD_SERVICE_NAME": "{cluster}-{shard_path}"}
    async with running_lab(ConsulOptions(release)) as lab:
        await populate(lab)
        async with await lab.registrar(**CATALOG, **template, SHARD_PATHS="a,b") as daemon:
            await synced(lab, daemon)
        async with await lab.registrar(**CATALOG, **template, SHARD_PATHS="c,d") as daemon:
            await renamed(lab, daemon, "lab-c", "lab-d")
            assert set(held(lab)) == IDS


@each_release()
async def test_service_is_renamed_with_its_pods_node(release: ConsulRelease) -> None:
    """A Pod of a StatefulSet that comes back on another Node has another name under a `{node}` template."""
    async with running_lab(ConsulOptions(release)) as lab:
        await lab.cluster.add_pod("db-0", node="node-a")
        settings = {**CATALOG, "POD_SERVICE_NAME": "{cluster}-{node}"}
        async with await lab.registrar(**settings) as daemon:
            await daemon.until(lambda: names(lab) == {"lab-node-a"})
            await lab.cluster.delete_pod("db-0")
            await lab.cluster.add_pod("db-0", node="node-b")
            await renamed(lab, daemon, "lab-node-b")


@each_release()
async def test_two_replicas_take_turns(release: ConsulRelease) -> None:
    """The standby goes on where the leader ended, without writing anything again."""
    election = {
        **CATALOG,
        "LEADER_ELECTION": "true",
        "LEASE_NAMESPACE": "default",
        "LEASE_DURATION": "30",
        "LEASE_RENEW_DEADLINE": "20",
        "LEASE_RETRY_PERIOD": "0.3",
    }
    async with running_lab(ConsulOptions(release)) as lab:
        await populate(lab)
        lab.token_file.write_text(await lab.cluster.token([*REGISTRAR_RULES, LEASES]))
        async with await lab.registrar(**election) as first, await lab.registrar(**election) as second:
            await first.until(lambda: set(held(lab)) == IDS)
            leader, standby = (first, second) if first.said("became leader") else (second, first)
            written = len(lab.consul.writes)
            await leader.terminate()
            await standby.until_said("became leader")
            await lab.cluster.delete_pod("web-0")
            await standby.until(lambda: set(held(lab)) == IDS - {"pod--shop--web-0"})
            assert len(lab.consul.writes) == written + 1


# Set-ups of today: agents without rights, and servers behind one address


@pytest.mark.long
async def test_service_left_in_the_catalog_by_the_agent_is_removed_there() -> None:
    """The agent answers 200 to the deregistration and has no right to remove the record from the catalog."""
    async with running_lab(ConsulOptions(NEWEST, is_server=False)) as lab:
        lab.consul.agent.has_node_write = False
        await populate(lab)
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(*IDS))
            await lab.cluster.delete_pod("web-0")
            await daemon.until(lambda: not lab.has(*IDS))
            left = {one.id for one in lab.consul.catalog.services_of("agent-1")} - set(lab.services)
            assert left == {"pod--shop--web-0"}
            assert await daemon.metric("ghost_services") == 0
            await daemon.until(lambda: set(held(lab, "agent-1")) == set(lab.services), within=3 * PATIENCE)
            line = await daemon.until_said("the agent left services in the catalog")
            assert line["services"] == "pod--shop--web-0"
            assert set(lab.services) == IDS - {"pod--shop--web-0"}


class ServersLab(Lab):
    """A cluster beside three Consul servers behind one address, as consul-k8s sets them up without agents."""

    servers: tuple[Consul, ...]

    @property
    def held(self) -> list[set[str]]:
        """The services of each server's own agent."""
        return [set(server.agent.services) for server in self.servers]


@contextlib.asynccontextmanager
async def running_servers() -> AsyncIterator[ServersLab]:
    """Run an empty cluster, and three servers whose connections are shared out in turn."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        async with (
            running_cluster() as cluster,
            Consul(ConsulOptions(NEWEST, node_name="server-0")) as first,
            first.peer("server-1") as second,
            first.peer("server-2") as third,
            TcpProxy(LOOPBACK, cluster.endpoint.port) as api_door,
            TcpProxy(LOOPBACK, *(_port(one) for one in (first, second, third))) as service,
        ):
            lab = ServersLab(cluster, api_door, service.address, Path(folder))
            lab.servers = (first, second, third)
            yield lab


def _port(consul: Consul) -> int:
    return int(consul.address.rpartition(":")[2])


async def test_servers_behind_one_address_have_one_set_in_the_catalog() -> None:
    """The catalog backend writes each service once, whichever server answers, and removes it again."""
    async with running_servers() as lab, await lab.registrar(**CATALOG) as daemon:
        for number, name in enumerate(PODS):
            await lab.cluster.add_pod(name, ips=[f"198.51.100.{number + 10}"])
        catalog = lab.servers[0].catalog
        await daemon.until(lambda: {one.id for one in catalog.services_of(NODE)} == IDS)
        assert lab.held == [set(), set(), set()]
        await lab.cluster.delete_pod("web-0")
        await daemon.until(lambda: len(catalog.services_of(NODE)) == len(IDS) - 1)


UNFIT = "CONSUL_ADDRESS does not suit the agent backend"


async def test_agent_backend_says_that_servers_answer_it() -> None:
    """Services spread over the servers' own agents, where nothing finds them again; that is reported at once."""
    async with running_servers() as lab, await lab.registrar() as daemon:
        for number, name in enumerate(PODS):
            await lab.cluster.add_pod(name, ips=[f"198.51.100.{number + 10}"])
        await daemon.until(lambda: set().union(*lab.held) == IDS)
        every = "server-0, server-1, server-2"
        several = await daemon.until_said(UNFIT, f"agents of several nodes answer: {every}")
        server = await daemon.until_said(UNFIT, f"belong to its node {every}")
        for line in (several, server):
            assert (line["level"], "CONSUL_BACKEND=catalog" in line["problem"]) == ("warning", True)
            assert await daemon.metric(f'agent_problem{{problem="{line["about"]}"}}') == 1
        _, page = await daemon.admin("/api/v1/status")
        consul = json.loads(page)["consul"]
        assert (consul["is_up"], several["problem"] in consul["problem"]) == (True, True)
        logged = len(daemon.said(UNFIT))
        await daemon.passes(3)
        assert len(daemon.said(UNFIT)) == logged, "nothing new is not logged again"


async def test_agent_whose_node_is_renamed_is_another_one_until_it_is_steady() -> None:
    """It is reported and holds everything soon; nothing at the former node is removed on the new one's word."""
    async with running_lab(ConsulOptions(NEWEST, is_server=False)) as lab:
        renamed = lab.consul.peer("agent-renamed", is_server=False)
        await populate(lab)
        async with (
            renamed,
            TcpProxy(LOOPBACK, _port(lab.consul)) as door,
            await lab.registrar(CONSUL_ADDRESS=door.address) as daemon,
        ):
            await daemon.until(lambda: lab.has(*IDS))
            door.lead_to(_port(renamed))
            door.cut()
            await daemon.until(lambda: set(renamed.agent.services) == IDS)
            line = await daemon.until_said(UNFIT, "agent-1, agent-renamed")
            assert line["about"] == "several_nodes"
            await daemon.measures('agent_problem{problem="several_nodes"}', 0)
            assert set(held(lab, "agent-1")) == IDS


async def test_agent_backend_at_a_single_server_works_and_says_so() -> None:
    """A server that is the local agent as well keeps one set of services, and removes them again."""
    async with running_lab(ConsulOptions(NEWEST)) as lab:
        await populate(lab)
        async with await lab.registrar() as daemon:
            await daemon.until(lambda: lab.has(*IDS))
            await daemon.until_said(UNFIT)
            (line,) = daemon.said(UNFIT)
            assert (line["about"], "agent-1" in line["problem"]) == ("server", True)
            await lab.cluster.delete_pod("web-0")
            await daemon.until(lambda: lab.has(*IDS - {"pod--shop--web-0"}))
