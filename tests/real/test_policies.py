"""The policies of docs/consul.md, on a real Consul that denies by default, with the whole daemon."""

import re
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest

from support.cluster import REGISTRAR_RULES
from support.daemon import Daemon
from support.files import ROOT
from support.lab import Lab, running_lab_with
from support.real_servers import REAL, RealConsul, Token, make_token, real_consul, revoke
from support.waiting import PATIENCE, until

pytestmark = REAL

AGENT = "k8s-consul-registrar-your-cluster-name"  # the agent's node in the page's policy
CATALOG_NODE = "k8s-your-cluster-name"
WEB, NODE = "pod--shop--web-1", "node--192.0.2.10"
# The time within which the issue of a removal must be settled, and what a busy machine may add.
NO_GHOST_AFTER = 90.0
# A token that Consul does not know: an agent with it may not change its node in the catalog.
POWERLESS = "7c1f5a1e-3c0d-4e0b-9a54-6f0d4f3b2a10"


def policies(section: str) -> list[str]:
    """Return the policies in a section of the page."""
    text = (ROOT / "docs" / "consul.md").read_text()
    inside = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```hcl\n(.*?)^```$", inside, re.MULTILINE | re.DOTALL)


def agent_with(token: str) -> str:
    """Return the flag of an agent's own token."""
    return f'-hcl=acl {{ tokens {{ agent = "{token}" default = "{token}" }} }}'


class World(NamedTuple):
    """A cluster, the Consul at CONSUL_ADDRESS, and the registrar's token by the page's policy."""

    lab: Lab
    consul: RealConsul
    server: RealConsul
    token: Token
    node: str

    async def names(self) -> dict[str, str]:
        """Return the names of the registrar's services in the catalog, by ID."""
        _, found = await self.server.request("GET", f"/v1/catalog/node/{self.node}?consistent")
        services = found["Services"] if found else {}
        return {key: each["Service"] for key, each in services.items() if key.startswith(("pod--", "node--"))}

    async def shows(self, daemon: Daemon, **names: str) -> None:
        """Wait until the catalog shows services of these names; `pod` and `node` stand for their IDs."""
        ids = {"pod": WEB, "node": NODE}
        wanted = {ids[kind]: name for kind, name in names.items()}

        async def is_so() -> bool:
            return await self.names() == wanted

        await daemon.until(is_so, f"the catalog shows {wanted}")

    async def passes_check(self, **settings: str) -> None:
        """Fail unless `check registrar` finds all rights in place."""
        self.lab.token_file.write_text(await self.lab.cluster.token(REGISTRAR_RULES))
        environment = {"CONSUL_ADDRESS": self.consul.address, "CLUSTER_NAME": "lab", **settings}
        async with self.lab.daemon("check", "registrar", **environment) as command:
            await command.ended()
        assert "may write the registrar's services and read all others" in command.output, command.output


@asynccontextmanager
async def with_agent(own_rules: str, registrar_rules: str) -> AsyncIterator[World]:
    """Run a server and a client agent whose own token has these rules, or is unknown without any."""
    async with real_consul(acl=True, node="server") as server:
        own = (await make_token(server, "agent", own_rules)).secret if own_rules else POWERLESS
        token = await make_token(server, "registrar", registrar_rules)
        async with (
            real_consul(agent_with(own), join=server.serf, acl=True, node=AGENT) as agent,
            running_lab_with(agent.address) as lab,
        ):
            yield World(lab, agent, server, token, AGENT)


async def lead_through_life(world: World, **backend: str) -> None:
    """Have services registered, renamed and removed, without a refused write."""
    settings = {"CONSUL_HTTP_TOKEN": world.token.secret, "CONSUL_NODE_NAME": CATALOG_NODE, **backend}
    await world.lab.cluster.add_pod()
    await world.lab.cluster.add_node("node-a", ("InternalIP", "192.0.2.10"))
    await world.passes_check(**settings)
    async with await world.lab.registrar(**settings) as daemon:
        await world.shows(daemon, pod=WEB, node=NODE)
        assert await daemon.terminate() == 0
        assert not daemon.said("Consul refuses a service")
    async with await world.lab.registrar(POD_SERVICE_NAME="pod--{namespace}", **settings) as daemon:
        await world.shows(daemon, pod="pod--shop", node=NODE)
        await world.lab.cluster.delete_pod()
        await world.shows(daemon, node=NODE)
        await world.lab.cluster.delete_node("node-a")
        await world.shows(daemon)
        assert await daemon.terminate() == 0
        assert not daemon.said("Consul refuses a service")
        assert world.token.secret not in daemon.output


async def test_policies_with_an_agent_carry_services_through_their_life() -> None:
    """The registrar's and the agent's own; the agent's token removes what the registrar deregisters."""
    registrar, agent = policies("An agent beside the registrar")
    async with with_agent(agent, registrar) as world:
        await lead_through_life(world)


async def test_policy_of_agentless_servers_carries_services_through_their_life() -> None:
    """The catalog's node is made and written with it."""
    (rules,) = policies("Agentless servers")
    async with real_consul(acl=True, node="server") as server, running_lab_with(server.address) as lab:
        token = await make_token(server, "registrar", rules)
        world = World(lab, server, server, token, CATALOG_NODE)
        await lead_through_life(world, CONSUL_BACKEND="catalog")


@pytest.mark.long
@pytest.mark.parametrize("fault", ["rotated", "revoked", "wiped"])
async def test_no_ghost_is_left_90_seconds_after_the_removal(fault: str) -> None:
    """The agent's token has no rights: it answers 200 and leaves the record, which the registrar then removes.

    The registrar's token is rotated before the removal, or revoked and replaced after it, or the agent loses its
    data. A service that is wanted stays all the while.
    """
    registrar, _ = policies("An agent beside the registrar")
    async with with_agent("", registrar) as world:
        next_token = await make_token(world.server, "next", registrar)
        token_file = world.lab.folder / "consul-token"
        token_file.write_text(world.token.secret)
        for name in ("web-1", "web-2"):
            await world.lab.cluster.add_pod(name)
        kept = {"pod--shop--web-2"}
        async with await world.lab.registrar(CONSUL_HTTP_TOKEN_FILE=str(token_file)) as daemon:

            async def both_are_there() -> bool:
                return set(await world.names()) == {WEB, *kept}

            await daemon.until(both_are_there)
            if fault == "rotated":
                token_file.write_text(next_token.secret)
            if fault == "wiped":
                await world.consul.program.stop(signal.SIGKILL)
                shutil.rmtree(world.consul.program.log.parent / "data" / "services")
            else:
                await revoke(world.server, world.token)
            await world.lab.cluster.delete_pod()
            if fault == "revoked":
                await daemon.until_said("Consul cannot be used; trying again")
                token_file.write_text(next_token.secret)
            if fault == "wiped":
                await world.consul.start()
            removed_at = time.monotonic()

            async def no_ghost_is_left() -> bool:
                shown = set(await world.names())
                assert kept <= shown
                return shown == kept

            await until(
                no_ghost_is_left, within=NO_GHOST_AFTER + PATIENCE, every=0.5, context=lambda: daemon.output
            )
            took = time.monotonic() - removed_at
            assert daemon.said("removed services that the agent left in the catalog"), f"after {took:.0f} s"
            assert await daemon.terminate() == 0


def test_policy_on_the_page_about_deployment_is_the_one_that_was_tried() -> None:
    """It shows the registrar's policy beside an agent once more."""
    registrar, _ = policies("An agent beside the registrar")
    assert registrar in (ROOT / "docs" / "deployment.md").read_text()
