"""What a Consul tells about itself."""

from typing import NamedTuple

import msgspec

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.errors import ConsulForbidden, ConsulRefused


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


_self = msgspec.json.Decoder(_Self)
_leader = msgspec.json.Decoder(str)
_names = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def read_leader(client: ConsulClient) -> str:
    """Return the leader's address, empty where there is none; raises a `ConsulError`."""
    answer = await client.request("GET", "/v1/status/leader")
    try:
        return _leader.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConsulRefused(f"/v1/status/leader is not what Consul sends: {error}") from None


async def read_self(client: ConsulClient) -> AgentSelf | None:
    """Return what the agent says of itself, None where the token may not read it; raises a `ConsulError`.

    A token that is not known at all raises `ConsulForbidden`.
    """
    try:
        answer = await client.request("GET", "/v1/agent/self")
    except ConsulForbidden as error:
        if "ACL not found" in str(error):
            raise
        return None
    try:
        config = _self.decode(answer.body).config
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConsulRefused(f"/v1/agent/self is not what Consul sends: {error}") from None
    return AgentSelf(config.version, config.node_name, config.server)


async def read_service_names(client: ConsulClient) -> list[str]:
    """Return the names of all services of the catalog that the token may see; raises a `ConsulError`."""
    answer = await client.request("GET", "/v1/catalog/services")
    try:
        return sorted(_names.decode(answer.body))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConsulRefused(f"/v1/catalog/services is not what Consul sends: {error}") from None
