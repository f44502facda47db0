"""The catalog backend: services on a synthetic node, written by transactions."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

from msgspec.structs import replace

from k8s_consul_registrar.consul.batches import Blame, Transactions, write_all
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import MetaKeys, decode_listed
from k8s_consul_registrar.consul.drift import NodeDrift
from k8s_consul_registrar.consul.node import SyntheticNode
from k8s_consul_registrar.consul.records import (
    RecordStream,
    has_foreign_instance,
    is_managed,
    list_checks,
    list_services,
    node_of,
    read_readiness,
)
from k8s_consul_registrar.consul.renames import Renames
from k8s_consul_registrar.consul.transactions import (
    Operations,
    Unit,
    check_id,
)
from k8s_consul_registrar.errors import ConsulFiltered
from k8s_consul_registrar.model import Drift, Service, Written

# Transactions in flight. Four keep a Consul of two cores busy; twice as many do so too while we are slow to
# answer because a list streams in (8,200 services: 1.09 s in all, 1.14 s with 4; 12 gained nothing more).
CONCURRENCY = 8
# A node that is missing from one list and there a moment later was made in between; missing twice, it is hidden.
READS = 2
MOST_NAMED = 5  # services that an error names


class CatalogRegistry:
    """Reads and writes the services of one node, each only over the very record that was read.

    A read that ACLs filter cannot lead to harm: a service we do not see is never overwritten, since a
    write without an index creates or is stale, and nothing is removed but by the index that was read. It proves
    no absence (`is_filtered`). Only a read that shows nothing at all because the node is hidden is `ConsulFiltered`.
    """

    checks_versions = True
    is_filtered = False

    def __init__(
        self,
        client: ConsulClient,
        node_name: str,
        *,
        concurrency: int = CONCURRENCY,
        meta_keys: MetaKeys = MetaKeys(),  # noqa: B008 - an immutable value
        is_of_a_registrar: Callable[[Service], bool] = is_managed,
        selection: str = "",
    ) -> None:
        """Make the registry; `selection` is the digest that `record_selection` writes, empty for none."""
        self.concurrency = concurrency
        self._client = client
        self._is_of_a_registrar = is_of_a_registrar
        self._meta_keys = meta_keys
        self._operations = Operations(node_name, client.namespace, client.partition)
        self._transactions = Transactions(client)
        self._blame = Blame()
        self._node = SyntheticNode(self._transactions, self._operations, selection)
        self._drift = NodeDrift(client)
        self._renames = Renames(self._transactions, self._operations, self._write_apart)
        self._checked: set[str] = set()  # IDs known to have one of our checks

    @property
    def batch_size(self) -> int:
        """The number of services that fit one transaction."""
        return self._transactions.most_operations

    @property
    def recorded_selection(self) -> str:
        """The digest of the selection that the node was last read with, empty if it is unknown.

        What this process recorded itself is left out: it says nothing about those that wrote before.
        """
        return self._node.recorded

    async def record_selection(self) -> bool:
        """Record our selection at the node, once per process; return whether that took a write.

        Raises a `ConsulError`. A node that no registrar made is left as it is.
        """
        with self._drift.writing():
            is_written = await self._node.record()
        if is_written:
            self._drift.wrote(0)
        return is_written

    async def services(self) -> AsyncIterator[Service]:
        """Yield every service of the node, whatever wrote it, none where there is no node.

        They are decoded one by one as they arrive, and none is kept. Raises a `ConsulError`; then the services
        yielded are not all.
        """
        await self._drift.begin(self._node.name)
        for _ in range(READS):
            ready = await read_readiness(list_checks(self._client, self._node.name))
            listing = list_services(self._client, self._node.name)
            is_verified = False
            async for record in listing.records():
                if not is_verified:
                    if (node := node_of(listing)) is not None:
                        self._node.verify(node)
                    is_verified = True
                service = self._meta_keys.decode(decode_listed(record))
                yield replace(service, ready=ready.get(service.id)) if ready else service
            if is_verified or await self._is_proven_empty(listing):
                self._checked = set(ready)
                self.is_filtered = listing.is_filtered
                self._drift.read(listing.index)
                return
        raise ConsulFiltered(f"node {self._node.name} is not shown with its services")

    async def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield those of these services that exist now; raises a `ConsulError`.

        Raises `ConsulFiltered` if one of them is neither shown nor said to be absent.
        """
        checked = [service_id for service_id in ids if service_id in self._checked]
        checks, _ = await self._transactions.read(
            [self._operations.get_check(check_id(service_id)) for service_id in checked]
        )
        ready = {one.check.service_id: one.check.is_passing for one in checks if one.check is not None}
        gets = [self._operations.get_service(service_id) for service_id in ids]
        try:
            found, _ = await self._transactions.read(gets)
        except ConsulFiltered as error:
            raise ConsulFiltered(f"{error}: of {', '.join(ids[:MOST_NAMED])}") from None
        for one in found:
            # The catalog ignores the case of IDs, so the record may be another's under a like ID.
            service = self._meta_keys.decode(decode_listed(one.service))
            yield replace(service, ready=ready.get(service.id))

    async def register(self, services: Sequence[Service]) -> Written:
        """Write services: index 0 creates, another replaces the record of that index and no other."""
        if not self._node.is_proven and await self._node.prove():
            self._drift.wrote(0)
        bare: list[str] = []
        checked: list[str] = []

        def put(service: Service) -> Unit:
            has_check = service.id in self._checked
            if service.ready is not None:
                checked.append(service.id)
            elif has_check:
                bare.append(service.id)
            named = self._meta_keys.encode(service) if self._meta_keys.renamed else service
            return self._operations.put(named, has_check=has_check)

        written = await self._write(services, put)
        with self._drift.writing():
            await self._renames.settle(written)
        self._checked.difference_update(one for one in bare if one in written.indexes)
        self._checked.update(one for one in checked if one in written.indexes)
        return written

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Remove services, each only while its record is the one of its index; one that is gone is stale."""
        written = await self._write(services, self._operations.remove)
        self._drift.wrote(0)  # a delete does not tell its index
        self._renames.forget(one.id for one in services)
        return written

    async def drift(self) -> Drift:
        """Return whether others may have changed the node since the last full read; raises a `ConsulError`."""
        return Drift.CHANGED if await self._drift.has_drifted() else Drift.NONE

    async def is_name_taken(self, name: str) -> bool:
        """Return whether an instance on any node has this name and no registrar wrote it.

        Raises a `ConsulError`: `ConsulForbidden` or `ConsulFiltered` where the token may not see them. Consul
        before 1.13 says nothing and shows an empty list.
        """
        return await has_foreign_instance(self._client, name, self._meta_keys, self._is_of_a_registrar)

    async def lost_shards(self) -> Mapping[str, str]:
        """Return none: a node of the catalog has no shards but those of its services."""
        return {}

    async def _write(self, services: Sequence[Service], unit: Callable[[Service], Unit]) -> Written:
        with self._drift.writing() as newest:
            written = await write_all(
                self._transactions,
                map(unit, services),
                concurrency=self._client.health.concurrency(self.concurrency),
                blame=self._blame,
                restore_node=self._restore_node,
                rename=self._renames.rename,
            )
        unchanged = {one.index for one in services}  # a write that changes nothing keeps the index
        for index in sorted(set(written.indexes.values())):
            self._drift.wrote(index, 0 if index in unchanged else newest)
        return written

    async def _write_apart(self, units: Iterable[Unit]) -> Written:
        """Make the writes that renames consist of."""
        try:
            return await write_all(
                self._transactions, units, concurrency=1, blame=self._blame, restore_node=self._restore_node
            )
        finally:
            self._drift.wrote(0)

    async def _restore_node(self) -> None:
        if await self._node.restore():
            self._drift.wrote(0)

    async def _is_proven_empty(self, listing: RecordStream) -> bool:
        """Return True if the node is proven empty; otherwise it is hidden, or was made a moment ago."""
        node = node_of(listing)
        if node is not None:
            self._node.verify(node)
        if listing.is_filtered:
            raise ConsulFiltered(f"the token may not see the services of node {self._node.name}")
        # A hidden node looks like a missing one here; asked for it by name, Consul says which it is.
        return node is not None or await self._node.is_missing()
