"""The backend that CONSUL_BACKEND=auto chooses, once in a process."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from k8s_consul_registrar.backoff import delays
from k8s_consul_registrar.consul.acl import AgentSelf, read_agents
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import ConsulError, ConsulFiltered, ConsulForbidden, SettingsError
from k8s_consul_registrar.registrar.ownership import Claim
from k8s_consul_registrar.settings.consul import AGENT, AUTO, CATALOG
from k8s_consul_registrar.telemetry import get_logger
from k8s_consul_registrar.wiring.registrar import Wiring

log = get_logger("backend")


class Answers(NamedTuple):
    """Everything that decides the backend.

    `agents` are those that answered over new connections, `services` is the number of this registrar's services
    at its `node` in the catalog.
    """

    agents: tuple[AgentSelf, ...] = ()
    node: str = ""
    services: int = 0
    is_elected: bool = False


class Choice(NamedTuple):
    """A backend, and why it is the right one."""

    backend: str
    reason: str


def choose(answers: Answers) -> Choice:
    """Return the backend that fits: an agent's only if it can be but one agent, and nothing is in the catalog."""
    if answers.is_elected:
        return Choice(CATALOG, "LEADER_ELECTION is true")
    nodes = ", ".join(sorted({one.node for one in answers.agents}))
    if servers := {one.node for one in answers.agents if one.is_server}:
        return Choice(CATALOG, f"a Consul server answers, node {', '.join(sorted(servers))}")
    if len({one.node for one in answers.agents}) > 1:
        return Choice(CATALOG, f"agents of several nodes answer: {nodes}")
    if answers.services:
        return Choice(CATALOG, f"node {answers.node} in the catalog has {answers.services} services")
    return Choice(
        AGENT, f"one client agent answers, node {nodes}, and nothing is at {answers.node} in the catalog"
    )


async def decided(wiring: Wiring, client: ConsulClient) -> Wiring:
    """Return the wiring with the backend that `auto` chooses; another backend was chosen already.

    Raises a `SettingsError` where Consul does not show what the choice needs, or other settings do not fit the
    choice, and any other `ConsulError` where there is no choice yet.
    """
    if wiring.settings.backend.backend != AUTO:
        return wiring
    try:
        choice = choose(await _answers(wiring, client))
    except (ConsulForbidden, ConsulFiltered) as error:
        remedy = "set agent or catalog, or grant agent read, and node and service read at the catalog's node"
        raise SettingsError([f"CONSUL_BACKEND: auto cannot choose: {error}; {remedy}"]) from error
    log.info("CONSUL_BACKEND=auto has chosen", backend=choice.backend, reason=choice.reason)
    return Wiring(wiring.settings.decided(*choice), wiring.timing)


async def decided_in_time(wiring: Wiring, client: ConsulClient, tell: Callable[[str], None]) -> Wiring:
    """Return what `decided` does, as soon as Consul answers; `tell` receives the reason each time it has to wait."""
    for delay in delays(wiring.timing.retry_first, wiring.timing.retry_cap):
        try:
            return await decided(wiring, client)
        except ConsulError as error:
            tell(str(error))
        await asyncio.sleep(delay)
    raise AssertionError("unreachable: delays have no end")


async def _answers(wiring: Wiring, client: ConsulClient) -> Answers:
    """Ask for no more than the choice needs; raises a `ConsulError`."""
    settings = wiring.settings
    node = settings.backend.node_name
    if settings.election is not None:
        return Answers(is_elected=True)
    answers = Answers(await read_agents(client), node)
    if choose(answers).backend == CATALOG:
        return answers
    async with client.single() as single:
        registry = CatalogRegistry(single, node, meta_keys=settings.naming.meta_keys)
        ours = [one.id async for one in registry.services() if wiring.identity.claim(one, "") is Claim.OURS]
    return answers._replace(services=len(ours))
