"""A cluster and a Consul in memory, for tests of the registrar's own decisions."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from msgspec.structs import replace

from k8s_consul_registrar.errors import ClusterUnreachable, ConsulFiltered, ConsulUnreachable
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.model import (
    Drift,
    EndpointSlice,
    Kind,
    KubeService,
    Namespace,
    Node,
    ObjectKey,
    Pod,
    Service,
    ServiceWithSlices,
    Source,
    WriteFailure,
    Written,
)
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.observed import ObservedState
from k8s_consul_registrar.registrar.service_join import ServiceJoin
from k8s_consul_registrar.targets.endpoints import resolve_item
from k8s_consul_registrar.targets.resolve import TargetRules

PODS = Source(Kind.POD)
SERVICES = Source(Kind.SERVICE)
SLICES = Source(Kind.ENDPOINT)
Thing: TypeAlias = Pod | Node | Namespace | KubeService | EndpointSlice
NODES = Source(Kind.NODE)
NAMESPACES = Source(Kind.NAMESPACE)


class MemoryCluster:
    """A cluster that a test lists at will, or changes by events on its `store`.

    `objects` is what the API server would answer to a read by name; `put_list` sets it. `relists` are the
    lists that were asked for, and when.
    """

    def __init__(
        self,
        sources: Sequence[Source] = (PODS,),
        *,
        observed: ObservedState | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        rules: TargetRules | None = None,
        selects_namespaces: bool = False,
    ) -> None:
        target = rules or TargetRules()
        self.observed = observed or ObservedState()
        join = ServiceJoin(target) if any(one.kind is Kind.ENDPOINT for one in sources) else None
        self.desired = DesiredState(
            sources,
            lambda item: resolve_item(item, target),
            self.observed,
            join=join,
            selects_namespaces=selects_namespaces,
            labels=target.given_labels,
            clock=clock,
        )
        self.store = self.desired.store
        self.clock = clock
        self.objects: dict[ObjectKey, Item] = {}
        self.relists: list[tuple[Source, float]] = []
        self.unselected: set[ObjectKey] = set()
        self.excluded_namespaces: set[str] = set()
        self.reads: list[ObjectKey] = []
        self.is_down = False

    def put_list(self, items: Iterable[Thing], source: Source = PODS) -> None:
        """Complete a list."""
        items = list(items)
        self.start_list(items, source)
        self.store.finish_listing(source, self.clock())

    def start_list(self, items: Iterable[Thing], source: Source = PODS) -> None:
        """Begin a list that shows these objects so far."""
        items = list(items)
        gone = [key for key in self.objects if self.store.source_of(key) == source]
        for key in gone:
            del self.objects[key]
        self.objects.update((item.key, item) for item in items)
        self.store.start_listing(source, self.clock())
        for item in items:
            self.store.put(source, item)

    def put(self, item: Thing) -> None:
        """Add or modify an object by an event."""
        self.objects[item.key] = item
        source = self.store.source_of(item.key)
        assert source is not None
        self.store.put(source, item, is_added=False)

    def remove(self, item: Thing) -> None:
        """Delete an object by an event."""
        self.objects.pop(item.key, None)
        source = self.store.source_of(item.key)
        assert source is not None
        self.store.remove(source, item)

    async def read_object(self, key: ObjectKey) -> Item | None:
        """Return an object as the API server has it."""
        self.reads.append(key)
        if self.is_down:
            raise ClusterUnreachable("the API server is down")
        if key.kind is not Kind.ENDPOINT:
            return self.objects.get(key)
        service = self.objects.get(ObjectKey(Kind.SERVICE, key.namespace, key.name))
        if not isinstance(service, KubeService):
            return None
        slices = (one for one in self.objects.values() if isinstance(one, EndpointSlice))
        mine = tuple(one for one in slices if (one.namespace, one.service) == (key.namespace, key.name))
        return ServiceWithSlices(key, service, mine)

    async def is_selected(self, key: ObjectKey) -> bool:
        """Return whether lists show an object."""
        return key not in self.unselected

    def is_excluded(self, key: ObjectKey) -> bool:
        """Return whether the settings leave an object's namespace out."""
        return key.namespace in self.excluded_namespaces

    def relist(self, source: Source, at: float) -> None:
        """Note that a list was asked for."""
        self.relists.append((source, at))


class MemoryRegistry:
    """A Consul that notes the order of writes, refuses some, and can be down.

    With `checks_versions` it is like the catalog: a write must name the version it replaces.
    """

    def __init__(self, *, checks_versions: bool) -> None:
        self.checks_versions = checks_versions
        self.batch_size = 64 if checks_versions else 1
        self.concurrency = 8 if checks_versions else 32
        self.held: dict[str, Service] = {}
        self.index = 0
        self.writes: list[tuple[str, str]] = []
        self.refused: set[str] = set()
        self.lookups: list[str] = []
        # IDs that the token may not see.
        self.hidden: set[str] = set()
        self.is_filtered = False
        self.reads = 0
        self.is_down = False
        self.failing_writes = 0
        self.foreign = Drift.NONE
        self.lost: dict[str, str] = {}
        # While it is clear a full read stops, after `read_first` services; they are all of that moment, which is
        # the beginning unless the read stops before the first.
        self.may_read_on = asyncio.Event()
        self.may_read_on.set()
        self.read_first = 0
        self.register_calls = 0
        self.deregister_calls = 0
        # Calls of `deregister` in flight now, and the most at once so far.
        self.removing = self.most_removing = 0
        self.taken_names: set[str] = set()
        self.names_checked: list[str] = []
        # Called before each write and each lookup, as others get their turn.
        self.before_write: Callable[[], None] = lambda: None
        self.before_lookup: Callable[[], None] = lambda: None
        # Whether the latest read and the latest write failed, and whether anything ever succeeded.
        self.is_read_failing = self.is_write_failing = False
        self.has_answered = False
        # Seconds that each call of a write takes.
        self.write_seconds = 0.0
        # Whether others get their turn after each write.
        self.gives_way = False

    async def services(self) -> AsyncIterator[Service]:
        """Yield what is held."""
        self.reads += 1
        self._check_read()
        if not self.read_first:
            await self.may_read_on.wait()
            self._check_read()
        for number, service in enumerate(list(self.held.values())):
            if number == self.read_first:
                await self.may_read_on.wait()
                self._check_read()
            if service.id not in self.hidden:
                yield service
        self.is_filtered = bool(self.hidden)

    async def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield what is held of these."""
        self.lookups += ids
        self.before_lookup()
        self._check_read()
        if self.hidden.intersection(ids):
            raise ConsulFiltered("the token may not see some of them")
        for service_id in ids:
            if (service := self._find(service_id)) is not None:
                yield service

    async def register(self, services: Sequence[Service]) -> Written:
        """Take services in one by one, except the refused ones and those of another version."""
        self.register_calls += 1
        self.before_write()
        await asyncio.sleep(self.write_seconds)
        failures: list[WriteFailure] = []
        stale: list[str] = []
        indexes = {}
        for one in services:
            self._check_write()
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
        self.deregister_calls += 1
        self.before_write()
        self.removing += 1
        self.most_removing = max(self.most_removing, self.removing)
        try:
            await asyncio.sleep(self.write_seconds)
        finally:
            self.removing -= 1
        self._check_write()
        failures = tuple(WriteFailure(one.id, "no") for one in services if one.id in self.refused)
        left = [one for one in services if one.id not in self.refused]
        stale = tuple(one.id for one in left if self._is_stale(one))
        for one in left:
            if one.id not in stale:
                self.writes.append(("deregister", one.id))
                self.held.pop(one.id, None)
        return Written(len(left) - len(stale), failures, stale=stale)

    async def drift(self) -> Drift:
        """Return what a test did here."""
        self._check_read()
        found, self.foreign = self.foreign, Drift.NONE
        return found

    async def lost_shards(self) -> Mapping[str, str]:
        """Return the shards a test left on record."""
        return self.lost

    async def is_name_taken(self, name: str) -> bool:
        """Return whether a test says that something else in the catalog has this name."""
        self.names_checked.append(name)
        self._check_read()
        return name in self.taken_names

    def put_by_hand(self, service: Service, *, is_noticed: bool = True) -> None:
        """Write as another program."""
        self._put(service)
        self.foreign = Drift.CHANGED if is_noticed else Drift.NONE

    def remove_by_hand(self, service_id: str) -> None:
        """Remove as another program."""
        del self.held[service_id]
        self.foreign = Drift.CHANGED

    def _put(self, service: Service) -> int:
        self.index += 1
        index = self.index if self.checks_versions else 0
        self.held[service.id] = replace(service, index=index)
        return index

    def _check_read(self) -> None:
        self.is_read_failing = self.is_down
        if self.is_down:
            raise ConsulUnreachable("Consul is down")
        self.has_answered = True

    def _check_write(self) -> None:
        self.is_write_failing = True
        if self.is_down:
            raise ConsulUnreachable("Consul is down")
        if self.failing_writes:
            self.failing_writes -= 1
            raise ConsulUnreachable("Consul went down in the middle")
        self.is_write_failing = False
        self.has_answered = True

    def _find(self, service_id: str) -> Service | None:
        """Return what is held under an ID; like the catalog, with versions, without regard to case."""
        held = self.held.get(service_id)
        if held is None and self.checks_versions and service_id != service_id.lower():
            alike = (one for one in self.held.values() if one.id.lower() == service_id.lower())
            return next(alike, None)
        return held

    def _is_stale(self, service: Service) -> bool:
        if not self.checks_versions:
            return False
        held = self._find(service.id)
        return service.index != (0 if held is None else held.index)
