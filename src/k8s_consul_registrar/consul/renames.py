"""Renames of services where Consul never changes a name: the record is removed and created again.

Consul 2.0 and later refuse a transaction in which a service has another name than the record under its ID
(hashicorp/consul#23560), also one that removes the record first. So a rename is two transactions.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from msgspec.structs import replace

from k8s_consul_registrar.consul.batches import Transactions
from k8s_consul_registrar.consul.codec import decode_listed
from k8s_consul_registrar.consul.transactions import Operations, Unit, check_id
from k8s_consul_registrar.model import Service, WriteFailure, Written

# Removed records that are remembered; an outage interrupts far fewer renames.
MOST_REMEMBERED = 2000


class Renames:
    """The renames of one node's services; a record is kept in memory until its replacement is acknowledged.

    If Consul refuses the replacement, the record is created again as it was. After a crash between the two
    transactions the next resync creates what is missing.
    """

    def __init__(
        self,
        transactions: Transactions,
        operations: Operations,
        write: Callable[[Iterable[Unit]], Awaitable[Written]],
    ) -> None:
        """Make the renames; `write` makes writes that rename nothing."""
        self._transactions = transactions
        self._operations = operations
        self._write = write
        self._removed: dict[str, Service] = {}

    async def rename(self, units: Sequence[Unit]) -> Written:
        """Replace the very records that the units name; raises a `ConsulError`.

        A cancellation waits for the second transaction, which the services would otherwise lack.
        """
        task = asyncio.create_task(self._rename(units))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            try:
                await asyncio.gather(task, return_exceptions=True)
            finally:
                task.cancel()
            raise

    async def settle(self, written: Written) -> None:
        """Forget the records whose replacements were made, and restore those whose replacements were refused.

        Raises a `ConsulError`; then what was not restored is remembered.
        """
        if not self._removed:
            return
        self.forget([*written.indexes, *written.stale])
        refused = [failure.id for failure in written.failures if failure.id in self._removed]
        if refused:
            restored = await self._write(self._created(self._removed[one] for one in refused))
            self.forget([*restored.indexes, *restored.stale])

    def forget(self, ids: Iterable[str]) -> None:
        """Forget the removed records of these IDs, because others took their place or none is wanted."""
        for service_id in ids:
            self._removed.pop(service_id, None)

    async def _rename(self, units: Sequence[Unit]) -> Written:
        before = await self._read(units)
        renamed = [unit.service for unit in units if unit.service.id in before]
        for service_id, service in before.items():
            self._removed.pop(service_id, None)
            self._removed[service_id] = service
        for service_id in tuple(self._removed)[:-MOST_REMEMBERED]:
            del self._removed[service_id]
        removed = await self._write(map(self._operations.remove, before.values()))
        left = {*removed.stale, *(failure.id for failure in removed.failures)}
        self.forget(left)
        created = await self._write(self._created(one for one in renamed if one.id not in left))
        await self.settle(created)
        changed = (unit.service.id for unit in units if unit.service.id not in before)
        return Written(
            created.done,
            (*removed.failures, *(_as_refused(failure) for failure in created.failures)),
            created.indexes,
            (*changed, *removed.stale, *created.stale),
        )

    async def _read(self, units: Sequence[Unit]) -> dict[str, Service]:
        """Return the records that the units name, with their checks, unless another writer changed them."""
        indexes = {unit.service.id: unit.service.index for unit in units}
        found, _ = await self._transactions.read([self._operations.get_service(one) for one in indexes])
        records = [decode_listed(one.service) for one in found if bytes(one.service)]
        current = {one.id: one for one in records if indexes.get(one.id) == one.index}
        found, _ = await self._transactions.read(
            [self._operations.get_check(check_id(one)) for one in current]
        )
        checks = {one.check.service_id: one.check.is_passing for one in found if one.check is not None}
        return {one.id: replace(one, ready=checks.get(one.id)) for one in current.values()}

    def _created(self, services: Iterable[Service]) -> Iterable[Unit]:
        # The checks of a service go with it.
        return (self._operations.put(replace(one, index=0), has_check=False) for one in services)


def _as_refused(failure: WriteFailure) -> WriteFailure:
    return WriteFailure(failure.id, f"the service cannot be renamed, so it keeps its name: {failure.problem}")
