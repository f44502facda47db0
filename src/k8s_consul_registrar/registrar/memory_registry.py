"""A registry in memory, for running without Consul: targets are kept here and served over HTTP."""

import math
from collections.abc import AsyncIterator, Mapping, Sequence

from k8s_consul_registrar.model import Drift, Service, Written


class MemoryRegistry:
    """Keeps services as Consul would, so that the brake holds here what it holds there."""

    checks_versions = False
    batch_size = 250
    concurrency = 1

    def __init__(self) -> None:
        self._services: dict[str, Service] = {}

    async def services(self) -> AsyncIterator[Service]:
        """Yield every service."""
        for service in tuple(self._services.values()):
            yield service

    async def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield those of these services that exist."""
        for service_id in ids:
            if service_id in self._services:
                yield self._services[service_id]

    async def register(self, services: Sequence[Service]) -> Written:
        """Keep services in place of those of the same ID."""
        self._services.update((service.id, service) for service in services)
        return Written(len(services))

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Drop services."""
        for service in services:
            self._services.pop(service.id, None)
        return Written(len(services))

    async def drift(self) -> Drift:
        """Return that there is none: nothing else writes here."""
        return Drift.NONE

    async def lost_shards(self) -> Mapping[str, str]:
        """Return none."""
        return {}

    async def is_name_taken(self, name: str) -> bool:  # noqa: ARG002 - nothing else is here
        """Return False: every name is free here."""
        return False


class AlwaysAvailable:
    """The health of a registry that cannot fail."""

    is_up = True
    problem = ""
    open_at = -math.inf

    def concurrency(self, limit: int) -> int:
        """Return the limit."""
        return limit
