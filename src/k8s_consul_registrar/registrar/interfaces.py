"""The Protocols of Kubernetes and Consul that the registrar uses, reads by name, and what stands in for Consul.

`wiring` passes the real objects in.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from k8s_consul_registrar.asyncio_tools import in_slices
from k8s_consul_registrar.errors import ClusterRefused
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.reflector import Reflectors
from k8s_consul_registrar.kube.service_objects import SERVICE_LABEL
from k8s_consul_registrar.model import (
    Drift,
    EndpointSlice,
    Kind,
    KubeService,
    ObjectKey,
    Selector,
    Service,
    ServiceWithSlices,
    Source,
    Undecodable,
    Written,
)
from k8s_consul_registrar.registrar.status import LostAgent

# Services read from memory between two turns of the event loop.
SLICE = 25


class ClusterReader(Protocol):
    """The API server, beyond what its reflectors put into the Store."""

    async def read_object(self, key: ObjectKey) -> Item | None:
        """Return an object as it is now, None if there is none; raises a `ClusterError`."""

    async def is_selected(self, key: ObjectKey) -> bool:
        """Return whether lists of its source show an object that exists; raises a `ClusterError`."""

    def is_excluded(self, key: ObjectKey) -> bool:
        """Return True if the settings leave an object's namespace out, whatever a list shows."""

    def relist(self, source: Source, at: float) -> None:
        """Ask for a new complete list of a source at a moment of the monotonic clock."""


@dataclass(frozen=True, slots=True)
class ClusterReads:
    """Reads of the API server beside those of the reflectors."""

    kube: KubeClient
    reflectors: Reflectors
    selectors: Mapping[Kind, Selector]
    excluded_namespaces: Collection[str] = ()

    async def read_object(self, key: ObjectKey) -> Item | None:
        """Return an object as it is now, None if there is none; raises a `ClusterError`."""
        if key.kind is not Kind.ENDPOINT:
            return await self.kube.read_object(key)
        service_key = ObjectKey(Kind.SERVICE, key.namespace, key.name)
        service = await self.kube.read_object(service_key)
        if service is None:
            return None
        assert isinstance(service, (KubeService, Undecodable))
        slices: list[EndpointSlice] = []
        async for page in self.kube.pages(
            Kind.ENDPOINT, namespace=key.namespace, selector=Selector(f"{SERVICE_LABEL}={key.name}")
        ):
            for part in page.items:
                if not isinstance(part, EndpointSlice):
                    raise ClusterRefused(f"an EndpointSlice of {service_key} cannot be read", 200)
                slices.append(part)
        return ServiceWithSlices(key, service, tuple(slices))

    async def is_selected(self, key: ObjectKey) -> bool:
        """Return True if lists show an object that exists; raises a `ClusterError`."""
        if key.kind is Kind.ENDPOINT:
            key = ObjectKey(Kind.SERVICE, key.namespace, key.name)
        of_namespaces = self.selectors.get(Kind.NAMESPACE)
        if of_namespaces is not None and key.namespace:
            namespace = ObjectKey(Kind.NAMESPACE, "", key.namespace)
            if await self.kube.read_object(namespace, of_namespaces) is None:
                return False
        selector = self.selectors.get(key.kind)
        return selector is None or await self.kube.read_object(key, selector) is not None

    def is_excluded(self, key: ObjectKey) -> bool:
        """Return True if the settings leave an object's namespace out."""
        return key.namespace in self.excluded_namespaces

    def relist(self, source: Source, at: float) -> None:
        """Ask for a new complete list at a moment of the monotonic clock."""
        is_gated = Kind.NAMESPACE in self.selectors and source.kind is not Kind.NODE
        for one in (*source.needed, *([Source(Kind.NAMESPACE)] if is_gated else ())):
            self.reflectors.relist(one, at)


class Registry(Protocol):
    """Consul's record of services in one place: an agent, or a node of the catalog.

    Each raises a `ConsulError` when Consul is unavailable; what it refuses of single services is in the
    `Written`. `checks_versions` is True if a write is made only over the version that its `index` names.
    `is_filtered` is True if what the last `services` did not show may be there all the same. A
    batch holds at most `batch_size` services, and at most `concurrency` batches are in flight.
    """

    checks_versions: bool
    is_filtered: bool
    concurrency: int

    @property
    def batch_size(self) -> int:
        """The number of services in a batch at most."""

    def services(self) -> AsyncIterator[Service]:
        """Yield every service held there, no matter who wrote it, and let other tasks run in between."""

    def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield those of these services that exist now."""

    async def register(self, services: Sequence[Service]) -> Written:
        """Write services over what is under the same IDs."""

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Remove services; one that does not exist counts as done."""

    async def drift(self) -> Drift:
        """Return the changes that other writers may have made; cheap enough to ask every few seconds."""

    async def lost_shards(self) -> Mapping[str, str]:
        """Return shard paths by service ID that are still on record though the service is not held here."""

    async def is_name_taken(self, name: str) -> bool:
        """Return whether a service anywhere in the catalog has this name and no registrar wrote it."""


class Health(Protocol):
    """Consul as its client last found it."""

    @property
    def is_up(self) -> bool:
        """True if a request succeeded and neither the latest read nor the latest write failed."""

    @property
    def problem(self) -> str:
        """The latest failure, empty if there is none."""

    @property
    def open_at(self) -> float:
        """Moment of the monotonic clock before which no new work may start."""

    def concurrency(self, limit: int) -> int:
        """Return how many of `limit` requests may be in flight; few after an outage or a 429."""


class Leadership(Protocol):
    """The election's result, as far as it concerns this replica."""

    @property
    def is_leader(self) -> bool:
        """True if a write may start now."""

    async def changed(self) -> None:
        """Wait until leadership was won or lost since this last returned."""


class MemoryRegistry:
    """Keeps services as Consul would, so that the brake works without Consul too."""

    checks_versions = False
    is_filtered = False
    batch_size = 250
    concurrency = 1

    def __init__(self) -> None:
        self._services: dict[str, Service] = {}

    async def services(self) -> AsyncIterator[Service]:
        """Yield every service."""
        async for service in in_slices(tuple(self._services.values()), SLICE):
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


class Role(Enum):
    """Part that this replica plays."""

    UNDECIDED = "undecided"
    LEADER = "leader"
    STANDBY = "standby"


class NoElection:
    """The leadership of a registrar without replicas."""

    is_leader = True

    async def changed(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()


class Upkeep(Protocol):
    """Removal of services from places where no agent keeps them: nodes of lost agents, or our agent's own.

    `look_due` is when to look again, in seconds of the monotonic clock.
    """

    look_due: float

    @property
    def lost(self) -> tuple[LostAgent, ...]:
        """The lost agents whose nodes may hold services of this registrar."""

    async def look(self) -> bool:
        """Look, at little cost, for such services; return True if a resync is wanted first."""

    async def collect(self) -> None:
        """Remove what may go; to be called after a resync."""

    def rest(self) -> None:
        """Forget what was seen, since another replica leads."""
