"""A cluster and a Consul in memory, for tests of the reconciler's own decisions."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from msgspec.structs import replace

from k8s_consul_registrar.errors import ConsulUnreachable
from k8s_consul_registrar.kube.mirror import Mirror
from k8s_consul_registrar.model import (
    Disturbance,
    Kind,
    ObjectKey,
    Pod,
    Service,
    Source,
    WriteFailure,
    Written,
)
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.wanted import Wanted

PODS = Source(Kind.POD)


class MemoryCluster:
    """A cluster of Pods that a test lists at will, or changes by events on its `mirror`."""

    def __init__(self) -> None:
        self.mirror = Mirror((PODS,), lambda item: resolve(item, TargetRules()))
        self.relists: list[Source] = []
        self.now = 0.0

    def put_list(self, pods: Iterable[Pod]) -> None:
        """Complete a list."""
        self.mirror.start_listing(PODS)
        for pod in pods:
            self.mirror.put(PODS, pod)
        self.now += 1
        self.mirror.finish_listing(PODS, self.now)

    def wanted(self) -> Wanted:
        """Return everything known."""
        return self.mirror.wanted()

    def known(self) -> Wanted:
        """Return everything known, unseen."""
        return self.mirror.known()

    def changes(self, also: AbstractSet[str] = frozenset()) -> Wanted:
        """Return what changed."""
        return self.mirror.changes(also)

    def needs_full_pass(self) -> bool:
        """Whether a list was completed."""
        return self.mirror.needs_full_pass()

    async def changed(self) -> None:
        """Wait for a change."""
        await self.mirror.changed()

    def settled(self, departed: AbstractSet[ObjectKey]) -> None:
        """Forget departures."""
        self.mirror.settled(departed)

    def relist(self, source: Source, at: float) -> None:
        """Note that a list was asked for."""
        self.relists.append(source)


class MemoryRegistry:
    """A Consul that notes the order of writes, refuses some, and can be down.

    With `checks_versions` it is like the catalog: a write must name the version it replaces.
    """

    def __init__(self, *, checks_versions: bool) -> None:
        self.checks_versions = checks_versions
        self.held: dict[str, Service] = {}
        self.index = 0
        self.writes: list[tuple[str, str]] = []
        self.refused: set[str] = set()
        self.lookups: list[str] = []
        self.reads = 0
        self.is_down = False
        self.failing_writes = 0
        self.foreign = Disturbance.NONE
        self.lost: dict[str, str] = {}
        # While it is clear a full read stops, after `read_first` services; they are all of that moment, which is
        # the beginning unless the read stops before the first.
        self.may_read_on = asyncio.Event()
        self.may_read_on.set()
        self.read_first = 0
        self.register_calls = 0
        # Whether others get their turn after each write.
        self.gives_way = False

    async def services(self) -> AsyncIterator[Service]:
        """Yield what is held."""
        self.reads += 1
        self._check()
        if not self.read_first:
            await self.may_read_on.wait()
            self._check()
        for number, service in enumerate(list(self.held.values())):
            if number == self.read_first:
                await self.may_read_on.wait()
                self._check()
            yield service

    async def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield what is held of these."""
        self.lookups += ids
        self._check()
        for service_id in ids:
            if service_id in self.held:
                yield self.held[service_id]

    async def register(self, services: Iterable[Service]) -> Written:
        """Take services in one by one, except the refused ones and those of another version."""
        self.register_calls += 1
        failures: list[WriteFailure] = []
        stale: list[str] = []
        indexes = {}
        for one in services:
            self._check()
            if self.failing_writes:
                self.failing_writes -= 1
                raise ConsulUnreachable("Consul went down in the middle")
            if one.id in self.refused:
                failures.append(WriteFailure(one.id, "no"))
            elif self._is_stale(one):
                stale.append(one.id)
            else:
                self.writes.append(("register", one.id))
                indexes[one.id] = self._put(one)
            if self.gives_way:
                await asyncio.sleep(0)
        return Written(len(indexes), tuple(failures), indexes, tuple(stale))

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Take services out, except the refused ones and those of another version."""
        self._check()
        failures = tuple(WriteFailure(one.id, "no") for one in services if one.id in self.refused)
        left = [one for one in services if one.id not in self.refused]
        stale = tuple(one.id for one in left if self._is_stale(one))
        for one in left:
            if one.id not in stale:
                self.writes.append(("deregister", one.id))
                self.held.pop(one.id, None)
        return Written(len(left) - len(stale), failures, stale=stale)

    async def disturbance(self) -> Disturbance:
        """Return what a test did here."""
        found, self.foreign = self.foreign, Disturbance.NONE
        return found

    async def lost_shards(self) -> Mapping[str, str]:
        """Return the shards a test left on record."""
        return self.lost

    def put_by_hand(self, service: Service, *, is_noticed: bool = True) -> None:
        """Write as somebody else."""
        self._put(service)
        self.foreign = Disturbance.CHANGED if is_noticed else Disturbance.NONE

    def remove_by_hand(self, service_id: str) -> None:
        """Remove as somebody else."""
        del self.held[service_id]
        self.foreign = Disturbance.CHANGED

    def _put(self, service: Service) -> int:
        self.index += 1
        index = self.index if self.checks_versions else 0
        self.held[service.id] = replace(service, index=index)
        return index

    def _check(self) -> None:
        if self.is_down:
            raise ConsulUnreachable("Consul is down")

    def _is_stale(self, service: Service) -> bool:
        if not self.checks_versions:
            return False
        held = self.held.get(service.id)
        return service.index != (0 if held is None else held.index)
