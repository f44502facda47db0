"""The synthetic node that catalog services hang on: a record of its own that no agent answers for.

Meta `external-node` says so to consul-esm, `managed_by` says that it is of our making, and `external-probe` is never set: consul-esm removes what it
probes in vain, with all its services, after 72 hours. The record is written once and left alone, because
each change of a node wakes every watcher of every service on it (consul 1.8 `agent/consul/state/catalog.go`).
"""

from k8s_consul_registrar.consul.transactions import Transactions
from k8s_consul_registrar.consul.txn import SERF_HEALTH, Operations
from k8s_consul_registrar.consul.txn_answer import NodeRecord
from k8s_consul_registrar.errors import ConsulFiltered, ConsulForbidden, ConsulRefused
from k8s_consul_registrar.model import MANAGED_BY

ADDRESS = "127.0.0.1"
META = {"external-node": "true", "managed_by": MANAGED_BY}


class SyntheticNode:
    """One node, created where it is missing and never changed."""

    def __init__(self, transactions: Transactions, operations: Operations) -> None:
        self._transactions = transactions
        self._operations = operations
        self._is_proven = False

    @property
    def name(self) -> str:
        """The node's name."""
        return self._operations.node

    async def prove(self) -> bool:
        """Make sure, once, that the node is ours to fill; tell whether it had to be created.

        Raises `ConsulRefused` naming CONSUL_NODE_NAME for a node that an agent or somebody else keeps.
        """
        if self._is_proven:
            return False
        is_created = await self.restore()
        self._is_proven = True
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
        """Whether there is no node of this name; raises unless one that is there is ours to fill.

        An answer that leaves the node out without saying that it is not there proves nothing: the token may
        not see it, which is `ConsulFiltered`.
        """
        found, absent = await self._transactions.read([self._operations.get_node()])
        if absent:
            return True
        if not found or found[0].node is None:
            raise ConsulFiltered(f'{self._named} is not shown: the token lacks node "{self.name}" read')
        self.verify(found[0].node)
        checks, _ = await self._transactions.read([self._operations.get_check(SERF_HEALTH)])
        if checks:
            raise ConsulRefused(f"{self._named} is an agent's, which would remove what it does not know")
        return False

    def verify(self, record: NodeRecord) -> None:
        """See that a record of this name is a synthetic node's; raises `ConsulRefused`."""
        meta = record.meta or {}
        if meta.get("external-node") != "true":
            raise ConsulRefused(
                f"{self._named} is a node that somebody else keeps (no external-node in meta)"
            )
        if meta.get("external-probe") == "true":
            raise ConsulRefused(f"{self._named} has external-probe, so consul-esm would remove it in the end")

    async def _create(self) -> None:
        _, errors = await self._transactions.write([self._operations.put_node(ADDRESS, META)])
        # One that somebody else created meanwhile is as good, and verified next.
        for error in errors:
            if not error.is_stale:
                raise ConsulForbidden(f"{self._named} cannot be created: {error.what}")

    @property
    def _named(self) -> str:
        return f"CONSUL_NODE_NAME {self.name}"
