"""Transactions over the catalog: all operations happen, or none does; pure.

Rules and texts: consul 1.8 `agent/consul/txn_endpoint.go`, `agent/consul/state/txn.go`; names of services
that never change: `vetServiceTxnOp` and `vetCheckTxnOp` of 2.0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from k8s_consul_registrar.sandbox.consul_acl import Right
from k8s_consul_registrar.sandbox.consul_model import Check, Json, Node, Service
from k8s_consul_registrar.sandbox.consul_rules import ANY_ADDRESSES, RefusedError, service_of, string_map
from k8s_consul_registrar.sandbox.consul_state import Catalog, check_of, node_of


class TxnResult(NamedTuple):
    """The answer of a transaction; `errors` is not empty exactly if nothing happened."""

    results: list[Json]
    errors: list[Json]


class Operation(NamedTuple):
    """One parsed operation: `read` finds its record, `write` and `drop` change it.

    `subject` is its name in messages, `right` what it needs.
    """

    kind: str
    verb: str
    subject: str
    right: Right
    cas_index: int
    read: Callable[[Catalog], Node | Service | Check | None]
    write: Callable[[Catalog], None]
    drop: Callable[[Catalog], None]
    precheck: Callable[[Catalog], str] = lambda _: ""


class _RolledBackError(Exception):
    """Raised to end an `apply` with a failed operation."""

    def __init__(self, errors: list[Json]) -> None:
        super().__init__(errors)
        self.errors = errors


Veto = Callable[[Operation], str]  # the reason why an operation is refused beforehand, or nothing


def run(
    catalog: Catalog,
    operations: Sequence[Mapping[str, Any]],
    datacenter: str,
    *,
    may_rename: bool = True,
    veto: Veto = lambda _: "",
) -> TxnResult:
    """Apply the operations; RefusedError for one of a kind that the catalog does not have."""
    parsed = [
        _parse(operation, datacenter, may_rename=may_rename)
        for operation in operations
        if any(operation.values())
    ]
    checked = [_checked(item, catalog, veto) for item in parsed]
    errors = [_error(position, item) for position, item in enumerate(checked) if isinstance(item, str)]
    sound = [item for item in checked if isinstance(item, Operation)]
    if errors:
        return TxnResult([], errors)
    if all(operation.verb == "get" for operation in sound):
        return _perform(catalog, sound)
    try:
        with catalog.apply():
            return _all_performed(catalog, sound)
    except _RolledBackError as rollback:
        return TxnResult([], rollback.errors)


def is_write(operation: Mapping[str, Any]) -> bool:
    """Return True if an operation, as it was sent, would change something."""
    return any(isinstance(body, dict) and body.get("Verb") != "get" for body in operation.values())


def _checked(item: Operation | str, catalog: Catalog, veto: Veto) -> Operation | str:
    """Return an operation, or the reason why it is refused before anything is applied."""
    if isinstance(item, str) or item.verb == "get":
        return item
    return veto(item) or item.precheck(catalog) or item


def _all_performed(catalog: Catalog, operations: Sequence[Operation]) -> TxnResult:
    result = _perform(catalog, operations)
    if result.errors:
        raise _RolledBackError(result.errors)
    return result


def _perform(catalog: Catalog, operations: Sequence[Operation]) -> TxnResult:
    result = TxnResult([], [])
    for position, operation in enumerate(operations):
        try:
            record = _perform_one(catalog, operation)
        except RefusedError as error:
            result.errors.append(_error(position, str(error)))
            continue
        if record is not None:
            result.results.append({operation.kind: record.raw_json()})
    return result


def _perform_one(catalog: Catalog, operation: Operation) -> Node | Service | Check | None:
    current = operation.read(catalog)
    match operation.verb:
        case "get":
            if current is None:
                raise RefusedError(f"{operation.subject} doesn't exist")
        case "set" | "cas":
            index = current.modify_index if current else 0
            if operation.verb == "cas" and index != operation.cas_index:
                raise RefusedError(f"failed to set {operation.subject}, index is stale")
            operation.write(catalog)
        case "delete" | "delete-cas":
            is_stale = current is None or current.modify_index != operation.cas_index
            if operation.verb == "delete-cas" and is_stale:
                raise RefusedError(f"failed to delete {operation.subject}, index is stale")
            operation.drop(catalog)
            return None
        case _:
            raise RefusedError(f'unknown {operation.kind} verb "{operation.verb}"')
    return operation.read(catalog)


def _parse(operation: Mapping[str, Any], datacenter: str, *, may_rename: bool) -> Operation | str:
    """Return the operation, or the reason why it is refused."""
    given = [(kind, body) for kind, body in operation.items() if isinstance(body, dict)]
    if len(given) != 1 or given[0][0] not in ("Node", "Service", "Check"):
        raise RefusedError("a transaction's operation is one of Node, Service, Check")
    kind, body = given[0]
    record = body.get(kind) or {}
    try:
        match kind:
            case "Node":
                return _parse_node(body, record, datacenter)
            case "Service":
                return _parse_service(body, record, may_rename=may_rename)
            case _:
                return _parse_check(body, record, may_rename=may_rename)
    except RefusedError as error:
        return str(error)


def _parse_service(body: Json, record: Json, *, may_rename: bool) -> Operation | str:
    node, service = body.get("Node") or "", service_of(record, name_field="Service")
    verb = body.get("Verb") or ""
    # preCheck skips what is only read.
    if verb != "get" and record.get("ID") and not service.name:
        return "Must provide service name with ID"
    if verb != "get" and service.address in ANY_ADDRESSES:
        return "Invalid service address"

    def precheck(catalog: Catalog) -> str:
        existing = catalog.service(node, service.key)
        if may_rename or existing is None or existing.name == service.name:
            return ""
        problem = "service name does not match existing service name for service ID"
        return f'{problem} "{service.id}" on node "{node}"'

    return Operation(
        kind="Service",
        verb=verb,
        subject=f'service "{service.id}" on node "{node}"',
        right=Right("service:write", service.name),
        precheck=precheck,
        cas_index=record.get("ModifyIndex") or 0,
        read=lambda catalog: catalog.service(node, service.key),
        write=lambda catalog: catalog.put_service(node, service),
        drop=lambda catalog: catalog.drop_service(node, service.key),
    )


def _parse_node(body: Json, record: Json, datacenter: str) -> Operation | str:
    node = node_of(record, string_map(record, "Meta"), datacenter)
    if not node.name:
        return "Must provide node"
    return Operation(
        kind="Node",
        verb=body.get("Verb") or "",
        subject=f'node "{node.name}"',
        right=Right("node:write", node.name),
        cas_index=record.get("ModifyIndex") or 0,
        read=lambda catalog: catalog.node(node.name),
        write=lambda catalog: catalog.put_node(node),
        drop=lambda catalog: catalog.drop_node(node.name),
    )


def _parse_check(body: Json, record: Json, *, may_rename: bool) -> Operation | str:
    check = check_of(record, "")
    named = record.get("ServiceName") or ""

    def precheck(catalog: Catalog) -> str:
        existing = catalog.check(check.node, check.key) or check
        is_known = not existing.service_id or catalog.service(existing.node, existing.service_key) is not None
        if may_rename or is_known or named:
            return ""
        return f'unknown service ID "{check.service_id}" for check ID "{check.id}"'

    return Operation(
        kind="Check",
        verb=body.get("Verb") or "",
        subject=f'check "{check.id}" on node "{check.node}"',
        right=Right("service:write", named) if check.service_id else Right("node:write", check.node),
        precheck=precheck,
        cas_index=record.get("ModifyIndex") or 0,
        read=lambda catalog: catalog.check(check.node, check.key),
        write=lambda catalog: catalog.put_check(check),
        drop=lambda catalog: catalog.drop_check(check.node, check.key),
    )


def _error(position: int, problem: Operation | str) -> Json:
    return {"OpIndex": position, "What": problem}
