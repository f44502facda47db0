"""Consul: is it there, does it have a leader, may our token do what the registrar does."""

from typing import NamedTuple

from k8s_consul_registrar.app.checks.finding import Finding, fail, ok, skipped, warn
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.rights import Right, rights
from k8s_consul_registrar.consul.status import read_leader, read_self
from k8s_consul_registrar.errors import (
    ConsulError,
    ConsulForbidden,
    ConsulUnreachable,
)
from k8s_consul_registrar.targets.names import node_service_id, pod_service_id

HOW_TO_GET_ONE = (
    "CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE must hold the secret ID of a token of this Consul "
    "(consul acl token create -policy-name k8s-consul-registrar)"
)
# A name that nobody's services have, for asking about those of others.
SOMEBODY_S = "k8s-consul-registrar-check"


class Need(NamedTuple):
    """A right, what Consul's policies call it, and what is lost without it; vital ones fail the check."""

    right: Right
    rule: str
    lost: str
    is_vital: bool


NEEDS = (
    Need(
        Right("service", pod_service_id("check", "check"), "write"),
        'service_prefix "pod--" { policy = "write" }',
        "no Pod can be registered",
        is_vital=True,
    ),
    Need(
        Right("service", node_service_id("192.0.2.1"), "write"),
        'service_prefix "node--" { policy = "write" }',
        "no Node can be registered",
        is_vital=True,
    ),
    Need(
        Right("service", SOMEBODY_S, "read"),
        'service_prefix "" { policy = "read" }',
        "services of others are invisible, so a conflict is seen only as a refused write",
        is_vital=False,
    ),
)


async def check_consul(client: ConsulClient, address: str) -> list[Finding]:
    """Say whether Consul answers, has a leader, and which version it is."""
    name = "consul"
    try:
        leader = await read_leader(client)
    except ConsulError as error:
        return [fail(name, str(error), _unreachable_hint(error))]
    if not leader:
        return [_leaderless(address)]
    try:
        agent = await read_self(client)
    except ConsulForbidden:
        return [ok(name, f"{address} answers, its leader is {leader}")]  # the token's own check says more
    except ConsulError as error:
        return [fail(name, str(error), _unreachable_hint(error))]
    if agent is None:
        return [
            ok(name, f"{address} answers, its leader is {leader} (its version is not shown to our token)")
        ]
    role = "a server" if agent.is_server else "a client agent"
    found = [
        ok(name, f"{address} answers, {agent.version}, {role}, node {agent.node}; its leader is {leader}")
    ]
    if agent.is_server:
        found.append(
            warn(
                "consul agent",
                "this is a server: the services will belong to its node",
                "let CONSUL_ADDRESS be an agent beside the registrar, as deploy/deployment.yaml has it",
            )
        )
    return found


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


async def check_token(client: ConsulClient, *, has_token: bool) -> list[Finding]:
    """Ask Consul, without writing anything, about each right the registrar uses."""
    name = "consul token"
    try:
        granted = await rights(client, [need.right for need in NEEDS])
    except ConsulForbidden as error:
        return [fail(name, str(error), HOW_TO_GET_ONE)]
    except ConsulError as error:
        return [skipped(name, f"this Consul cannot be asked about rights: {error}")]
    if granted is None:
        aside = ": the token that is set counts for nothing" if has_token else ""
        return [ok(name, f"Consul runs without ACLs{aside}")]
    missing = [need for need, is_granted in zip(NEEDS, granted, strict=True) if not is_granted]
    if not missing:
        return [ok(name, "may write our services and read the others'")]
    return [_missing(need, has_token=has_token) for need in missing]


def _missing(need: Need, *, has_token: bool) -> Finding:
    finding = fail if need.is_vital else warn
    detail = f"{need.right.access} of {need.right.resource} {need.right.segment!r} is denied: {need.lost}"
    hint = f"add to the token's policy: {need.rule}" if has_token else f"no token is set; {HOW_TO_GET_ONE}"
    return finding("consul token", detail, hint)
