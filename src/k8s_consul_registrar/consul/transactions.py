"""Consul's transactions (`/v1/txn`): operations, their packing, and answers; pure.

Rules: Consul API, "Transactions", and consul 1.8 `agent/txn_endpoint.go`, `agent/consul/state/txn.go`. One
failing operation leaves everything as it was, and all that fail are named by their position. A delete has
no result; a read leaves out, without an error, what the token may not see.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.consul.codec import RaftIndex, decode
from k8s_consul_registrar.errors import ConsulRefused
from k8s_consul_registrar.model import Service

PATH = "/v1/txn"
ODD = "/v1/txn does not answer as Consul does"
MOST_OPERATIONS = 128
FORMER_MOST_OPERATIONS = 64  # before 1.14
MOST_BYTES = 512 * 1024  # limits.txn_max_req_len, its default
CHECK_NAME = "Kubernetes readiness"
# As in: Transaction contains too many operations (128 > 64).
_TOO_MANY = re.compile(r"too many operations(?: \(\d+ > (\d{1,9})\))?")

_encoder = msgspec.json.Encoder()


class Unit(msgspec.Struct, frozen=True, gc=False):
    """One service's operations, encoded; they are never split over transactions.

    `replaces` is True if they write the service over an earlier record.
    """

    service: Service
    operations: tuple[bytes, ...]
    replaces: bool = False

    @property
    def size(self) -> int:
        """Bytes, with the commas."""
        return sum(map(len, self.operations)) + len(self.operations)


class _ServiceBody(msgspec.Struct, gc=False, omit_defaults=True):
    ID: str
    Service: str = ""
    Address: str = ""
    Port: int = 0
    Meta: dict[str, str] = {}
    Tags: list[str] = []
    ModifyIndex: int = 0
    Namespace: str = ""
    Partition: str = ""


class _CheckBody(msgspec.Struct, gc=False, omit_defaults=True):
    Node: str
    CheckID: str
    Name: str = ""
    Status: str = ""
    ServiceID: str = ""
    ServiceName: str = ""
    Namespace: str = ""
    Partition: str = ""


class _NodeBody(msgspec.Struct, gc=False, omit_defaults=True):
    Node: str
    Address: str = ""
    Meta: dict[str, str] = {}
    Partition: str = ""
    ModifyIndex: int = 0


class _ServiceOp(msgspec.Struct, gc=False):
    Verb: str
    Node: str
    Service: _ServiceBody


class _CheckOp(msgspec.Struct, gc=False):
    Verb: str
    Check: _CheckBody


class _NodeOp(msgspec.Struct, gc=False):
    Verb: str
    Node: _NodeBody


def check_id(service_id: str) -> str:
    """Return the ID of the check that says whether a service's target is ready."""
    return f"{service_id}/ready"


class Operations(msgspec.Struct, frozen=True):
    """Writes the operations on one node; `namespace` and `partition` are Consul Enterprise's."""

    node: str
    namespace: str = ""
    partition: str = ""

    def put(self, service: Service, *, has_check: bool) -> Unit:
        """Write a service over the very record its index names, or where there is none, and its check.

        A check that is there and no longer wanted goes: nothing would keep it true.
        """
        body = _ServiceBody(
            ID=service.id,
            Service=service.name,
            Address=service.address,
            Port=service.port,
            Meta=dict(service.meta),
            Tags=sorted(service.tags),
            ModifyIndex=max(service.index, 0),
            Namespace=self.namespace,
            Partition=self.partition,
        )
        operation = _encoded("Service", _ServiceOp("cas", self.node, body))
        if service.ready is None and not has_check:
            return Unit(service, (operation,), service.index > 0)
        return Unit(service, (operation, self._check(service)), service.index > 0)

    def remove(self, service: Service) -> Unit:
        """Remove the very record that the service's index names, its checks with it.

        Name and index are Consul's conditions: an ID without them is refused, and nothing here can name less.
        """
        body = _ServiceBody(
            ID=service.id,
            Service=service.name,
            ModifyIndex=max(service.index, 0),
            Namespace=self.namespace,
            Partition=self.partition,
        )
        return Unit(service, (_encoded("Service", _ServiceOp("delete-cas", self.node, body)),))

    def get_service(self, service_id: str) -> bytes:
        """Read one service."""
        body = _ServiceBody(ID=service_id, Namespace=self.namespace, Partition=self.partition)
        return _encoded("Service", _ServiceOp("get", self.node, body))

    def get_check(self, name: str) -> bytes:
        """Read one check by its ID."""
        body = _CheckBody(self.node, name, Namespace=self.namespace, Partition=self.partition)
        return _encoded("Check", _CheckOp("get", body))

    def get_node_check(self, name: str, namespace: str) -> bytes:
        """Read one check of the whole node, which has a namespace of its own."""
        body = _CheckBody(self.node, name, Namespace=namespace, Partition=self.partition)
        return _encoded("Check", _CheckOp("get", body))

    def get_node(self) -> bytes:
        """Read the node."""
        return _encoded("Node", _NodeOp("get", _NodeBody(self.node, Partition=self.partition)))

    def put_node(self, address: str, meta: Mapping[str, str], index: int = 0) -> bytes:
        """Write the node over the record of this index, or fail; 0 is for where there is none yet."""
        body = _NodeBody(self.node, address, dict(meta), self.partition, index)
        return _encoded("Node", _NodeOp("cas", body))

    def remove_node(self, index: int) -> bytes:
        """Remove the node of this index, or fail; whatever is on it goes with it, whenever that came."""
        body = _NodeBody(self.node, Partition=self.partition, ModifyIndex=index)
        return _encoded("Node", _NodeOp("delete-cas", body))

    def _check(self, service: Service) -> bytes:
        body = _CheckBody(
            self.node,
            check_id(service.id),
            # The right to write is judged by the service's name, so it goes with a delete too.
            ServiceID=service.id,
            ServiceName=service.name,
            Namespace=self.namespace,
            Partition=self.partition,
        )
        if service.ready is None:
            return _encoded("Check", _CheckOp("delete", body))
        body.Name, body.Status = CHECK_NAME, "passing" if service.ready else "critical"
        return _encoded("Check", _CheckOp("set", body))


def pack(units: Iterable[Unit], most: Callable[[], int] = lambda: MOST_OPERATIONS) -> Iterator[list[Unit]]:
    """Yield batches that each fit one transaction, in order, as full as the order allows.

    `most` returns how many operations a transaction may have now.
    """
    batch: list[Unit] = []
    operations, size = 0, 2
    for unit in units:
        operations += len(unit.operations)
        size += unit.size
        if batch and (operations > most() or size > MOST_BYTES):
            yield batch
            batch, operations, size = [], len(unit.operations), 2 + unit.size
        batch.append(unit)
    if batch:
        yield batch


def operations_allowed(problem: str) -> int:
    """Return how many operations Consul takes, if it refused a transaction for their number; 0 otherwise."""
    found = _TOO_MANY.search(problem)
    return max(1, int(found[1] or FORMER_MOST_OPERATIONS)) if found else 0


def body_of(operations: Iterable[bytes]) -> bytes:
    """Return the body of a transaction."""
    return b"[" + b",".join(operations) + b"]"


def _encoded(kind: str, operation: _ServiceOp | _CheckOp | _NodeOp) -> bytes:
    return _encoder.encode({kind: operation})


class TxnError(msgspec.Struct, gc=False, rename="pascal"):
    """Why one operation fails; `op_index` counts from 0."""

    op_index: int
    what: str

    @property
    def is_stale(self) -> bool:
        """True if the record is not the one that was named."""
        return "index is stale" in self.what

    @property
    def is_rename(self) -> bool:
        """True if the record under the ID has another name, which this Consul never changes."""
        return "does not match existing service name" in self.what

    @property
    def is_node_missing(self) -> bool:
        """True if the node is not there."""
        return "Missing node registration" in self.what

    @property
    def is_absent(self) -> bool:
        """True if what was to be read is not there."""
        return "doesn't exist" in self.what


class NodeRecord(msgspec.Struct, gc=False, rename="pascal"):
    """A node of the catalog."""

    node: str
    id: str = msgspec.field(default="", name="ID")
    address: str = ""
    meta: dict[str, str] | None = None
    modify_index: RaftIndex = 0


class CheckRecord(msgspec.Struct, gc=False, rename="pascal"):
    """A check of the catalog."""

    check_id: str = msgspec.field(name="CheckID")
    service_id: str = msgspec.field(default="", name="ServiceID")
    status: str = ""
    modify_index: RaftIndex = 0

    @property
    def is_readiness(self) -> bool:
        """True if this check belongs to a service of this registrar."""
        return bool(self.service_id) and self.check_id == check_id(self.service_id)

    @property
    def is_passing(self) -> bool:
        """True if the target is ready."""
        return self.status == "passing"


class _ServiceIndex(msgspec.Struct, gc=False):
    ID: str
    ModifyIndex: RaftIndex


class _WriteResult(msgspec.Struct, gc=False):
    Service: _ServiceIndex | None = None


class ReadResult(msgspec.Struct, gc=False, rename="pascal"):
    """One record that was read; exactly one of these is there, a service as it was sent."""

    service: msgspec.Raw = msgspec.Raw(b"")
    check: CheckRecord | None = None
    node: NodeRecord | None = None


class _WriteAnswer(msgspec.Struct, gc=False):
    Results: list[_WriteResult] | None  # always there, so another's JSON is no success
    Errors: list[TxnError] | None = None


class _ReadAnswer(msgspec.Struct, gc=False):
    Results: list[ReadResult] | None
    Errors: list[TxnError] | None = None
    ResultsFilteredByACLs: bool = False  # since 1.11


_written = msgspec.json.Decoder(_WriteAnswer)
_read = msgspec.json.Decoder(_ReadAnswer)


def decode_written(body: bytes) -> tuple[dict[str, int], Sequence[TxnError]]:
    """Return the new index of each service by ID, or the errors; raises `ConsulRefused`."""
    answer = decode(_written, body, PATH)
    indexes = {
        one.Service.ID: one.Service.ModifyIndex for one in answer.Results or () if one.Service is not None
    }
    return indexes, answer.Errors or ()


class ReadAnswer(NamedTuple):
    """The records that were read, or the errors; `is_filtered` if Consul says that ACLs left something out."""

    results: Sequence[ReadResult]
    errors: Sequence[TxnError]
    is_filtered: bool


def decode_read(body: bytes) -> ReadAnswer:
    """Return what was read; raises `ConsulRefused`."""
    answer = decode(_read, body, PATH)
    return ReadAnswer(answer.Results or (), answer.Errors or (), answer.ResultsFilteredByACLs)


def check_answer(status: int, errors: Sequence[TxnError], operations: int) -> None:
    """See that an answer is a success exactly when nothing fails, and that errors name operations sent."""
    if (status == 200) == bool(errors) or any(not 0 <= error.op_index < operations for error in errors):
        raise ConsulRefused(ODD, status)
