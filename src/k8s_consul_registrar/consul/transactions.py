"""Sends transactions: reads, and writes whose failing operations do not hold up the rest."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from k8s_consul_registrar.backoff import Timing, delays
from k8s_consul_registrar.consul.answers import Answer
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.parallel import for_each
from k8s_consul_registrar.consul.txn import MOST_OPERATIONS, Unit, body_of, pack
from k8s_consul_registrar.consul.txn_answer import ReadResult, TxnError, decode_read, decode_written
from k8s_consul_registrar.errors import ConsulBusy, ConsulRefused
from k8s_consul_registrar.model import WriteFailure, Written

PATH = "/v1/txn"
# A write for which Consul is too busy is sent so often in all before the whole batch gives up.
ATTEMPTS = 4
# These say that the request as such cannot be read or is too large; half of it may be neither.
SPLIT_ON = (400, 413)


class Transactions:
    """Consul's transactions over one client."""

    def __init__(self, client: ConsulClient, timing: Timing) -> None:
        self._client = client
        self._timing = timing

    async def read(self, operations: Sequence[bytes]) -> tuple[list[ReadResult], set[int]]:
        """Read what `get` operations name; return it, and the positions of what is not there.

        What the token may not see is in neither. Raises a `ConsulError`.
        """
        found: list[ReadResult] = []
        absent: set[int] = set()
        for start in range(0, len(operations), MOST_OPERATIONS):
            positions = range(start, min(start + MOST_OPERATIONS, len(operations)))
            while left := [position for position in positions if position not in absent]:
                results, errors = await self._read([operations[position] for position in left])
                if not errors:
                    found.extend(results)
                    break
                absent.update(left[error.op_index] for error in errors)
        return found, absent

    async def write(self, operations: Sequence[bytes]) -> tuple[dict[str, int], Sequence[TxnError]]:
        """Send one transaction, again while Consul is too busy for it; raises a `ConsulError`.

        Returns the new index of each service by ID, or the errors. A first attempt that was made after all
        shows as stale indexes.
        """
        body = body_of(operations)
        waits = delays(self._timing.retry_first, self._timing.retry_cap)
        for left in reversed(range(ATTEMPTS)):
            try:
                answer = await self._client.request("PUT", PATH, body=body, accepts=(200, 409))
            except ConsulBusy as busy:
                if not left:
                    raise
                await asyncio.sleep(min(max(next(waits), busy.retry_after or 0.0), self._timing.retry_cap))
            else:
                indexes, errors = decode_written(answer.body)
                _check(answer, errors, len(operations))
                return indexes, errors
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _read(self, operations: Sequence[bytes]) -> tuple[Sequence[ReadResult], Sequence[TxnError]]:
        answer = await self._client.request(
            "PUT", PATH, params={"consistent": ""}, body=body_of(operations), accepts=(200, 409)
        )
        results, errors = decode_read(answer.body)
        _check(answer, errors, len(operations))
        for error in errors:
            if not error.is_absent:
                raise ConsulRefused(f"a read in a transaction fails: {error.what}", answer.status)
        return results, errors


async def write_all(
    transactions: Transactions,
    units: Iterable[Unit],
    *,
    concurrency: int,
    restore_node: Callable[[], Awaitable[None]],
) -> Written:
    """Make every unit's writes; `restore_node` is awaited when Consul says that the node is missing.

    Raises a `ConsulError` when Consul cannot be used; then what became of the writes under way is not
    known, so everything is to be read again.
    """
    batches = _Batches(transactions, restore_node)
    await for_each(pack(units), batches.settle, concurrency)
    return batches.written()


class _Batches:
    """What becomes of the batches of one call."""

    def __init__(
        self,
        transactions: Transactions,
        restore_node: Callable[[], Awaitable[None]],
    ) -> None:
        self._transactions = transactions
        self._restore_node = restore_node
        self._done = 0
        self._failures: list[WriteFailure] = []
        self._stale: list[str] = []
        self._indexes: dict[str, int] = {}

    def written(self) -> Written:
        """Return what came of it."""
        return Written(self._done, tuple(self._failures), self._indexes, tuple(self._stale))

    async def settle(self, batch: list[Unit]) -> None:
        """See one batch through, apart from what is told to fail; raises a `ConsulError`."""
        pending = [batch]
        was_restored = False
        while pending:
            units = pending.pop()
            try:
                errors = await self._attempt(units)
            except ConsulRefused as refused:
                pending.extend(self._halves(units, refused))
                continue
            if any(error.is_node_missing for error in errors):
                if was_restored:
                    raise ConsulRefused("the node is missing again right after it was made", 409)
                was_restored = True
                await self._restore_node()
                pending.append(units)
            elif errors and (left := self._without_failing(units, errors)):
                pending.append(left)

    async def _attempt(self, units: list[Unit]) -> Sequence[TxnError]:
        operations = [operation for unit in units for operation in unit.operations]
        indexes, errors = await self._transactions.write(operations)
        if not errors:
            self._done += len(units)
            self._indexes.update(indexes)
        return errors

    def _halves(self, units: list[Unit], refused: ConsulRefused) -> list[list[Unit]]:
        if refused.status not in SPLIT_ON:
            raise refused
        if len(units) == 1:
            self._failures.append(WriteFailure(units[0].service.id, str(refused)))
            return []
        middle = len(units) // 2
        return [units[middle:], units[:middle]]

    def _without_failing(self, units: list[Unit], errors: Sequence[TxnError]) -> list[Unit]:
        """Tell what fails of the units that do, and return the others."""
        owners = [unit.service.id for unit in units for _ in unit.operations]
        stale = dict.fromkeys(owners[error.op_index] for error in errors if error.is_stale)
        problems = {owners[error.op_index]: error.what for error in errors}
        self._stale.extend(stale)
        self._failures.extend(
            WriteFailure(service_id, what) for service_id, what in problems.items() if service_id not in stale
        )
        return [unit for unit in units if unit.service.id not in problems]


def _check(answer: Answer, errors: Sequence[TxnError], operations: int) -> None:
    """See that an answer is a success exactly when nothing fails, and that errors name operations sent."""
    is_success = answer.status == 200
    if is_success == bool(errors) or any(not 0 <= error.op_index < operations for error in errors):
        raise ConsulRefused("/v1/txn does not answer as Consul does", answer.status)
