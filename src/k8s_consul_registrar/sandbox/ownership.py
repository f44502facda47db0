"""`metadata.managedFields`: who wrote which field last.

A simplification of server-side apply's bookkeeping: each manager has one entry for the object and one
for its status, naming what it sent; lists are keyed as the Pod and Node schemas key them.
"""

from collections.abc import Mapping
from typing import Any

_LIST_KEYS: Mapping[str, tuple[str, ...]] = {
    "addresses": ("type",),
    "conditions": ("type",),
    "containers": ("name",),
    "env": ("name",),
    "initContainers": ("name",),
    "podIPs": ("ip",),
    "ports": ("containerPort", "protocol"),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
_SYSTEM_METADATA = frozenset(
    (
        *("name", "generateName", "namespace", "uid", "resourceVersion", "generation", "managedFields"),
        *("creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"),
    )
)
_REQUIRED_LISTS = frozenset(("containers",))
_SERVER_STATUS = frozenset(("qosClass",))
_ADMITTED = frozenset(
    ("tolerations", "priority", "preemptionPolicy")
)  # filled in by admission, owned by nobody


def managed_fields(
    obj: Mapping[str, Any], *, manager: str, time: str, api_version: str, subresource: str = ""
) -> list[dict[str, Any]]:
    """Return the object's managedFields after `manager` has written it."""
    if subresource:
        status = obj.get(subresource) or {}
        owned = {subresource: {key: value for key, value in status.items() if key not in _SERVER_STATUS}}
    else:
        metadata = {key: value for key, value in obj["metadata"].items() if key not in _SYSTEM_METADATA}
        spec = {key: value for key, value in (obj.get("spec") or {}).items() if key not in _ADMITTED}
        owned = {"metadata": metadata, "spec": spec}
    entry = {
        "manager": manager,
        "operation": "Update",
        "apiVersion": api_version,
        "time": time,
        "fieldsType": "FieldsV1",
        "fieldsV1": {f"f:{key}": _field_set(value) for key, value in owned.items() if value},
        **({"subresource": subresource} if subresource else {}),
    }
    had = list(obj["metadata"].get("managedFields") or [])
    for position, other in enumerate(had):
        if (other["manager"], other.get("subresource", "")) == (manager, subresource):
            return [*had[:position], entry, *had[position + 1 :]]
    return [*had, entry]


def _field_set(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        fields = {f"f:{key}": _field_set(item, key) for key, item in value.items()}
        return {".": {}, **fields} if name in ("annotations", "labels") else fields
    keys = _LIST_KEYS.get(name)
    if not (isinstance(value, list) and keys and all(isinstance(item, dict) for item in value)):
        return {}
    marks: dict[str, Any] = {} if name in _REQUIRED_LISTS else {".": {}}
    for item in value:
        identity = ",".join(f'"{key}":{_literal(item[key])}' for key in keys if key in item)
        marks[f"k:{{{identity}}}"] = {".": {}, **_field_set(item)}
    return marks


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
