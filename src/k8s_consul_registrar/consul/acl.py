"""The token's rights, asked without using them, and what an agent says of itself."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import decode
from k8s_consul_registrar.errors import (
    ConsulForbidden,
    ConsulRefused,
    ConsulTokenUnknown,
    NotConsul,
)

# Consul's own web interface asks here; there since 1.7, and it writes nothing.
AUTHORIZE = "/v1/internal/acl/authorize"
AGENT_SELF = "/v1/agent/self"
# New connections over which an agent is asked who it is: a load balancer shows itself by different answers.
CONNECTIONS = 3


class Right(NamedTuple):
    """One right in the words of Consul's ACL: `service` or `node`, its name, `read` or `write`.

    `namespace` is Consul Enterprise's, empty for the client's.
    """

    resource: str
    segment: str
    access: str
    namespace: str = ""


class _Answer(msgspec.Struct, rename="pascal"):
    allow: bool


class AgentSelf(NamedTuple):
    """The agent we talk to; `is_server` tells a server from a client agent."""

    version: str
    node: str
    is_server: bool


class _Config(msgspec.Struct, rename="pascal"):
    version: str = ""
    node_name: str = ""
    server: bool = False


class _Self(msgspec.Struct, rename="pascal"):
    config: _Config


UNREADABLE = "the token may not read the agent, so its own node is not known"

_answers = msgspec.json.Decoder(list[_Answer])
_self = msgspec.json.Decoder(_Self)
_leader = msgspec.json.Decoder(str)
_names = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def rights(client: ConsulClient, asked: Sequence[Right]) -> list[bool] | None:
    """Return for each right whether the token has it, None where Consul runs without ACLs.

    Raises a `ConsulError`: `ConsulTokenUnknown` for a token that is not known, `ConsulRefused` with status 404
    or 405 where this Consul cannot be asked.
    """
    body = msgspec.json.encode([_question(one, client) for one in asked])
    try:
        answer = await client.request("POST", AUTHORIZE, body=body, is_read=True)
    except ConsulRefused as refused:
        if refused.status == 401:  # "ACL support disabled"
            return None
        raise
    found = [one.allow for one in decode(_answers, answer.body, AUTHORIZE)]
    if len(found) != len(asked):
        raise ConsulRefused(f"{AUTHORIZE} answers {len(found)} of {len(asked)} questions")
    return found


def _question(right: Right, client: ConsulClient) -> dict[str, str]:
    """Return the question about one right; Consul Enterprise takes its scope from there only.

    A node is in a partition and in no namespace.
    """
    namespace = "" if right.resource == "node" else right.namespace or client.namespace
    scope = {"Namespace": namespace, "Partition": client.partition}
    asked = {"Resource": right.resource, "Segment": right.segment, "Access": right.access}
    return {**asked, **{key: value for key, value in scope.items() if value}}


async def read_leader(client: ConsulClient) -> str:
    """Return the leader's address, empty where there is none; raises a `ConsulError`."""
    answer = await client.request("GET", "/v1/status/leader")
    return decode(_leader, answer.body, "/v1/status/leader")


async def read_self(client: ConsulClient) -> AgentSelf | None:
    """Return what the agent says of itself, None where the token may not read it; raises a `ConsulError`.

    A token that Consul does not know raises `ConsulTokenUnknown`, an answer without a node `NotConsul`.
    """
    try:
        answer = await client.request("GET", AGENT_SELF)
    except ConsulTokenUnknown:
        raise
    except ConsulForbidden:
        return None
    try:
        config = decode(_self, answer.body, AGENT_SELF).config
    except ConsulRefused as error:
        raise NotConsul(f"this is no Consul: {error}") from None
    if not config.node_name:
        raise NotConsul(f"this is no Consul: {AGENT_SELF} names no node")
    return AgentSelf(config.version, config.node_name, config.server)


async def read_own_node(client: ConsulClient) -> str:
    """Return the node of the agent we talk to; raises a `ConsulError`."""
    agent = await read_self(client)
    if agent is None:
        raise ConsulForbidden(UNREADABLE)
    return agent.node


async def read_agents(client: ConsulClient) -> tuple[AgentSelf, ...]:
    """Return the agents that answer over a few new connections; raises a `ConsulError`."""
    agents = []
    for _ in range(CONNECTIONS):
        async with client.single() as single:
            agent = await read_self(single)
        if agent is None:
            raise ConsulForbidden(UNREADABLE)
        agents.append(agent)
    return tuple(agents)


async def read_service_names(client: ConsulClient) -> list[str]:
    """Return the names of all services of the catalog that the token may see; raises a `ConsulError`."""
    answer = await client.request("GET", "/v1/catalog/services")
    names = decode(_names, answer.body, "/v1/catalog/services")
    return sorted(names)
