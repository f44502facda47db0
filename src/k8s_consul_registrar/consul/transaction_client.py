"""Transactions over a client: sent, and their answers checked."""

from collections.abc import Mapping, Sequence

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.health import ConsulAnswer
from k8s_consul_registrar.consul.records import CONSISTENT, scope_of_nodes
from k8s_consul_registrar.consul.transactions import (
    MOST_OPERATIONS,
    PATH,
    CheckRecord,
    NodeRecord,
    Operations,
    ReadResult,
    TxnError,
    body_of,
    decode_read,
    decode_written,
    operations_allowed,
)
from k8s_consul_registrar.errors import ConsulFiltered, ConsulRefused

ODD = "/v1/txn does not answer as Consul does"


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
        """Read what `get` operations name; return it, and the positions of what is not there.

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

    async def read_node(self, operations: Operations) -> NodeRecord | None:
        """Return the node of these operations, None if there is none.

        Raises a `ConsulError`, `ConsulFiltered` for a node that the token may not see.
        """
        try:
            found, absent = await self.read([operations.get_node()])
        except ConsulFiltered:
            name = operations.node
            raise ConsulFiltered(f'node {name} is not shown: the token lacks node "{name}" read') from None
        if absent:
            return None
        if (node := found[0].node) is None:
            raise ConsulRefused(ODD)
        return node

    async def read_node_check(self, operations: Operations, name: str) -> CheckRecord | None:
        """Return a check of the whole node, None if there is none; raises a `ConsulError`."""
        scope = scope_of_nodes(self.client)
        found, absent = await self.read([operations.get_node_check(name, scope.get("ns", ""))], scope)
        if absent:
            return None
        if (check := found[0].check) is None:
            raise ConsulRefused(ODD)
        return check

    async def write(self, operations: Sequence[bytes]) -> tuple[dict[str, int], Sequence[TxnError]]:
        """Send one transaction; raises a `ConsulError`.

        Returns the new index of each service by ID, or the errors. Where a request is sent again and the
        first was carried out after all, that shows as stale indexes.
        """
        answer = await self._request(operations, {}, is_read=False)
        indexes, errors = decode_written(answer.body)
        _check(answer, errors, len(operations))
        return indexes, errors

    async def _read(
        self, operations: Sequence[bytes], scope: Mapping[str, str]
    ) -> tuple[Sequence[ReadResult], Sequence[TxnError]]:
        answer = await self._request(operations, {**CONSISTENT, **scope}, is_read=True)
        results, errors, is_filtered = decode_read(answer.body)
        _check(answer, errors, len(operations))
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


def _check(answer: ConsulAnswer, errors: Sequence[TxnError], operations: int) -> None:
    """See that an answer is a success exactly when nothing fails, and that errors name operations sent."""
    is_success = answer.status == 200
    if is_success == bool(errors) or any(not 0 <= error.op_index < operations for error in errors):
        raise ConsulRefused(ODD, answer.status)
