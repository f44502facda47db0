"""Removal of the catalog's synthetic node, for a complete uninstallation."""

import secrets

from k8s_consul_registrar.consul.acl import Right, rights
from k8s_consul_registrar.consul.catalog import ADDRESS, META, is_made_by_a_registrar
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.records import NODES_NAMESPACE, is_node_empty
from k8s_consul_registrar.consul.transaction_client import Transactions
from k8s_consul_registrar.consul.transactions import NodeRecord, Operations
from k8s_consul_registrar.errors import ConsulRefused

# In the meta of a node that is about to go; each time another value.
MARK = "removal"
# The meta of our node in versions that did not name its owner.
FORMER_META = {"external-node": "true"}
# A name that no services have, for asking whether others' would be seen.
UNUSED_NAME = "k8s-consul-registrar-purge"


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
            return "somebody else changes it"
        if await self.is_used():
            await self._transactions.write(
                [self._operations.put_node(ADDRESS, {**META, **(before.meta or {})}, marked)]
            )
            return "somebody else registers services on it"
        _, errors = await self._transactions.write([self._operations.remove_node(marked)])
        return "somebody else changes it" if errors else ""

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
        return await self._transactions.read_node(self._operations)
