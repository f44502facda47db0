"""Finds and removes services of ours at a place that is no longer theirs."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from k8s_consul_registrar.model import Service, Written

# So many services are removed at once, so that none of a long list needs keeping.
BATCH = 1024


class Place(Protocol):
    """Where services are: an agent, or a node of the catalog."""

    def services(self) -> AsyncIterator[Service]:
        """Yield every service there, whoever wrote it."""
        ...

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Remove services."""
        ...


class FormerPlace:
    """A place our services have left, as soon as they all are at the new one: whoever calls sees to that.

    A synthetic node is left behind empty. To remove a node is to remove every service on it, whoever put
    one there a moment ago.
    """

    def __init__(self, name: str, place: Place, is_ours: Callable[[Service], bool]) -> None:
        self.name = name
        self._place = place
        self._is_ours = is_ours

    async def services(self) -> AsyncIterator[Service]:
        """Yield our services that are there still; raises a `ConsulError`."""
        async for service in self._place.services():
            if self._is_ours(service):
                yield service

    async def clear(self) -> Written:
        """Remove them; what another writes meanwhile is stale and stays. Raises a `ConsulError`."""
        removed: list[Written] = []
        batch: list[Service] = []
        async for service in self.services():
            batch.append(service)
            if len(batch) == BATCH:
                removed.append(await self._place.deregister(batch))
                batch = []
        if batch:
            removed.append(await self._place.deregister(batch))
        return Written(
            done=sum(one.done for one in removed),
            failures=tuple(failure for one in removed for failure in one.failures),
            stale=tuple(service_id for one in removed for service_id in one.stale),
        )
