"""Checks of Consul: that it answers, has a leader, and lets our token do what the registrar does."""

from collections.abc import Sequence
from typing import NamedTuple

from k8s_consul_registrar.commands.check.report import Finding, fail, ok, skipped, warn
from k8s_consul_registrar.consul.acl import Right, read_leader, read_self, rights
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import (
    ConsulError,
    ConsulForbidden,
    ConsulUnreachable,
)
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.targets.service_names import Template

HOW_TO_GET_ONE = (
    "CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE must hold the secret ID of a token of this Consul "
    "(consul acl token create -policy-name k8s-consul-registrar)"
)
# A name that no service has: a right on it is one on the services of others.
OTHERS_NAME = "k8s-consul-registrar-check"


class Naming(NamedTuple):
    """The names of one kind of services: an example, and the prefix of them all."""

    kind: Kind
    example: str
    prefix: str


class NeededRight(NamedTuple):
    """A right, what Consul's policies call it, and what is lost without it; vital ones fail the check."""

    right: Right
    rule: str
    lost: str
    is_vital: bool


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
    """Return the rights on services: to write our own, and to read those of others."""
    ours = (
        NeededRight(
            Right("service", one.example, "write"),
            f'service_prefix "{one.prefix}" {{ policy = "write" }}',
            f"no {one.kind.value.capitalize()} can be registered",
            is_vital=True,
        )
        for one in namings
    )
    others = NeededRight(
        Right("service", OTHERS_NAME, "read"),
        'service_prefix "" { policy = "read" }',
        "services of others are invisible, so a conflict is seen only as a refused write",
        is_vital=False,
    )
    return (*ours, others)


def need_of_catalog(node: str) -> NeededRight:
    """Return the right to the node that the catalog backend writes."""
    return NeededRight(
        Right("node", node, "write"),
        f'node "{node}" {{ policy = "write" }}',
        "the node of our services cannot be made",
        is_vital=True,
    )


def need_of_agent(node: str) -> NeededRight:
    """Return the right to read an agent's node in the catalog."""
    return NeededRight(
        Right("node", node, "read"),
        'node_prefix "" { policy = "read" }',
        "whether the catalog shows what the agent holds is not seen",
        is_vital=False,
    )


def need_of_lost_agents() -> NeededRight:
    """Return the right to find what is ours at nodes of other agents; to remove it, that on our services is enough."""
    return NeededRight(
        Right("node", OTHERS_NAME, "read"),
        'node_prefix "" { policy = "read" }',
        "services of ours at the node of an agent that is gone are not found",
        is_vital=False,
    )


async def check_consul(client: ConsulClient, address: str, *, is_catalog: bool) -> tuple[list[Finding], str]:
    """Check that Consul answers and has a leader; returns findings and the name of the agent's node, if known.

    `is_catalog` says that the catalog is written and no agent.
    """
    name = "consul"
    try:
        leader = await read_leader(client)
        if not leader:
            return [_leaderless(address)], ""
        agent = await read_self(client)
    except ConsulForbidden:
        return [ok(name, f"{address} answers")], ""  # the token's own check says more
    except ConsulError as error:
        return [fail(name, str(error), _unreachable_hint(error))], ""
    if agent is None:
        return [
            ok(name, f"{address} answers, its leader is {leader}"),
            *_unread_agent(is_catalog=is_catalog),
        ], ""
    role = "a server" if agent.is_server else "a client agent"
    found = [
        ok(name, f"{address} answers, {agent.version}, {role}, node {agent.node}; its leader is {leader}")
    ]
    if agent.is_server and not is_catalog:
        found.append(
            warn(
                "consul agent",
                "this is a server: the services will belong to its node",
                "let CONSUL_ADDRESS be an agent beside the registrar, as deploy/deployment.yaml has it, or set "
                "CONSUL_BACKEND=catalog",
            )
        )
    return found, agent.node


def _unread_agent(*, is_catalog: bool) -> list[Finding]:
    if is_catalog:
        return []
    return [
        warn(
            "consul agent",
            "our token may not read the agent: its node is unknown, so that whether the catalog shows what it holds "
            "is not seen",
            'add to the token\'s policy: agent_prefix "" { policy = "read" } and node_prefix "" { policy = "read" }',
        )
    ]


def _leaderless(address: str) -> Finding:
    return fail(
        "consul",
        f"{address} answers and knows no leader",
        "the servers have lost their quorum, or this agent has not joined them (-retry-join, port 8301)",
    )


def _unreachable_hint(error: ConsulError) -> str:
    if isinstance(error, ConsulUnreachable) and "certificate" not in str(error):
        return "is CONSUL_ADDRESS right, does the agent run there, and is it https (CONSUL_HTTP_SSL=true)?"
    return ""


async def check_token(
    client: ConsulClient, needs: Sequence[NeededRight], *, has_token: bool
) -> list[Finding]:
    """Ask Consul, without writing anything, about each right the registrar uses."""
    name = "consul token"
    try:
        granted = await rights(client, [need.right for need in needs])
    except ConsulForbidden as error:
        return [fail(name, str(error), HOW_TO_GET_ONE)]
    except ConsulError as error:
        return [skipped(name, f"this Consul cannot be asked about rights: {error}")]
    if granted is None:
        aside = ": the token that is set counts for nothing" if has_token else ""
        return [ok(name, f"Consul runs without ACLs{aside}")]
    missing = [need for need, is_granted in zip(needs, granted, strict=True) if not is_granted]
    if not missing:
        return [ok(name, "may write our services and read the others'")]
    # One line of a policy may grant several rights; the lesser ones need not be said beside the first.
    first = {need.rule: need for need in reversed(missing)}
    told = [need for need in missing if need.is_vital or first[need.rule] is need]
    return [_missing(need, has_token=has_token) for need in told]


def _missing(need: NeededRight, *, has_token: bool) -> Finding:
    finding = fail if need.is_vital else warn
    detail = f"{need.right.access} of {need.right.resource} {need.right.segment!r} is denied: {need.lost}"
    hint = f"add to the token's policy: {need.rule}" if has_token else f"no token is set; {HOW_TO_GET_ONE}"
    return finding("consul token", detail, hint)
