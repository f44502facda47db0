"""Rules of an API server for the objects it writes; pure.

Defaults: kubernetes `pkg/apis/core/v1/defaults.go`. On a create the server ignores the status of a Pod
(`pkg/registry/core/pod/strategy.go`) and keeps that of a Node (`pkg/registry/core/node/strategy.go`).

`metadata.managedFields` is a simplification of server-side apply: each manager has one entry for the object and
one for its status, with the fields that it sent; list items have the keys of the Pod and Node schemas.
"""

import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from k8s_consul_registrar.sandbox import api_errors
from k8s_consul_registrar.sandbox.event_rules import validate_new_event
from k8s_consul_registrar.sandbox.resources import (
    ENDPOINT_SLICES,
    EVENTS,
    NAMESPACES,
    NODES,
    PODS,
    SERVICES,
    Resource,
)

Object = dict[str, Any]

_UNREACHABLE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
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
_ADMITTED = frozenset(("tolerations", "priority", "preemptionPolicy"))  # added by admission, without an owner


class Preconditions(NamedTuple):
    """The conditions of a delete; empty fields are none."""

    uid: str = ""
    resource_version: str = ""


def content(obj: Object) -> Object:
    """Return the part of an object that a write can change."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "resourceVersion"}
    fields = {key: value for key, value in obj.items() if key not in ("kind", "apiVersion")}
    return {**fields, "metadata": metadata}


def own_metadata(obj: Object) -> Object:
    """Return a copy of an object's metadata, empty without any."""
    metadata = obj.get("metadata")
    return dict(metadata) if isinstance(metadata, dict) else {}


def generated_name(metadata: Object) -> str:
    """Return a name from `generateName`, empty without it."""
    prefix = metadata.get("generateName", "")
    return f"{prefix}{secrets.token_hex(3)[:5]}" if prefix else ""


def validate(resource: Resource, name: str, obj: Object) -> None:
    """Raise ApiError 422 if a new object lacks a required field, or 400 if it cannot be read."""
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
    if resource is EVENTS:
        validate_new_event(name, obj)


def require(preconditions: Preconditions, resource: Resource, obj: Object) -> None:
    """Raise ApiError 409 unless the object meets the preconditions."""
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


def with_defaults(resource: Resource, obj: dict[str, Any]) -> dict[str, Any]:
    """Return a new object with the server's defaults; its metadata stays."""
    if resource is PODS:
        return {
            **obj,
            "spec": _pod_spec(obj["spec"]),
            "status": {"phase": "Pending", "qosClass": "BestEffort"},
        }
    if resource is NODES:
        taint = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}
        spec = {"taints": [taint], **(obj.get("spec") or {})}
        return {**obj, "spec": spec, "status": _node_status(obj.get("status") or {})}
    if resource is NAMESPACES:
        return {**obj, "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}
    if resource is SERVICES:
        return {**obj, "spec": _service_spec(obj.get("spec") or {}), "status": {"loadBalancer": {}}}
    if resource is ENDPOINT_SLICES:
        return {**obj, "endpoints": obj.get("endpoints"), "ports": obj.get("ports")}
    return obj


def with_consistent_status(resource: Resource, obj: dict[str, Any]) -> dict[str, Any]:
    """Return an object with a consistent status.

    A Pod's `podIP` wins over `podIPs` that begin with another (`pkg/apis/core/v1/conversion.go`), and unknown
    times of its conditions are null.
    """
    status = obj.get("status") or {}
    if resource is not PODS or not status:
        return obj
    status = dict(status)
    if address := status.get("podIP"):
        if (status.get("podIPs") or [{}])[0].get("ip") != address:
            status["podIPs"] = [{"ip": address}]
    elif addresses := status.get("podIPs"):
        status["podIP"] = addresses[0]["ip"]
    times = {"lastProbeTime": None, "lastTransitionTime": None}
    if conditions := status.get("conditions"):
        status["conditions"] = [{**times, **condition} for condition in conditions]
    return {**obj, "status": status}


def _pod_spec(spec: dict[str, Any]) -> dict[str, Any]:
    tolerations = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
        for key in _UNREACHABLE
    ]
    return {
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "securityContext": {},
        "schedulerName": "default-scheduler",
        "tolerations": tolerations,
        "priority": 0,
        "enableServiceLinks": True,
        "preemptionPolicy": "PreemptLowerPriority",
        **spec,
        **{
            field: [_container(container) for container in spec[field]]
            for field in ("initContainers", "containers")
            if spec.get(field)
        },
    }


def _container(container: dict[str, Any]) -> dict[str, Any]:
    image = str(container.get("image", ""))
    is_latest = ":" not in image.rpartition("/")[2] or image.endswith(":latest")
    filled = {
        "resources": {},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "imagePullPolicy": "Always" if is_latest else "IfNotPresent",
        **container,
    }
    if ports := container.get("ports"):
        filled["ports"] = [{"protocol": "TCP", **port} for port in ports]
    return filled


def _service_spec(spec: dict[str, Any]) -> dict[str, Any]:
    if spec.get("type") == "ExternalName":
        return {"sessionAffinity": "None", **spec}
    return {
        "type": "ClusterIP",
        "sessionAffinity": "None",
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
        **spec,
    }


def _node_status(status: dict[str, Any]) -> dict[str, Any]:
    info = ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion")
    more = ("kubeletVersion", "kubeProxyVersion", "operatingSystem", "architecture")
    return {
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
        "nodeInfo": dict.fromkeys((*info, *more), ""),
        **status,
    }


def managed_fields(
    obj: Mapping[str, Any], *, manager: str, time: str, api_version: str, subresource: str = ""
) -> list[dict[str, Any]]:
    """Return the object's managedFields after a write by `manager`."""
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
