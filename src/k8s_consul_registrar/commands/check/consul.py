"""Checks of Consul: that it answers, has a leader, and lets our token do what the registrar does."""

from collections.abc import Awaitable, Sequence
from typing import NamedTuple

from k8s_consul_registrar.commands.check.cluster import ClusterView
from k8s_consul_registrar.commands.check.report import Finding, Result, fail, ok, skipped, warn
from k8s_consul_registrar.commands.check.services import holdings, judge_catalog, judge_holdings, some
from k8s_consul_registrar.consul.acl import (
    Right,
    read_agents,
    read_leader,
    read_self,
    read_service_names,
    rights,
)
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.ghosts import AgentGhosts
from k8s_consul_registrar.errors import (
    AccessError,
    ConsulError,
    ConsulForbidden,
    ConsulUnreachable,
    SettingsError,
)
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.registrar.ownership import Claim, Identity
from k8s_consul_registrar.settings.consul import CATALOG, NONE
from k8s_consul_registrar.settings.registrar import RegistrarSettings
from k8s_consul_registrar.targets.service_names import Template
from k8s_consul_registrar.wiring.backend import decided
from k8s_consul_registrar.wiring.registrar import Wiring

HOW_TO_GET_ONE = (
    "CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE must hold the secret ID of a token of this Consul "
    "(consul acl token create -policy-name k8s-consul-registrar)"
)
HOW_TO_LOG_IN = (
    "CONSUL_LOGIN_AUTH_METHOD must name an auth method of this Consul, and one of its binding rules must match the "
    "token in CONSUL_LOGIN_BEARER_TOKEN_FILE (deploy/overlays/consul-login names the commands)"
)
# A name that no service has: a right on it is one on the services of others.
OTHERS_NAME = "k8s-consul-registrar-check"
IS_SERVER = warn(
    "consul agent",
    "this is a server: the services will belong to its node",
    "let CONSUL_ADDRESS be an agent beside the registrar, as in deploy/deployment.yaml, or set "
    "CONSUL_BACKEND=catalog; for a single server that is meant, set CONSUL_AGENT_IS_SERVER=true",
)
UNREAD_AGENT = warn(
    "consul agent",
    "the token may not read the agent, so a difference between the agent and the catalog is not seen",
    'add to the token\'s policy: agent_prefix "" { policy = "read" } and node_prefix "" { policy = "read" }',
)


class Naming(NamedTuple):
    """The names of one kind of services: an example, and the prefix of them all."""

    kind: Kind
    example: str
    prefix: str


class NeededRight(NamedTuple):
    """A right, the scope that a policy grants it on, and what is lost without it."""

    right: Right
    scope: str
    lost: str

    @property
    def rule(self) -> str:
        """The line of a policy that grants it."""
        return f'{self.scope} {{ policy = "{self.right.access}" }}'

    @property
    def is_vital(self) -> bool:
        """True if the registrar does nothing without it."""
        return self.right.access == "write"


def naming_of(kind: Kind, template: Template, cluster: str, shard: str) -> Naming:
    """Make an example of a name out of its template."""
    values = {"cluster": cluster, "kind": kind.value, "node_ip": "192.0.2.1", "shard_path": shard or "shard"}
    example, prefix, is_fixed = "", "", True
    for part in template.parts:
        is_fixed = is_fixed and (isinstance(part, str) or part.name == "cluster")
        text = part if isinstance(part, str) else values.get(part.name, "check")
        example += text
        prefix += text if is_fixed else ""
    return Naming(kind, example, prefix)


def needs_of_services(namings: Sequence[Naming]) -> tuple[NeededRight, ...]:
    """Return the rights to write the registrar's services and to read all others."""
    ours = (
        NeededRight(
            Right("service", one.example, "write"),
            f'service_prefix "{one.prefix}"',
            f"no {one.kind.value.capitalize()} can be registered",
        )
        for one in namings
    )
    lost = "other services are invisible, so a conflict is seen only as a refused write"
    return (*ours, NeededRight(Right("service", OTHERS_NAME, "read"), 'service_prefix ""', lost))


def need_of_catalog(node: str) -> NeededRight:
    """Return the right to the node that the catalog backend writes."""
    return NeededRight(
        Right("node", node, "write"), f'node "{node}"', "the node for the services cannot be created"
    )


def needs_of_agent(node: str) -> tuple[NeededRight, ...]:
    """Return the rights to read an agent's node, and to find services at nodes of agents that are gone.

    The right to write the services is enough to remove them there.
    """
    lost = "a difference between the agent and the catalog is not seen"
    of_gone = "this registrar's services at the node of an agent that is gone are not found"
    return tuple(
        NeededRight(Right("node", one, "read"), 'node_prefix ""', text)
        for one, text in ((node, lost), (OTHERS_NAME, of_gone))
    )


async def check_backend(wiring: Wiring, cluster: Awaitable[ClusterView]) -> list[Finding]:
    """Check Consul, the token and the services there, as far as the backend uses them."""
    settings = wiring.settings
    if settings.backend.backend == NONE:
        return [ok("consul", "not used (CONSUL_BACKEND=none)")]
    try:
        async with wiring.consul() as client:
            return await _check_with(client, wiring, cluster)
    except AccessError as error:
        return [fail("consul", str(error))]


async def _check_with(client: ConsulClient, wiring: Wiring, cluster: Awaitable[ClusterView]) -> list[Finding]:
    try:
        wiring = await decided(wiring, client)
    except SettingsError as error:
        return [fail("consul backend", str(error))]
    except ConsulError as error:
        return [fail("consul", str(error), _unreachable_hint(error))]
    settings = wiring.settings
    chosen = settings.backend
    of_choice = (
        [ok("consul backend", f"auto: {chosen.backend}, since {chosen.reason}")] if chosen.reason else []
    )
    found, node = await check_consul(
        client,
        settings.consul.address,
        is_catalog=chosen.backend == CATALOG,
        accepts_server=chosen.accepts_server,
    )
    found = [*of_choice, *found]
    if any(finding.outcome is Result.FAIL for finding in found):
        return [*found, skipped("consul token", "not checked, since the check of Consul failed")]
    of_consul = settings.consul
    has_token = bool(of_consul.token or of_consul.token_file or of_consul.login)
    remedy = HOW_TO_LOG_IN if of_consul.login else HOW_TO_GET_ONE
    of_token = await check_token(client, _needs(settings, node), has_token=has_token, remedy=remedy)
    sees_all = all(one.outcome is Result.OK for one in of_token)
    of_services = await _check_services(client, wiring, (await cluster).uid, sees_all=sees_all)
    return [*found, *of_token, *of_services]


def _namings(settings: RegistrarSettings) -> list[Naming]:
    naming = settings.naming
    templates = {
        Kind.POD: naming.pod_name,
        Kind.NODE: naming.node_name,
        Kind.ENDPOINT: naming.endpoint_name,
    }
    shard = next(iter(naming.shard_paths), "")
    kinds = sorted(settings.selection.kinds, reverse=True)
    return [naming_of(kind, templates[kind], settings.cluster_name, shard) for kind in kinds]


def _needs(settings: RegistrarSettings, agent_node: str) -> list[NeededRight]:
    needs = [*needs_of_services(_namings(settings))]
    if settings.backend.backend == CATALOG:
        return [*needs, need_of_catalog(settings.backend.node_name)]
    return [*needs, *needs_of_agent(agent_node)] if agent_node else needs


async def _check_services(client: ConsulClient, wiring: Wiring, uid: str, *, sees_all: bool) -> list[Finding]:
    who, registry = wiring.identity, wiring.registry(client)
    try:
        services = [service async for service in registry.services()]
        names = await read_service_names(client)
    except ConsulError as error:
        return [skipped("services", str(error))]
    found = holdings(services, who, uid)
    prefixes = tuple(naming.prefix for naming in _namings(wiring.settings))
    elsewhere = judge_catalog(names, [service.name for service in services], prefixes)
    left = await check_ghosts(AgentGhosts(registry), who, uid) if isinstance(registry, AgentRegistry) else []
    return [*judge_holdings(found, who, sees_all=sees_all), *elsewhere, *left]


async def check_ghosts(agent: AgentGhosts, who: Identity, uid: str) -> list[Finding]:
    """Check what the agent left in the catalog, and that it may deregister services there at all."""
    name = "agent's removals"
    try:
        ghosts = await agent.find()
    except ConsulError as error:
        return [skipped(name, str(error))]
    remedy = (
        f'give the agent a token (acl.tokens.agent) with node "{ghosts.node}" {{ policy = "write" }} and '
        'service_prefix "" { policy = "read" }'
    )
    ours = [one.id for one in ghosts.services if who.claim(one, uid) is Claim.OURS]
    if ours:
        detail = (
            f"{len(ours)} services are in the catalog at {ghosts.node} and not at the agent: {some(ours)}"
        )
        return [warn(name, detail, f"{remedy}; the registrar removes what is not wanted within two minutes")]
    if not ghosts.may_write:
        detail = f"the agent has never written its node {ghosts.node}: what it deregisters would stay in the catalog"
        return [warn(name, detail, remedy)]
    return [ok(name, f"the catalog shows nothing at {ghosts.node} that the agent does not hold")]


async def check_consul(
    client: ConsulClient, address: str, *, is_catalog: bool, accepts_server: bool = False
) -> tuple[list[Finding], str]:
    """Check that Consul answers and has a leader; returns findings and the name of the agent's node, if known.

    `is_catalog` is True if services are written to the catalog, so that the agent does not matter, and
    `accepts_server` if the agent may be a server.
    """
    name = "consul"
    try:
        leader = await read_leader(client)
        if not leader:
            hint = "the servers lost their quorum, or this agent has not joined them (-retry-join, port 8301)"
            return [fail(name, f"{address} answers and knows no leader", hint)], ""
        agent = await read_self(client)
        agents = await read_agents(client) if agent and not is_catalog else ()
    except ConsulForbidden:
        return [ok(name, f"{address} answers")], ""  # the token's own check says more
    except ConsulError as error:
        return [fail(name, str(error), _unreachable_hint(error))], ""
    if agent is None:
        found = [ok(name, f"{address} answers, its leader is {leader}")]
        return (found if is_catalog else [*found, UNREAD_AGENT]), ""
    role = "a server" if agent.is_server else "a client agent"
    found = [
        ok(name, f"{address} answers, {agent.version}, {role}, node {agent.node}; its leader is {leader}")
    ]
    nodes = sorted({one.node for one in agents})
    if len(nodes) > 1:
        said = f"agents of several nodes answer ({', '.join(nodes)}): services would be there twice and stay"
        found.append(fail("consul agent", said, "set CONSUL_BACKEND=catalog, or CONSUL_ADDRESS to one agent"))
    elif agent.is_server and not is_catalog and not accepts_server:
        found.append(IS_SERVER)
    return found, agent.node


def _unreachable_hint(error: ConsulError) -> str:
    if isinstance(error, ConsulUnreachable) and "certificate" not in str(error):
        return "is CONSUL_ADDRESS right, does the agent run there, and is it https (CONSUL_HTTP_SSL=true)?"
    return ""


async def check_token(
    client: ConsulClient, needs: Sequence[NeededRight], *, has_token: bool, remedy: str = HOW_TO_GET_ONE
) -> list[Finding]:
    """Ask Consul, without writing anything, about each right the registrar uses."""
    name = "consul token"
    try:
        granted = await rights(client, [need.right for need in needs])
    except ConsulForbidden as error:
        return [fail(name, str(error), remedy)]
    except ConsulError as error:
        return [skipped(name, f"this Consul cannot be asked about rights: {error}")]
    if granted is None:
        return [ok(name, f"Consul runs without ACLs{': the token has no effect' if has_token else ''}")]
    missing = [need for need, is_granted in zip(needs, granted, strict=True) if not is_granted]
    if not missing:
        return [ok(name, "may write the registrar's services and read all others")]
    # One line of a policy may grant several rights: it is shown once.
    first = {need.rule: need for need in reversed(missing)}
    told = [need for need in missing if need.is_vital or first[need.rule] is need]
    return [_missing(need, has_token=has_token) for need in told]


def _missing(need: NeededRight, *, has_token: bool) -> Finding:
    finding = fail if need.is_vital else warn
    detail = f"{need.right.access} of {need.right.resource} {need.right.segment!r} is denied: {need.lost}"
    hint = f"add to the token's policy: {need.rule}" if has_token else f"no token is set; {HOW_TO_GET_ONE}"
    return finding("consul token", detail, hint)
