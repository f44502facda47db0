"""Nodes that lost their agent: finding them, reading their services, and removing those."""

from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from k8s_consul_registrar.consul.acl import read_own_node
from k8s_consul_registrar.consul.batches import Blame, Transactions, write_all
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import (
    MetaKeys,
    RaftIndex,
    decode,
    decode_agent_services,
    decode_listed,
)
from k8s_consul_registrar.consul.node import read_node_check
from k8s_consul_registrar.consul.previous_location import PreviousLocation
from k8s_consul_registrar.consul.records import CONSISTENT, list_services, node_of, scope_of_nodes
from k8s_consul_registrar.consul.transactions import FORMER_MOST_OPERATIONS, Operations
from k8s_consul_registrar.errors import ConsulFiltered, ConsulRefused
from k8s_consul_registrar.model import (
    CRITICAL,
    MANAGED_BY,
    SERF_HEALTH,
    AgentHealth,
    Service,
    Written,
)

# All that a registrar wrote has this key, which no setting renames (`consul.meta_keys`).
OF_A_REGISTRAR = f'Meta.managed_by == "{MANAGED_BY}"'


class _Check(msgspec.Struct, rename="pascal"):
    node: str
    check_id: str = msgspec.field(name="CheckID")
    status: str
    modify_index: RaftIndex


_checks = msgspec.json.Decoder(list[_Check])


class LostAgents:
    """The catalog's view of agents that are gone; each method raises a `ConsulError`."""

    def __init__(
        self,
        client: ConsulClient,
        meta_keys: MetaKeys = MetaKeys(),  # noqa: B008 - an immutable value
    ) -> None:
        self._client = client
        self._meta_keys = meta_keys

    async def own_node(self) -> str:
        """Return the node of the agent we talk to."""
        return await read_own_node(self._client)

    async def failing(self) -> list[AgentHealth]:
        """Return the agents' own checks that are critical now; the catalog sends only these."""
        params = {**CONSISTENT, **scope_of_nodes(self._client), "filter": f'CheckID == "{SERF_HEALTH}"'}
        answer = await self._client.request("GET", f"/v1/health/state/{CRITICAL}", params=params)
        checks = decode(_checks, answer.body, "/v1/health/state")
        return [AgentHealth(one.node, one.check_id, one.status, one.modify_index) for one in checks]

    async def services_here(self, own_node: str) -> AsyncIterator[Service]:
        """Yield the services that our agent has now and the catalog shows alike at its node; raises a `ConsulError`."""
        listing = list_services(self._client, own_node)
        shown = {service.id: hash(service) async for service in _decoded(listing.records())}
        if node_of(listing) is None:
            raise ConsulFiltered(f"the catalog does not show the agent's node {own_node} to this token")
        answer = await self._client.request("GET", "/v1/agent/services")
        for service in decode_agent_services(answer.body):
            if shown.get(service.id) == hash(service):
                yield self._meta_keys.decode(service)

    def location(self, lost: AgentHealth, may_go: Callable[[Service], bool]) -> PreviousLocation:
        """Return the node of a lost agent as a previous location of our services."""
        node = _LostNode(self._client, self._meta_keys, lost)
        return PreviousLocation(f"node {lost.node}", node, may_go)


class _LostNode:
    """The node of one agent, for as long as its check says just what it said when it was found lost.

    The node itself is never written: Consul removes it, and whatever is still on it, 72 hours after it
    lost the agent.
    """

    def __init__(self, client: ConsulClient, meta_keys: MetaKeys, lost: AgentHealth) -> None:
        self._client = client
        self._meta_keys = meta_keys
        self._lost = lost
        self._operations = Operations(lost.node, client.namespace, client.partition)
        self._transactions = Transactions(client)
        self._blame = Blame()

    async def services(self) -> AsyncIterator[Service]:
        """Yield what any registrar wrote there, by a consistent read; nothing where it is no agent's node."""
        listing = list_services(self._client, self._lost.node, OF_A_REGISTRAR)
        async for service in _decoded(listing.records()):
            node = node_of(listing)
            if node is None or (node.meta or {}).get("external-node") == "true":
                return
            yield self._meta_keys.decode(service)

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Remove these very records; what is left when the agent turns out to be back is stale."""
        total = Written()
        for start in range(0, len(services), FORMER_MOST_OPERATIONS):
            batch = services[start : start + FORMER_MOST_OPERATIONS]
            if not await self._is_still_lost():
                return total + Written(stale=tuple(service.id for service in services[start:]))
            total += await write_all(
                self._transactions,
                map(self._operations.remove, batch),
                concurrency=1,
                blame=self._blame,
                restore_node=self._leave_node,
            )
        return total

    async def _is_still_lost(self) -> bool:
        check = await read_node_check(self._transactions, self._operations, SERF_HEALTH)
        return check is not None and check.status == CRITICAL and check.modify_index == self._lost.version

    async def _leave_node(self) -> None:
        raise ConsulRefused(f"node {self._lost.node} is gone")


async def _decoded(records: AsyncIterator[bytes]) -> AsyncIterator[Service]:
    async for record in records:
        yield decode_listed(record)
