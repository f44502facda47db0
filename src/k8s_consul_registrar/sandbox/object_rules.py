"""What writing an object checks and computes; pure."""

import secrets
from typing import Any, NamedTuple

from k8s_consul_registrar.sandbox import api_errors
from k8s_consul_registrar.sandbox.resources import PODS, Resource

Object = dict[str, Any]


class Preconditions(NamedTuple):
    """What must hold for a delete to happen; empty fields ask for nothing."""

    uid: str = ""
    resource_version: str = ""


def content(obj: Object) -> Object:
    """Return what of an object a write can change."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "resourceVersion"}
    fields = {key: value for key, value in obj.items() if key not in ("kind", "apiVersion")}
    return {**fields, "metadata": metadata}


def own_metadata(obj: Object) -> Object:
    """Return a copy of an object's metadata, empty when it has none."""
    metadata = obj.get("metadata")
    return dict(metadata) if isinstance(metadata, dict) else {}


def generated_name(metadata: Object) -> str:
    """Return a name from `generateName`, empty when there is none."""
    prefix = metadata.get("generateName", "")
    return f"{prefix}{secrets.token_hex(3)[:5]}" if prefix else ""


def validate(resource: Resource, name: str, obj: Object) -> None:
    """Raise ApiError 422 when a new object lacks what every such object has."""
    if not name:
        raise api_errors.invalid(
            resource.kind,
            group=resource.group,
            field="metadata.name",
            cause="FieldValueRequired",
            problem="Required value: name or generateName is required",
        )
    if resource is PODS and not (obj.get("spec") or {}).get("containers"):
        raise api_errors.invalid(
            resource.kind,
            name=name,
            field="spec.containers",
            cause="FieldValueRequired",
            problem="Required value",
        )


def require(preconditions: Preconditions, resource: Resource, obj: Object) -> None:
    """Raise ApiError 409 unless the object is the one the preconditions mean."""
    metadata = obj["metadata"]
    for label, field, wanted in (
        ("UID", "uid", preconditions.uid),
        ("ResourceVersion", "resourceVersion", preconditions.resource_version),
    ):
        if wanted and wanted != metadata[field]:
            problem = (
                f"Precondition failed: {label} in precondition: {wanted}, "
                f"{label} in object meta: {metadata[field]}"
            )
            raise api_errors.conflict(resource, metadata["name"], problem)


def merged(value: Any, patch: Any) -> Any:
    """Return `value` with a merge patch applied (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(value) if isinstance(value, dict) else {}
    for key, item in patch.items():
        if item is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), item)
    return result
