"""A registry of our own for where there is no Consul: what is wanted is kept here, to be served to collectors."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

from k8s_consul_registrar.model import Disturbance, Service, Written

# After so many services, each of which is planned as it is taken, the loop gets its turn.
SLICE = 250


class OwnRecord:
    """Keeps services in memory as Consul would, so that the brake holds here what it holds there."""

    checks_versions = False

    def __init__(self) -> None:
        self._services: dict[str, Service] = {}

    async def services(self) -> AsyncIterator[Service]:
        """Yield every service."""
        for service in tuple(self._services.values()):
            yield service

    async def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield those of these services that are there."""
        for service_id in ids:
            if service_id in self._services:
                yield self._services[service_id]

    async def register(self, services: Iterable[Service]) -> Written:
        """Keep services, in place of those of the same ID."""
        count = 0
        for count, service in enumerate(services, start=1):
            self._services[service.id] = service
            if count % SLICE == 0:
                await asyncio.sleep(0)
        return Written(count)

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Drop services."""
        for service in services:
            self._services.pop(service.id, None)
        return Written(len(services))

    async def disturbance(self) -> Disturbance:
        """Tell that nobody else writes here."""
        return Disturbance.NONE

    async def lost_shards(self) -> Mapping[str, str]:
        """Return none."""
        return {}
