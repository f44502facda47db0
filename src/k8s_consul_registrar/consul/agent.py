"""The registry of one Consul agent: services registered there belong to its node."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from urllib.parse import quote

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import decode_agent_services, encode_registration
from k8s_consul_registrar.consul.meta_keys import MetaKeys
from k8s_consul_registrar.errors import ConsulBusy, ConsulError, ConsulForbidden, ConsulRefused
from k8s_consul_registrar.model import Service, WriteFailure, Written

# An agent's throughput stops growing here: 32 in flight took 1,000 a second where 64 took no more.
CONCURRENCY = 32
# So many faults of Consul's own in a row are Consul's trouble, not that of the services at hand.
MOST_FAULTS_IN_A_ROW = 10


class AgentRegistry:
    """Reads and writes the services of an agent (`/v1/agent/service*`)."""

    def __init__(
        self, client: ConsulClient, *, concurrency: int = CONCURRENCY, meta_keys: MetaKeys | None = None
    ) -> None:
        self._client = client
        self._concurrency = concurrency
        self._meta_keys = meta_keys or MetaKeys()

    async def services(self) -> AsyncIterator[Service]:
        """Yield every service of the agent, whoever wrote it; raises a `ConsulError`."""
        answer = await self._client.request("GET", "/v1/agent/services")
        for service in decode_agent_services(answer.body):
            yield self._meta_keys.decode(service)

    async def register(self, services: Sequence[Service]) -> Written:
        """Register services, over what is there under the same ID, keeping its checks."""

        async def put(service: Service) -> None:
            body = encode_registration(self._meta_keys.encode(service))
            await self._client.request("PUT", "/v1/agent/service/register", body=body)

        return await self._each(services, put)

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Deregister services by ID; one that is not there counts as done."""

        async def remove(service: Service) -> None:
            path = f"/v1/agent/service/deregister/{quote(service.id, safe='')}"
            try:
                await self._client.request("PUT", path)
            except ConsulRefused as refused:
                # From 1.11 on an agent answers 404 for an unknown service, where earlier ones said 200.
                if refused.status != 404:
                    raise

        return await self._each(services, remove)

    async def _each(
        self, services: Sequence[Service], write: Callable[[Service], Awaitable[None]]
    ) -> Written:
        """Write each service with bounded concurrency; one that is refused does not hold up the rest."""
        batch = _Batch(iter(services))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(services))):
                    group.create_task(batch.work(write))
        except* ConsulError as errors:
            raise errors.exceptions[0] from None
        return Written(batch.done, tuple(batch.failures))


class _Batch:
    """What the workers of one batch share."""

    def __init__(self, services: Iterator[Service]) -> None:
        self._services = services
        self._faults_in_a_row = 0
        self.done = 0
        self.failures: list[WriteFailure] = []

    async def work(self, write: Callable[[Service], Awaitable[None]]) -> None:
        for service in self._services:
            try:
                await write(service)
            except (ConsulRefused, ConsulForbidden) as refused:
                self.failures.append(WriteFailure(service.id, str(refused)))
            except ConsulBusy as fault:
                self._faults_in_a_row += 1
                if self._faults_in_a_row > MOST_FAULTS_IN_A_ROW:
                    raise
                self.failures.append(WriteFailure(service.id, str(fault)))
            else:
                self._faults_in_a_row = 0
                self.done += 1
