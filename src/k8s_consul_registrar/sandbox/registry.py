"""Writes by the rules of an API server: defaults, identity, conflicts and graceful deletion.

Rules: kubernetes/apiserver `pkg/registry/generic/registry/store.go` and `pkg/registry/rest/`.
"""

import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Any, NamedTuple

from k8s_consul_registrar.sandbox import api_errors
from k8s_consul_registrar.sandbox.event_rules import validate_event_update
from k8s_consul_registrar.sandbox.object_rules import (
    Object,
    Preconditions,
    content,
    generated_name,
    managed_fields,
    merged,
    own_metadata,
    require,
    validate,
    with_consistent_status,
    with_defaults,
)
from k8s_consul_registrar.sandbox.resources import EVENTS, NAMESPACES, PODS, RESOURCES, Resource
from k8s_consul_registrar.sandbox.selection import Selection
from k8s_consul_registrar.sandbox.store import Store, Stored

_IDENTITY = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds")


class Deletion(NamedTuple):
    """The result of a delete: the object's last version, and the seconds until its removal, 0 if removed."""

    stored: Stored
    grace: int


def now() -> datetime:
    """Return the current time."""
    return datetime.now(UTC)


class Registry:
    """The writing side of the API server over one store."""

    def __init__(self, store: Store, clock: Callable[[], datetime] = now) -> None:
        self._store = store
        self._clock = clock

    def seed(self, resource: Resource, obj: Mapping[str, Any]) -> Stored:
        """Write an object as given, with the metadata that every object has."""
        metadata: Object = {
            "uid": str(uuid.uuid4()),
            "creationTimestamp": _stamp(self._clock()),
            **obj["metadata"],
        }
        if resource.is_namespaced:
            metadata.setdefault("namespace", "default")
        key = resource.key(metadata.get("namespace", ""), metadata["name"])
        if before := self._store.get(resource, key):
            had = before.decode()["metadata"]
            metadata = {**{field: had[field] for field in _IDENTITY if field in had}, **obj["metadata"]}
            if before.namespace:
                metadata["namespace"] = before.namespace
        return self._store.put(resource, key, {**obj, "metadata": metadata})

    def create(
        self, resource: Resource, obj: Object, *, namespace: str = "", manager: str = "unknown"
    ) -> Stored:
        """Create an object; ApiError 404 without its namespace, 409 if it exists, 422 if it is invalid."""
        metadata = own_metadata(obj)
        name = metadata.get("name") or generated_name(metadata)
        if resource.is_namespaced:
            if metadata.setdefault("namespace", namespace) != namespace:
                given = (
                    "the namespace of the provided object does not match the namespace sent on the request"
                )
                raise api_errors.bad_request(given)
            if self._store.get(NAMESPACES, namespace) is None:
                raise api_errors.not_found(NAMESPACES, namespace)
        validate(resource, name, obj)
        if metadata.get("resourceVersion"):
            raise api_errors.bad_request("resourceVersion should not be set on objects to be created")
        key = resource.key(namespace, name)
        if self._store.get(resource, key) is not None:
            raise api_errors.already_exists(resource, name)
        stamp = _stamp(self._clock())
        kept = {field: value for field, value in metadata.items() if field not in _IDENTITY}
        metadata = {**kept, "name": name, "uid": str(uuid.uuid4()), "creationTimestamp": stamp}
        if resource is PODS:
            metadata["generation"] = 1
        obj = with_defaults(resource, {**obj, "metadata": metadata})
        return self._store.put(resource, key, self._owned(resource, obj, manager, ""))

    def update(
        self,
        resource: Resource,
        obj: Object,
        *,
        namespace: str,
        name: str,
        subresource: str = "",
        manager: str,
    ) -> Stored:
        """Replace an object, or only its status; ApiError 409 for a stale resourceVersion."""
        metadata = own_metadata(obj)
        before = self._store.get(resource, resource.key(namespace, name))
        if before is None:
            if resource.creates_on_update and not subresource:
                fresh = {key: value for key, value in metadata.items() if key != "resourceVersion"}
                return self.create(resource, {**obj, "metadata": fresh}, namespace=namespace, manager=manager)
            raise api_errors.not_found(resource, name)
        if metadata.get("name", name) != name:
            raise api_errors.bad_request(
                f"the name of the object ({metadata['name']}) does not match the name on the URL ({name})"
            )
        version = metadata.get("resourceVersion", "")
        if not version and resource.creates_on_update:  # these resources have no unconditional update
            problem = "Invalid value: 0: must be specified for an update"
            raise api_errors.invalid(
                resource.kind,
                group=resource.group,
                name=name,
                field="metadata.resourceVersion",
                cause="FieldValueInvalid",
                problem=problem,
            )
        if version and version != str(before.revision):
            raise api_errors.conflict(resource, name)
        return self._replace(resource, before, obj, subresource, manager)

    def patch(
        self,
        resource: Resource,
        patch: Object,
        *,
        namespace: str,
        name: str,
        subresource: str = "",
        manager: str,
    ) -> Stored:
        """Apply a merge patch (RFC 7396) to an object, or only to its status."""
        before = self._store.get(resource, resource.key(namespace, name))
        if before is None:
            raise api_errors.not_found(resource, name)
        version = (patch.get("metadata") or {}).get("resourceVersion")
        if version and version != str(before.revision):
            raise api_errors.conflict(resource, name)
        return self._replace(resource, before, merged(before.decode(), patch), subresource, manager)

    def delete(
        self,
        resource: Resource,
        *,
        namespace: str,
        name: str,
        grace: int | None = None,
        preconditions: Preconditions = Preconditions(),  # noqa: B008 - an immutable value
    ) -> Deletion:
        """Delete an object; a Pod that has a node gets `grace` seconds to terminate."""
        before = self._store.get(resource, resource.key(namespace, name))
        if before is None:
            raise api_errors.not_found(resource, name)
        obj = before.decode()
        require(preconditions, resource, obj)
        if resource is NAMESPACES:
            self._empty_namespace(name)
        if resource is not PODS:
            return Deletion(self._store.delete(resource, before.key), 0)
        return self._delete_pod(before, obj, grace)

    def select(self, resource: Resource, selection: Selection) -> list[Stored]:
        """Return the selected objects."""
        namespace = selection.namespace
        first = self._store.select(resource, start=f"{namespace}/" if namespace else "")
        if namespace:  # keys are sorted, so a namespace's objects are adjacent
            first = list(takewhile(lambda stored: stored.namespace == namespace, first))
        return [stored for stored in first if selection.matches(stored)]

    def finish_deletion(self, uid: str, *, namespace: str, name: str) -> None:
        """Remove a Pod at the end of its grace period, like its kubelet, if it still exists."""
        before = self._store.get(PODS, PODS.key(namespace, name))
        if before is not None and (obj := before.decode())["metadata"]["uid"] == uid:
            self._delete_pod(before, obj, 0)

    def _delete_pod(self, before: Stored, obj: Object, grace: int | None) -> Deletion:
        metadata = obj["metadata"]
        spec, status = obj.get("spec") or {}, obj.get("status") or {}
        had = metadata.get("deletionGracePeriodSeconds")
        if grace is None:
            grace = spec.get("terminationGracePeriodSeconds", 30) if had is None else had
        if not spec.get("nodeName") or status.get("phase") in ("Succeeded", "Failed"):
            grace = 0
        if had is not None and grace >= had:
            return Deletion(before, 0 if had == 0 else had)
        if had is None and "generation" in metadata:
            metadata["generation"] += 1
        metadata["deletionTimestamp"] = _stamp(self._clock() + timedelta(seconds=grace))
        metadata["deletionGracePeriodSeconds"] = grace
        marked = self._store.put(PODS, before.key, obj)
        return Deletion(marked if grace else self._store.delete(PODS, before.key), grace)

    def _replace(
        self, resource: Resource, before: Stored, obj: Object, subresource: str, manager: str
    ) -> Stored:
        old = before.decode()
        given, had = obj["metadata"], old["metadata"]
        if given.get("uid", had["uid"]) != had["uid"]:
            problem = (
                f"Precondition failed: UID in precondition: {given['uid']}, UID in object meta: {had['uid']}"
            )
            raise api_errors.conflict(resource, before.name, problem)
        if given.get("namespace", before.namespace) != before.namespace:
            problem = "the namespace of the provided object does not match the namespace sent on the request"
            raise api_errors.bad_request(problem)
        metadata = {**given, "name": before.name, **{key: had[key] for key in _IDENTITY if key in had}}
        if before.namespace:
            metadata["namespace"] = before.namespace
        if resource is PODS and "generation" in had:
            metadata["generation"] = had["generation"]
        metadata["managedFields"] = had.get("managedFields") or []
        # The endpoint of the object keeps the status, and that of the status keeps the rest.
        kept = ("spec",) if subresource else ("status",) if resource.has_status else ()
        new = {**obj, "metadata": metadata, **{field: old[field] for field in kept if field in old}}
        if not metadata["managedFields"]:
            del metadata["managedFields"]
        new = with_consistent_status(resource, new)
        if resource is EVENTS:
            validate_event_update(old, new)
        if content(new) == content(old):
            return before
        return self._store.put(resource, before.key, self._owned(resource, new, manager, subresource))

    def _owned(self, resource: Resource, obj: Object, manager: str, subresource: str) -> Object:
        entries = managed_fields(
            obj,
            manager=manager,
            time=_stamp(self._clock()),
            api_version=resource.api_version,
            subresource=subresource,
        )
        return {**obj, "metadata": {**obj["metadata"], "managedFields": entries}}

    def _empty_namespace(self, namespace: str) -> None:
        for resource in RESOURCES:
            if resource.is_namespaced:
                for stored in self._store.select(resource):
                    if stored.namespace == namespace:
                        self._store.delete(resource, stored.key)


def _stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
