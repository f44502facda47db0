"""Ghosts: services that the catalog shows at our agent's node and that the agent does not hold.

An agent deregisters a service in the catalog with its own token only (1.15 and later), or with the one that the
service was registered with. If that token lacks the right, or the agent lost its data, the agent answers 200
and the record stays for good.
"""

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import islice

from msgspec.structs import replace

from k8s_consul_registrar.consul.acl import read_own_node
from k8s_consul_registrar.consul.agent import AgentRegistry, read_agent_service
from k8s_consul_registrar.consul.batches import Blame, Transactions, write_all
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import decode_agent_services, decode_listed
from k8s_consul_registrar.consul.health import is_filtered
from k8s_consul_registrar.consul.lost_agents import OF_A_REGISTRAR
from k8s_consul_registrar.consul.records import list_services, node_of
from k8s_consul_registrar.consul.transactions import FORMER_MOST_OPERATIONS, Operations, Unit
from k8s_consul_registrar.errors import ConsulFiltered, ConsulRefused
from k8s_consul_registrar.model import Ghosts, Service, Written


class AgentGhosts:
    """Finds and removes the ghosts of one agent."""

    def __init__(self, registry: AgentRegistry) -> None:
        self._client = registry.client
        self._meta_keys = registry.meta_keys
        self.traffic = registry.traffic
        self._blame = Blame()
        self._node = ""

    async def find(self) -> Ghosts:
        """Return what any registrar wrote at the agent's node and the agent does not hold.

        Raises a `ConsulError`, `ConsulRefused` if different agents answer.
        """
        started = time.monotonic()
        async with self._client.single() as client:
            node = await read_own_node(client)
            held = await _held(client)
            listing = list_services(client, node, OF_A_REGISTRAR)
            left = [
                service
                async for record in listing.records()
                if (service := decode_listed(record)).id.lower() not in held
            ]
            if (record_of_node := node_of(listing)) is None:
                raise ConsulFiltered(f"the catalog does not show the agent's node {node} to this token")
            if left:
                held = await _held(client)
            await _require(client, node)
        found = tuple(self._meta_keys.decode(one) for one in left if one.id.lower() not in held)
        ids = {one.id for one in found}
        deregistered = self.traffic.forget(started, ids)
        # The servers make the record of a node that has joined; its meta comes from the agent itself.
        may_write = bool(record_of_node.meta)
        return Ghosts(node, found, deregistered, may_write)

    async def services(self) -> AsyncIterator[Service]:
        """Yield what `find` returns, as a location that can be cleared."""
        ghosts = await self.find()
        self._node = ghosts.node
        for service in ghosts.services:
            yield service

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Remove what `services` yielded."""
        return await self.remove(self._node, services)

    async def remove(self, node: str, services: Sequence[Service]) -> Written:
        """Remove these very records from the agent's node, unless the agent holds their IDs by now.

        Those that it holds are stale. Raises a `ConsulError`, `ConsulRefused` if another agent answers.
        """
        total = Written()
        with self.traffic.removing(one.id for one in services) as ids:
            going = [one for one in services if one.id in ids]
            async with self._client.single() as client:
                for batch in _batches(going):
                    total += await self._remove(client, node, batch)
        return total + Written(stale=tuple(one.id for one in services if one.id not in ids))

    async def _remove(self, client: ConsulClient, node: str, services: Sequence[Service]) -> Written:
        operations = Operations(node, client.namespace, client.partition)
        held = await self._held_of(client, node, services)
        absent = [one for one in services if one.id not in held]
        removed = await self._write(client, map(operations.remove, absent))
        left = {*removed.stale, *(failure.id for failure in removed.failures)}
        gone = [one for one in absent if one.id not in left]
        # Another writer may have registered one at this very moment: its agent takes the record for its own.
        back = await self._held_of(client, node, gone) if gone else set()
        returned = [replace(self._meta_keys.encode(one), index=0) for one in gone if one.id in back]
        if returned:
            await self._write(client, [operations.put(one, has_check=False) for one in returned])
        return Written(removed.done - len(returned), removed.failures, stale=(*held, *removed.stale, *back))

    async def _held_of(self, client: ConsulClient, node: str, services: Sequence[Service]) -> set[str]:
        """Return which of these IDs the agent holds; the agent of another node cannot say."""
        await _require(client, node)
        held = set()
        for service in services:
            try:
                if await read_agent_service(client, service.id) is not None:
                    held.add(service.id)
            except ConsulFiltered:
                held.add(service.id)
        await _require(client, node)
        return held

    async def _write(self, client: ConsulClient, units: Iterable[Unit]) -> Written:
        return await write_all(
            Transactions(client), units, concurrency=1, blame=self._blame, restore_node=_leave_node
        )


async def _held(client: ConsulClient) -> set[str]:
    """Return the IDs of the agent's services in lower case, since the catalog ignores it."""
    answer = await client.request("GET", "/v1/agent/services")
    if is_filtered(answer.headers):
        raise ConsulFiltered("the token may not see all of the agent's services")
    return {service.id.lower() for service in decode_agent_services(answer.body)}


async def _require(client: ConsulClient, node: str) -> None:
    if (answering := await read_own_node(client)) != node:
        raise ConsulRefused(f"the agents of different nodes answer: {node}, {answering}")


async def _leave_node() -> None:
    raise ConsulRefused("the agent's node is gone from the catalog")


def _batches(services: Sequence[Service]) -> Iterator[list[Service]]:
    rest = iter(services)
    while batch := list(islice(rest, FORMER_MOST_OPERATIONS)):
        yield batch
