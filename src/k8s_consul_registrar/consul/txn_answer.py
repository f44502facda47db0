"""What comes of a transaction (`/v1/txn`): its results or its errors; pure.

One failing operation leaves everything as it was, and all that fail are named by their position (consul 1.8
`agent/consul/state/txn.go`). A delete has no result; a read leaves out, without an error, what the token
may not see.
"""

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from k8s_consul_registrar.consul.txn import check_id
from k8s_consul_registrar.errors import ConsulRefused


class TxnError(msgspec.Struct, gc=False, rename="pascal"):
    """Why one operation fails; `op_index` counts from 0."""

    op_index: int
    what: str

    @property
    def is_stale(self) -> bool:
        """Whether the record is not the one that was named."""
        return "index is stale" in self.what

    @property
    def is_node_missing(self) -> bool:
        """Whether the node is not there."""
        return "Missing node registration" in self.what

    @property
    def is_absent(self) -> bool:
        """Whether what was to be read is not there."""
        return "doesn't exist" in self.what


class NodeRecord(msgspec.Struct, gc=False, rename="pascal"):
    """A node of the catalog."""

    node: str
    id: str = msgspec.field(default="", name="ID")
    address: str = ""
    meta: dict[str, str] | None = None
    modify_index: int = 0


class CheckRecord(msgspec.Struct, gc=False, rename="pascal"):
    """A check of the catalog."""

    check_id: str = msgspec.field(name="CheckID")
    service_id: str = msgspec.field(default="", name="ServiceID")
    status: str = ""
    modify_index: int = 0

    @property
    def is_readiness(self) -> bool:
        """Whether this is the check that goes with a service of ours."""
        return bool(self.service_id) and self.check_id == check_id(self.service_id)

    @property
    def is_passing(self) -> bool:
        """Whether it says that all is well."""
        return self.status == "passing"


class _ServiceIndex(msgspec.Struct, gc=False):
    ID: str
    ModifyIndex: int


class _WriteResult(msgspec.Struct, gc=False):
    Service: _ServiceIndex | None = None


class ReadResult(msgspec.Struct, gc=False, rename="pascal"):
    """One record that was read; exactly one of these is there, a service as it was sent."""

    service: msgspec.Raw = msgspec.Raw(b"")
    check: CheckRecord | None = None
    node: NodeRecord | None = None


class _WriteAnswer(msgspec.Struct, gc=False):
    Results: list[_WriteResult] | None = None
    Errors: list[TxnError] | None = None


class _ReadAnswer(msgspec.Struct, gc=False):
    Results: list[ReadResult] | None = None
    Errors: list[TxnError] | None = None


_written = msgspec.json.Decoder(_WriteAnswer)
_read = msgspec.json.Decoder(_ReadAnswer)


def decode_written(body: bytes) -> tuple[dict[str, int], Sequence[TxnError]]:
    """Return the new index of each service by ID, or the errors; raises `ConsulRefused`."""
    answer = _decoded(_written, body)
    indexes = {
        one.Service.ID: one.Service.ModifyIndex for one in answer.Results or () if one.Service is not None
    }
    return indexes, answer.Errors or ()


def decode_read(body: bytes) -> tuple[Sequence[ReadResult], Sequence[TxnError]]:
    """Return what was read, or the errors; raises `ConsulRefused`."""
    answer = _decoded(_read, body)
    return answer.Results or (), answer.Errors or ()


_AnswerT = TypeVar("_AnswerT", _WriteAnswer, _ReadAnswer)


def _decoded(decoder: msgspec.json.Decoder[_AnswerT], body: bytes) -> _AnswerT:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConsulRefused(f"/v1/txn does not answer as Consul does: {error}") from None
