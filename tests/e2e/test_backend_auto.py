"""CONSUL_BACKEND=auto: what it chooses, how it waits for Consul, and how it ends where it cannot choose."""

import json

import aiohttp
import pytest

from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions
from support.cluster import REGISTRAR_RULES
from support.daemon import Daemon
from support.doors import TcpProxy
from support.lab import SandboxLab, running_lab
from support.processes import LOOPBACK, reserve_ports

AUTO = {"CONSUL_BACKEND": "auto"}
CLIENT = ConsulOptions(NEWEST, is_server=False)
SECRET = "5d7c6d0e-8f5b-4a52-9d3c-0b7a52a1c9e4"
WEB = "pod--shop--web-1"
CHOSEN = "CONSUL_BACKEND=auto has chosen"
WAITS = "CONSUL_BACKEND=auto waits for Consul; nothing is written"


def at_node(lab: SandboxLab, node: str = "k8s-lab") -> set[str]:
    """Return the IDs of the services at a node of the catalog."""
    return {service.id for service in lab.consul.catalog.services_of(node)}


async def shown(daemon: Daemon) -> tuple[str, str]:
    """Return the backend and the reason for it that the status page shows."""
    _, page = await daemon.admin("/api/v1/status")
    consul = json.loads(page)["consul"]
    return consul["backend"], consul["backend_reason"]


async def command(lab: SandboxLab, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and its output."""
    lab.token_file.write_text(await lab.cluster.token(REGISTRAR_RULES))
    settings = {"CLUSTER_NAME": "lab", "CONSUL_ADDRESS": lab.consul_address, **AUTO, **environment}
    async with lab.daemon(*arguments, **settings) as running:
        code = await running.ended()
    return code, running.output


async def test_single_client_agent_keeps_the_services() -> None:
    """The choice and its reason are in the log and on the status page."""
    async with running_lab(CLIENT) as lab:
        await lab.cluster.add_pod()
        async with await lab.registrar(**AUTO) as daemon:
            await daemon.until(lambda: lab.has(WEB))
            (line,) = daemon.said(CHOSEN)
            assert line["backend"] == "agent"
            assert await shown(daemon) == ("agent", line["reason"])
            assert "one client agent answers, node agent-1" in line["reason"]
            assert not at_node(lab)


async def test_services_in_the_catalog_keep_the_backend() -> None:
    """Where the catalog holds this registrar's services, a client agent does not take them over."""
    async with running_lab(CLIENT) as lab:
        await lab.cluster.add_pod()
        async with await lab.registrar(CONSUL_BACKEND="catalog") as daemon:
            await daemon.until(lambda: at_node(lab) == {WEB})
            await daemon.ready()
        assert (await command(lab, "plan"))[0] == 0, "nothing would be written"
        code, output = await command(lab, "check", "registrar")
        assert (code, "auto: catalog, since node k8s-lab in the catalog has 1 services" in output) == (
            0,
            True,
        )
        code, output = await command(lab, "purge", "--yes")
        assert (code, "(catalog)" in output) == (0, True)
        assert not at_node(lab)


async def test_election_is_always_in_the_catalog() -> None:
    """One agent answers and it does not matter: Consul is not even asked."""
    election = {"LEADER_ELECTION": "true", "LEASE_NAMESPACE": "default"}
    async with running_lab(CLIENT) as lab:
        lab.consul_door.refuse()
        async with await lab.registrar(**AUTO, **election) as daemon:
            line = await daemon.until_said(CHOSEN)
            assert (line["backend"], line["reason"]) == ("catalog", "LEADER_ELECTION is true")


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
async def test_choice_waits_for_consul(fault: str) -> None:
    """Meanwhile it is alive, not ready and says why, serves targets, and writes nothing."""
    async with running_lab(CLIENT) as lab:
        await lab.cluster.add_pod()
        if fault == "refuses":
            lab.consul_door.refuse()
        else:
            lab.consul_door.stall()
        admin, sd = map(str, reserve_ports(2))
        async with await lab.registrar(**AUTO, ADMIN_PORT=admin, HTTP_SD_PORT=sd) as daemon:
            await daemon.until_said(WAITS)
            assert (await daemon.admin("/healthz"))[0] == 200
            status, text = await daemon.admin("/readyz")
            assert (status, "not synced yet" in text) == (503, True)
            if fault == "refuses":
                await daemon.until_said("Consul cannot be used; trying again")
                assert "Consul at" in (await daemon.admin("/readyz"))[1]
            assert await daemon.metric("consul_up") == 0
            assert await shown(daemon) == ("auto", "")

            async def is_served() -> bool:
                url = f"http://{LOOPBACK}:{await daemon.port('http_sd_port')}/sd/targets"
                async with aiohttp.ClientSession() as session, session.get(url) as answer:
                    return '"198.51.100.10:9102"' in await answer.text()

            await daemon.until(is_served)
            await lab.consul_door.heal()
            await daemon.until(lambda: lab.has(WEB))
            await daemon.ready()
            await daemon.until(is_served)
            assert len(daemon.said(CHOSEN)) == 1


async def test_denied_answer_after_the_wait_ends_the_process() -> None:
    """Consul answers at last, and lets the token read nothing: exit 2, as at once."""
    options = ConsulOptions(NEWEST, is_server=False, token=SECRET, blind_tokens=frozenset({"blind"}))
    async with running_lab(options) as lab:
        lab.consul_door.refuse()
        async with await lab.registrar(**AUTO, CONSUL_HTTP_TOKEN="blind") as daemon:
            await daemon.until_said(WAITS)
            await lab.consul_door.heal()
            assert await daemon.ended() == 2
            assert "CONSUL_BACKEND: auto cannot choose" in daemon.output


async def test_stop_ends_the_wait() -> None:
    """SIGTERM is answered at once, as ever; nothing was written."""
    async with running_lab(CLIENT) as lab:
        lab.consul_door.stall()
        async with await lab.registrar(**AUTO) as daemon:
            await daemon.until_said(WAITS)
            assert await daemon.terminate() == 0
        assert lab.consul.writes == []


@pytest.mark.parametrize(
    ("token", "arguments"),
    [("4b7c6d0e-8f5b-4a52-9d3c-0b7a52a1c9e4", ("registrar",)), ("blind", ("plan",))],
)
async def test_denied_answers_end_the_start(token: str, arguments: tuple[str, ...]) -> None:
    """A token that is unknown, or sees nothing, is exit 2 and names the setting; `check` says the same."""
    options = ConsulOptions(NEWEST, is_server=False, token=SECRET, blind_tokens=frozenset({"blind"}))
    async with running_lab(options) as lab:
        code, output = await command(lab, *arguments, CONSUL_HTTP_TOKEN=token)
        assert (code, "CONSUL_BACKEND: auto cannot choose" in output) == (2, True), output
        code, output = await command(lab, "check", "registrar", CONSUL_HTTP_TOKEN=token)
        assert (code, "CONSUL_BACKEND: auto cannot choose" in output) == (1, True)
        assert lab.consul.writes == []


async def test_settings_that_do_not_fit_the_choice_end_the_start() -> None:
    """Readiness needs the catalog; the agent was chosen."""
    async with running_lab(CLIENT) as lab:
        code, output = await command(lab, "registrar", REGISTER_READINESS="true")
        assert (code, "REGISTER_READINESS: needs CONSUL_BACKEND=catalog" in output) == (2, True)


async def test_unreachable_consul_ends_a_command() -> None:
    """A command that works once does not wait: exit 1 says why."""
    async with running_lab(CLIENT) as lab:
        lab.consul_door.refuse()
        for arguments in (("sync",), ("purge", "--yes")):
            code, output = await command(lab, *arguments)
            assert (code, "Consul at" in output) == (1, True), output


async def test_contrary_evidence_is_reported_and_changes_nothing() -> None:
    """A second agent behind the address comes later: the services stay where they are."""
    async with running_lab(CLIENT) as lab, lab.consul.peer("agent-2", is_server=False) as other:
        ports = [int(one.address.rpartition(":")[2]) for one in (lab.consul, other)]
        async with TcpProxy(LOOPBACK, ports[0]) as service:
            await lab.cluster.add_pod()
            async with await lab.registrar(**AUTO, CONSUL_ADDRESS=service.address) as daemon:
                await daemon.until(lambda: lab.has(WEB))
                service.lead_to(*ports)
                await daemon.until_said("CONSUL_ADDRESS does not suit the agent backend", "agent-2")
                await daemon.measures('agent_problem{problem="several_nodes"}', 1)
                assert await shown(daemon) == ("agent", daemon.said(CHOSEN)[0]["reason"])
                await daemon.passes(2)
                assert len(daemon.said(CHOSEN)) == 1
                assert not at_node(lab)


async def test_deliberate_server_is_not_reported() -> None:
    """With CONSUL_AGENT_IS_SERVER a single server is an agent like any other, also for `check`."""
    async with running_lab(ConsulOptions(NEWEST)) as lab:
        await lab.cluster.add_pod()
        async with await lab.registrar(CONSUL_AGENT_IS_SERVER="true") as daemon:
            await daemon.until(lambda: lab.has(WEB))
            await daemon.passes(2)
            assert daemon.said("CONSUL_ADDRESS does not suit the agent backend") == []
            assert await daemon.metric('agent_problem{problem="server"}') == 0
        deliberate = {"CONSUL_BACKEND": "agent", "CONSUL_AGENT_IS_SERVER": "true"}
        _, output = await command(lab, "check", "registrar", **deliberate)
        assert "consul agent" not in output
        _, output = await command(lab, "check", "registrar", CONSUL_BACKEND="agent")
        assert "CONSUL_AGENT_IS_SERVER=true" in output
