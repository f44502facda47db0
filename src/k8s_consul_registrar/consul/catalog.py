"""The registry of a synthetic node of Consul's catalog, written by transactions."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

from msgspec.structs import replace

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.codec import decode_listed
from k8s_consul_registrar.consul.listing import (
    Listing,
    list_checks,
    list_services,
    node_of,
    read_readiness,
)
from k8s_consul_registrar.consul.meta_keys import MetaKeys
from k8s_consul_registrar.consul.node import SyntheticNode
from k8s_consul_registrar.consul.transactions import Transactions, write_all
from k8s_consul_registrar.consul.txn import Operations, Unit, check_id
from k8s_consul_registrar.consul.watch import NodeWatch
from k8s_consul_registrar.errors import ConsulFiltered
from k8s_consul_registrar.model import Disturbance, Service, Written

# Transactions in flight. Four keep a Consul of two cores busy; twice as many do so too while we are slow to
# answer because a list streams in (8,200 services: 1.09 s in all, 1.14 s with 4; 12 gained nothing more).
CONCURRENCY = 8


class CatalogRegistry:
    """Reads and writes the services of one node, each only over the very record that was read.

    A read that ACLs filter cannot lead to harm: a service we do not see is never overwritten, since a
    write without an index creates or is stale, and nothing is removed but by the index that was read. Only a
    read that shows nothing at all because the node is hidden is `ConsulFiltered`.
    """

    checks_versions = True

    def __init__(
        self,
        client: ConsulClient,
        node_name: str,
        *,
        concurrency: int = CONCURRENCY,
        timing: Timing = Timing(),  # noqa: B008 - an immutable value
        meta_keys: MetaKeys = MetaKeys(),  # noqa: B008 - the same
    ) -> None:
        self._client = client
        self._concurrency = concurrency
        self._meta_keys = meta_keys
        self._operations = Operations(node_name, client.namespace, client.partition)
        self._transactions = Transactions(client, timing)
        self._node = SyntheticNode(self._transactions, self._operations)
        self._watch = NodeWatch(client)
        self._checked: set[str] = set()  # IDs that have a check of ours, as far as we know

    async def services(self) -> AsyncIterator[Service]:
        """Yield every service of the node, whoever wrote it, none where there is no node.

        They are decoded one by one as they arrive, and none is kept. Raises a `ConsulError`; then what was
        yielded is not all.
        """
        await self._watch.begin(self._node.name)
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
        if not is_verified:
            await self._prove_empty(listing)
        self._checked = set(ready)
        self._watch.read(listing.index)

    async def lookup(self, ids: Sequence[str]) -> AsyncIterator[Service]:
        """Yield those of these services that exist now; raises a `ConsulError`.

        Raises `ConsulFiltered` for a service that is neither shown nor said to be absent.
        """
        checked = [service_id for service_id in ids if service_id in self._checked]
        checks, _ = await self._transactions.read(
            [self._operations.get_check(check_id(service_id)) for service_id in checked]
        )
        ready = {one.check.service_id: one.check.is_passing for one in checks if one.check is not None}
        found, absent = await self._transactions.read(
            [self._operations.get_service(service_id) for service_id in ids]
        )
        services = [self._meta_keys.decode(decode_listed(one.service)) for one in found if bytes(one.service)]
        hidden = set(ids).difference(
            (service.id for service in services), (ids[position] for position in absent)
        )
        if hidden:
            raise ConsulFiltered(f"the token may not see {len(hidden)} services, {min(hidden)} among them")
        for service in services:
            yield replace(service, ready=ready.get(service.id))

    async def register(self, services: Iterable[Service]) -> Written:
        """Write services: index 0 creates, another replaces the record of that index and no other."""
        if await self._node.prove():
            self._watch.wrote(0)
        bare: list[str] = []
        checked: list[str] = []

        def put(service: Service) -> Unit:
            has_check = service.id in self._checked
            if service.ready is not None:
                checked.append(service.id)
            elif has_check:
                bare.append(service.id)
            return self._operations.put(self._meta_keys.encode(service), has_check=has_check)

        written = await self._write(services, put)
        self._checked.difference_update(one for one in bare if one in written.indexes)
        self._checked.update(one for one in checked if one in written.indexes)
        return written

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Remove services, each only while its record is the one of its index; one that is gone is stale."""
        written = await self._write(services, self._operations.remove)
        self._watch.wrote(0)  # a delete does not tell its index
        return written

    async def disturbance(self) -> Disturbance:
        """Return whether somebody else may have changed the node since the last full read; raises a `ConsulError`."""
        return Disturbance.CHANGED if await self._watch.is_disturbed() else Disturbance.NONE

    async def lost_shards(self) -> Mapping[str, str]:
        """Return none: whatever the node shows is held here."""
        return {}

    async def _write(self, services: Iterable[Service], unit: Callable[[Service], Unit]) -> Written:
        with self._watch.writing():
            written = await write_all(
                self._transactions,
                map(unit, services),
                concurrency=self._concurrency,
                restore_node=self._restore_node,
            )
        for index in sorted(set(written.indexes.values())):
            self._watch.wrote(index)
        return written

    async def _restore_node(self) -> None:
        if await self._node.restore():
            self._watch.wrote(0)

    async def _prove_empty(self, listing: Listing) -> None:
        node = node_of(listing)
        if node is not None:
            self._node.verify(node)
        if listing.is_filtered:
            raise ConsulFiltered(f"the token may not see the services of node {self._node.name}")
        # A hidden node looks like a missing one here; asked for it by name, Consul says which it is.
        if node is None and not await self._node.is_missing():
            raise ConsulFiltered(f"node {self._node.name} is not shown with its services")
