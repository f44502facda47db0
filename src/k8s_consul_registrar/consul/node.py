"""The catalog's synthetic node, which no agent answers for: made, verified, and removed for a complete uninstallation.

Meta `external-node` says so to consul-esm, `managed_by` says that we made it, and `external-probe` is never set:
consul-esm removes a node that it cannot probe, with all its services, after 72 hours. After it was created the record is
written at most once per start, for `selection`, because each change of a node wakes every watcher of every service on
it (consul 1.8 `agent/consul/state/catalog.go`).
"""

import asyncio
import secrets
from collections.abc import Sequence

from k8s_consul_registrar.consul.acl import Right, rights
from k8s_consul_registrar.consul.batches import Transactions
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.records import NODES_NAMESPACE, is_node_empty, scope_of_nodes
from k8s_consul_registrar.consul.transactions import ODD, CheckRecord, NodeRecord, Operations, TxnError
from k8s_consul_registrar.errors import ConsulFiltered, ConsulForbidden, ConsulRefused
from k8s_consul_registrar.model import MANAGED_BY, SERF_HEALTH

ADDRESS = "127.0.0.1"
META = {"external-node": "true", "managed_by": MANAGED_BY}
# Consul's UI lists no synthetic node among those that run something (since 1.14).
CREATED_META = {**META, "synthetic-node": "true"}
# In the meta of our node: the digest of the selection that its services were written under.
SELECTION = "selection"
# In the meta of a node that is about to go; each time another value.
MARK = "removal"
# The meta of our node in versions that did not name its owner.
FORMER_META = {"external-node": "true"}
# A name that no service has, to ask whether the token may see other tools' services.
UNUSED_NAME = "k8s-consul-registrar-purge"


async def read_node(transactions: Transactions, operations: Operations) -> NodeRecord | None:
    """Return the node of these operations, None if there is none.

    Raises a `ConsulError`, `ConsulFiltered` for a node that the token may not see.
    """
    try:
        found, absent = await transactions.read([operations.get_node()])
    except ConsulFiltered:
        name = operations.node
        raise ConsulFiltered(f'node {name} is not shown: the token lacks node "{name}" read') from None
    if absent:
        return None
    if (node := found[0].node) is None:
        raise ConsulRefused(ODD)
    return node


async def read_node_check(
    transactions: Transactions, operations: Operations, name: str
) -> CheckRecord | None:
    """Return a check of the whole node, None if there is none; raises a `ConsulError`."""
    scope = scope_of_nodes(transactions.client)
    found, absent = await transactions.read([operations.get_node_check(name, scope.get("ns", ""))], scope)
    if absent:
        return None
    if (check := found[0].check) is None:
        raise ConsulRefused(ODD)
    return check


def is_made_by_a_registrar(node: NodeRecord) -> bool:
    """Return whether a node is a synthetic one that says that a registrar made it."""
    meta = node.meta or {}
    is_synthetic = not node.id and node.address == ADDRESS and meta.get("external-node") == "true"
    return is_synthetic and meta.get("managed_by") == MANAGED_BY


class SyntheticNode:
    """One node, created where it is missing and changed at most once, to record the selection."""

    def __init__(self, transactions: Transactions, operations: Operations, selection: str) -> None:
        self._transactions = transactions
        self._operations = operations
        self._selection = selection
        self.is_proven = False
        self._proving = asyncio.Lock()
        self._is_recorded = not selection
        # True once our own selection at the node may be this process's own record.
        self._may_have_recorded = False
        self.recorded = ""

    @property
    def name(self) -> str:
        """The node's name."""
        return self._operations.node

    async def prove(self) -> bool:
        """Make sure, once, that the node is ours to fill; tell whether it had to be created.

        Raises `ConsulRefused` naming CONSUL_NODE_NAME for a node that an agent or another program keeps.
        """
        async with self._proving:
            is_created = not self.is_proven and await self.restore()
            self.is_proven = True
            return is_created

    async def restore(self) -> bool:
        """Create the node unless it is there, and tell whether; raises as `prove` does."""
        if not await self.is_missing():
            return False
        await self._create()
        if await self.is_missing():
            raise ConsulRefused(f"{self._named} vanishes as soon as it is made", 409)
        return True

    async def is_missing(self) -> bool:
        """Return whether there is no node of this name; raises unless one that is there is ours to fill.

        An answer that leaves the node out without saying that it is not there proves nothing: the token may
        not see it, which is `ConsulFiltered`.
        """
        node = await read_node(self._transactions, self._operations)
        if node is None:
            return True
        self.verify(node)
        if await read_node_check(self._transactions, self._operations, SERF_HEALTH) is not None:
            raise ConsulRefused(f"{self._named} is an agent's, which would remove what it does not know")
        return False

    def verify(self, record: NodeRecord) -> None:
        """Verify that a record of this name is a synthetic node's; raises `ConsulRefused`."""
        meta = record.meta or {}
        if meta.get("external-node") != "true":
            raise ConsulRefused(
                f"{self._named} is a node that another program keeps (no external-node in meta)"
            )
        if meta.get("external-probe") == "true":
            raise ConsulRefused(f"{self._named} has external-probe, so consul-esm would remove it in the end")
        found = meta.get(SELECTION, "") if is_made_by_a_registrar(record) else ""
        if not (self._may_have_recorded and found == self._selection):
            self.recorded = found

    async def record(self) -> bool:
        """Write the selection into the node's meta if it differs; return whether that took a write."""
        if self._is_recorded:
            return False
        node = await read_node(self._transactions, self._operations)
        if node is None:
            return False
        meta = node.meta or {}
        errors: Sequence[TxnError] = ()
        is_due = meta.get(SELECTION) != self._selection and is_made_by_a_registrar(node)
        if is_due:
            self._may_have_recorded = True
            write = self._operations.put_node(
                ADDRESS, {**meta, SELECTION: self._selection}, index=node.modify_index
            )
            # A record that changed meanwhile stays as another writer left it.
            _, errors = await self._transactions.write([write])
        self._is_recorded = True
        return is_due and not errors

    async def _create(self) -> None:
        meta = {**CREATED_META, SELECTION: self._selection} if self._selection else CREATED_META
        self._may_have_recorded = True
        _, errors = await self._transactions.write([self._operations.put_node(ADDRESS, meta)])
        # A node that another writer created meanwhile will do, and is verified next.
        for error in errors:
            if not error.is_stale:
                raise ConsulForbidden(f"{self._named} cannot be created: {error.what}")

    @property
    def _named(self) -> str:
        return f"CONSUL_NODE_NAME {self.name}"


class NodeRemoval:
    """The removal of one synthetic node that we made, once nothing is on it; each raises a `ConsulError`.

    To remove a node is to remove every service on it, and no transaction can ask that there be none: a node's
    ModifyIndex stays as it is when services come (seen on 1.8.7). So the record is changed first. A writer
    that then registers a service together with the node, as `/v1/catalog/register` usually is used, changes
    the record back, which the removal by `delete-cas` notices. What is left is a service that is written
    alone, within the milliseconds between the last look and the removal: its registrar finds it gone and
    repeats it.
    """

    def __init__(
        self, client: ConsulClient, transactions: Transactions, node: str, *, has_our_name: bool
    ) -> None:
        self._client = client
        self._transactions = transactions
        self._operations = Operations(node, client.namespace, client.partition)
        self._has_our_name = has_our_name

    async def obstacle(self) -> str:
        """Say why the node is not ours to remove, apart from what is on it; empty where it is."""
        record = await self._read()
        if record is None:
            return "it is not there"
        is_former = self._has_our_name and not record.id and record.address == ADDRESS
        if not is_made_by_a_registrar(record) and not (is_former and record.meta == FORMER_META):
            return "it is not of our making"
        try:
            sees = await rights(self._client, self._needed())
        except ConsulRefused as error:
            return f"whether the token sees the services of others cannot be asked: {error}"
        return (
            "the token may not see the services of others, which would go with it"
            if sees is not None and not all(sees)
            else ""
        )

    def _needed(self) -> list[Right]:
        """Return the rights to see others' services; a token of one namespace has none in the default one."""
        elsewhere = [NODES_NAMESPACE] if self._client.namespace else []
        return [Right("service", UNUSED_NAME, "read", one) for one in ("", *elsewhere)]

    async def remove(self) -> str:
        """Remove it if it is ours and empty; say why it stays, empty where it went."""
        if obstacle := await self.obstacle():
            return obstacle
        if await self.is_used():
            return "there are services or checks of others on it"
        before = await self._read()
        if before is None:
            return ""
        marked = await self._mark(before)
        if marked is None:
            return "another program changes it"
        if await self.is_used():
            await self._transactions.write(
                [self._operations.put_node(ADDRESS, {**META, **(before.meta or {})}, marked)]
            )
            return "another program registers services on it"
        _, errors = await self._transactions.write([self._operations.remove_node(marked)])
        return "another program changes it" if errors else ""

    async def is_used(self) -> bool:
        """Return whether anything is on it, or may be, in any namespace."""
        return not await is_node_empty(self._client, self._operations.node)

    async def _mark(self, before: NodeRecord) -> int | None:
        """Change the record from what was read, and return its index; None where it is another's by now."""
        mark = secrets.token_hex(8)
        write = self._operations.put_node(
            ADDRESS, {**META, **(before.meta or {}), MARK: mark}, before.modify_index
        )
        _, errors = await self._transactions.write([write])
        record = None if errors else await self._read()
        if record is None or (record.meta or {}).get(MARK) != mark:
            return None
        return record.modify_index

    async def _read(self) -> NodeRecord | None:
        return await read_node(self._transactions, self._operations)
