"""Many writes: single requests with bounded concurrency, or transactions, and the outcome of each service."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TypeVar

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.health import TOO_MANY_REQUESTS, ConsulAnswer, ConsulHealth
from k8s_consul_registrar.consul.records import CONSISTENT
from k8s_consul_registrar.consul.transactions import (
    MOST_OPERATIONS,
    PATH,
    ReadResult,
    TxnError,
    Unit,
    body_of,
    check_answer,
    decode_read,
    decode_written,
    operations_allowed,
    pack,
)
from k8s_consul_registrar.errors import (
    ConsulBusy,
    ConsulError,
    ConsulFiltered,
    ConsulForbidden,
    ConsulRefused,
    ConsulTokenUnknown,
)
from k8s_consul_registrar.model import Service, WriteFailure, Written

# This many 5xx in a row are Consul's trouble, not that of the services at hand.
MOST_FAULTS_IN_A_ROW = 10
# Services remembered for their last 5xx; there are few, unless Consul itself is at fault.
MOST_REMEMBERED = 1000
# These say that the request as such cannot be read or is too large; half of it may be neither.
SPLIT_ON = (400, 413)


T = TypeVar("T")


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Do the work for each item, `concurrency` at a time; the first `ConsulError` ends it and is raised."""
    left: Iterator[T] = iter(items)
    opening = list(islice(left, 2))
    if len(opening) < 2:
        # A single change, the usual case, needs no task.
        for item in opening:
            await work(item)
        return
    left = chain(opening, left)

    faults: list[ConsulError] = []
    workers: list[asyncio.Task[None]] = []

    async def worker() -> None:
        try:
            for item in left:
                await work(item)
        except ConsulError as fault:
            faults.append(fault)
            for other in workers:
                if other is not asyncio.current_task():
                    other.cancel()

    # Workers never raise: before Python 3.13 a failing child can make a TaskGroup lose a concurrent
    # cancellation (gh-116720).
    async with asyncio.TaskGroup() as group:
        workers.extend(group.create_task(worker()) for _ in range(concurrency))
    if faults:
        raise faults[0]


class Blame:
    """Tells a 5xx that one service causes from a fault of Consul's own, over all writes of a registry.

    A service is at fault if others are written while it fails: in the same call, or between two of its
    failures. It stays blamed until it is written, or until another fails as well.
    """

    def __init__(self) -> None:
        self._successes = 0
        self._failed_at: dict[str, int] = {}  # the successes so far when a service failed last
        self._blamed: set[str] = set()
        self._faults_in_a_row = 0

    def succeeded(self, ids: Iterable[str]) -> None:
        """Record services that were written."""
        self._faults_in_a_row = 0
        for service_id in ids:
            self._successes += 1
            self._failed_at.pop(service_id, None)
            self._blamed.discard(service_id)

    def is_at_fault(self, service_id: str, *, are_others_written: bool) -> bool:
        """Record a 5xx for one service; return True if it is that service's own."""
        before = self._failed_at.get(service_id, self._successes)
        if len(self._failed_at) >= MOST_REMEMBERED:
            self._failed_at.clear()
        self._failed_at[service_id] = self._successes
        if are_others_written or before < self._successes:
            self._blamed.add(service_id)
        elif service_id not in self._blamed:
            self._blamed.clear()
        return service_id in self._blamed

    def may_search(self) -> bool:
        """Record a 5xx for several services; return True if it is time to search for the one at fault.

        During an outage that reads do not show, each search is a burst of requests in vain, so it is made
        at the second fault in a row, the fourth, the eighth and so on.
        """
        self._faults_in_a_row += 1
        count = self._faults_in_a_row
        return count > 1 and count & (count - 1) == 0


class Outcomes:
    """The outcomes of the services of one call; a service that Consul refuses delays no other."""

    def __init__(self, health: ConsulHealth, blame: Blame) -> None:
        self._health = health
        self._blame = blame
        self._faults: list[tuple[str, ConsulBusy]] = []
        self._faults_in_a_row = 0
        self._stale: list[str] = []
        self._failures: list[WriteFailure] = []
        self.done: list[str] = []
        self.indexes: dict[str, int] = {}

    def succeeded(self, ids: Sequence[str]) -> None:
        """Record services that were written."""
        self._faults_in_a_row = 0
        self.done.extend(ids)
        self._blame.succeeded(ids)

    def failed(self, service_id: str, problem: str) -> None:
        """Record a service that Consul refuses."""
        self._failures.append(WriteFailure(service_id, problem))

    def stale(self, ids: Iterable[str]) -> None:
        """Record services whose record is not the one that was named."""
        self._stale.extend(ids)

    def fault(self, error: ConsulBusy, service_id: str = "") -> None:
        """Record a 5xx, of one service if named; raises it, or a 429, where it is surely Consul's own."""
        self._faults_in_a_row += 1
        if error.status == TOO_MANY_REQUESTS or self._faults_in_a_row > MOST_FAULTS_IN_A_ROW:
            raise error
        if service_id:
            self._faults.append((service_id, error))

    def add(self, units: Sequence[Unit], written: Written) -> None:
        """Record the outcomes of services that were written apart."""
        self._failures.extend(written.failures)
        self.stale(written.stale)
        left = {*written.stale, *(failure.id for failure in written.failures)}
        self.succeeded([unit.service.id for unit in units if unit.service.id not in left])
        self.indexes.update(written.indexes)

    def written(self) -> Written:
        """Return the outcomes of the call; raises a 5xx that is Consul's own."""
        for service_id, error in self._faults:
            if not self._blame.is_at_fault(service_id, are_others_written=bool(self.done)):
                raise error
            self.failed(service_id, str(error))
            self._health.excuse_write(error)
        return Written(len(self.done), tuple(self._failures), self.indexes, tuple(self._stale))


async def write_each(
    services: Iterable[Service],
    write: Callable[[Service], Awaitable[None]],
    outcomes: Outcomes,
    concurrency: int,
) -> None:
    """Write each service by itself; raises a `ConsulError` when Consul itself is at fault."""

    async def write_one(service: Service) -> None:
        try:
            await write(service)
        except ConsulTokenUnknown:
            raise
        except (ConsulRefused, ConsulForbidden) as refused:
            outcomes.failed(service.id, str(refused))
        except ConsulBusy as error:
            outcomes.fault(error, service.id)
        else:
            outcomes.succeeded([service.id])

    await for_each(services, write_one, concurrency)


class Transactions:
    """Consul's transactions over one client.

    `most_operations` is how many operations one may have: it falls when Consul refuses a transaction for their
    number, as releases before 1.14 do.
    """

    def __init__(self, client: ConsulClient) -> None:
        self.client = client
        self.most_operations = MOST_OPERATIONS

    async def read(
        self, operations: Sequence[bytes], scope: Mapping[str, str] | None = None
    ) -> tuple[list[ReadResult], set[int]]:
        """Make `get` operations; return their results, and the positions of those that found nothing.

        `scope` are parameters that stand in for the client's own namespace.
        Raises a `ConsulError`: `ConsulFiltered` if the token may not see some of it, which proves no absence.
        """
        found: list[ReadResult] = []
        absent: set[int] = set()
        start = 0
        while start < len(operations):
            most = self.most_operations
            positions = range(start, min(start + most, len(operations)))
            left = [position for position in positions if position not in absent]
            try:
                results, errors = await self._read([operations[position] for position in left], scope or {})
            except ConsulRefused:
                if self.most_operations < most:
                    continue
                raise
            absent.update(left[error.op_index] for error in errors)
            if not errors:
                found.extend(results)
            if not errors or absent.issuperset(left):
                start += most
        return found, absent

    async def write(self, operations: Sequence[bytes]) -> tuple[dict[str, int], Sequence[TxnError]]:
        """Send one transaction; raises a `ConsulError`.

        Returns the new index of each service by ID, or the errors. Where a request is sent again and the
        first was carried out after all, that shows as stale indexes.
        """
        answer = await self._request(operations, {}, is_read=False)
        indexes, errors = decode_written(answer.body)
        check_answer(answer.status, errors, len(operations))
        return indexes, errors

    async def _read(
        self, operations: Sequence[bytes], scope: Mapping[str, str]
    ) -> tuple[Sequence[ReadResult], Sequence[TxnError]]:
        answer = await self._request(operations, {**CONSISTENT, **scope}, is_read=True)
        results, errors, is_filtered = decode_read(answer.body)
        check_answer(answer.status, errors, len(operations))
        for error in errors:
            if not error.is_absent:
                raise ConsulRefused(f"a read in a transaction fails: {error.what}", answer.status)
        # Releases before 1.11 do not say that they left something out.
        if is_filtered or (not errors and len(results) < len(operations)):
            hidden = len(operations) - len(results)
            raise ConsulFiltered(f"the token may not see {hidden} of {len(operations)} records")
        return results, errors

    async def _request(
        self, operations: Sequence[bytes], params: Mapping[str, str], *, is_read: bool
    ) -> ConsulAnswer:
        body = body_of(operations)
        try:
            return await self.client.request(
                "PUT", PATH, params=params, body=body, accepts=(200, 409), is_read=is_read
            )
        except ConsulRefused as refused:
            if allowed := operations_allowed(str(refused)):
                self.most_operations = min(self.most_operations, allowed)
            raise


async def write_all(
    transactions: Transactions,
    units: Iterable[Unit],
    *,
    concurrency: int,
    blame: Blame,
    restore_node: Callable[[], Awaitable[None]],
    rename: Callable[[Sequence[Unit]], Awaitable[Written]] | None = None,
) -> Written:
    """Make every unit's writes; `restore_node` is awaited when Consul says that the node is missing.

    `rename` writes the units whose new name Consul refuses; without it they count as stale. Raises a `ConsulError` when Consul cannot be used; then what became of the writes under way is not
    known, so everything is to be read again. A service that makes Consul answer 5xx by itself is a failure of
    its own.
    """
    batches = _Batches(transactions, blame, restore_node, rename)
    batch_of = pack(units, lambda: transactions.most_operations)
    await for_each(batch_of, batches.settle, concurrency)
    return batches.outcomes.written()


class _Batches:
    """The transactions of one call."""

    def __init__(
        self,
        transactions: Transactions,
        blame: Blame,
        restore_node: Callable[[], Awaitable[None]],
        rename: Callable[[Sequence[Unit]], Awaitable[Written]] | None,
    ) -> None:
        self._transactions = transactions
        self._blame = blame
        self._restore_node = restore_node
        self._rename = rename
        self._is_searching = False
        self.outcomes = Outcomes(transactions.client.health, blame)

    async def settle(self, batch: list[Unit]) -> None:
        """Write one batch without the services that fail; raises a `ConsulError`."""
        pending = [batch]
        was_restored = False
        while pending:
            units = pending.pop()
            try:
                errors = await self._attempt(units)
            except ConsulRefused as refused:
                pending.extend(self._without_refused(units, refused))
                continue
            except ConsulBusy as fault:
                pending.extend(await self._without_fault(units, fault))
                continue
            if any(error.is_node_missing for error in errors):
                if was_restored:
                    raise ConsulRefused("the node is missing again right after it was made", 409)
                was_restored = True
                await self._restore_node()
                pending.append(units)
            elif errors:
                renamed, left = self._without_failing(units, errors)
                if left:
                    pending.append(left)
                if renamed and self._rename is not None:
                    self.outcomes.add(renamed, await self._rename(renamed))

    async def _attempt(self, units: list[Unit]) -> Sequence[TxnError]:
        operations = [operation for unit in units for operation in unit.operations]
        indexes, errors = await self._transactions.write(operations)
        if not errors:
            self.outcomes.succeeded([unit.service.id for unit in units])
            self.outcomes.indexes.update(indexes)
        return errors

    def _without_refused(self, units: list[Unit], refused: ConsulRefused) -> list[list[Unit]]:
        if refused.status not in SPLIT_ON:
            raise refused
        if len(units) > 1:
            return _halves(units)
        self.outcomes.failed(units[0].service.id, str(refused))
        return []

    async def _without_fault(self, units: list[Unit], fault: ConsulBusy) -> list[list[Unit]]:
        """Search for the one service at fault, if Consul itself looks well; raises the 5xx otherwise."""
        if len(units) == 1:
            self.outcomes.fault(fault, units[0].service.id)
            return []
        self.outcomes.fault(fault)
        if not self._is_searching:
            if not (self.outcomes.done or self._blame.may_search()):
                raise fault
            try:
                await self._transactions.client.probe(is_write_owed=True)
            except ConsulError:
                raise fault from None
            self._is_searching = True
        return _halves(units)

    def _without_failing(
        self, units: list[Unit], errors: Sequence[TxnError]
    ) -> tuple[list[Unit], list[Unit]]:
        """Record the failures of units; return the units to be renamed, and the others."""
        owners = [unit for unit in units for _ in unit.operations]
        problems = {owners[error.op_index].service.id: error.what for error in errors}
        stale: dict[str, None] = {}
        renamed: list[Unit] = []
        for error in errors:
            unit = owners[error.op_index]
            if error.is_rename and unit.replaces and self._rename is not None:
                renamed.append(unit)
            elif error.is_stale or error.is_rename:
                stale[unit.service.id] = None
        self.outcomes.stale(stale)
        settled = stale.keys() | {unit.service.id for unit in renamed}
        for service_id, what in problems.items():
            if service_id not in settled:
                self.outcomes.failed(service_id, what)
        return renamed, [unit for unit in units if unit.service.id not in problems]


def _halves(units: list[Unit]) -> list[list[Unit]]:
    """Return both halves, the first one last, since it is taken first."""
    middle = len(units) // 2
    return [units[middle:], units[:middle]]
