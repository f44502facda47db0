"""The writing verbs of the sandbox's Kubernetes API: create, update, patch and delete."""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from k8s_consul_registrar.sandbox import api_errors
from k8s_consul_registrar.sandbox.access import Attempt
from k8s_consul_registrar.sandbox.kube_read import object_body, selection_of
from k8s_consul_registrar.sandbox.object_rules import Object, Preconditions
from k8s_consul_registrar.sandbox.registry import Deletion, Registry
from k8s_consul_registrar.sandbox.resources import PODS, Resource

_MERGE_PATCHES = frozenset({"application/merge-patch+json", "application/strategic-merge-patch+json"})


class Writer:
    """The writing side of the API server: from requests to the registry and back."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._timers: set[asyncio.TimerHandle] = set()

    def close(self) -> None:
        """Forget the Pods that are terminating."""
        for timer in self._timers:
            timer.cancel()

    async def create(self, request: web.Request, attempt: Attempt) -> web.Response:
        """Create the object in the body; 201."""
        obj = await _read_object(request, attempt.resource)
        manager = _manager(request)
        stored = self._registry.create(attempt.resource, obj, namespace=attempt.namespace, manager=manager)
        return json_response(object_body(attempt.resource, stored), status=201)

    async def update(self, request: web.Request, attempt: Attempt) -> web.Response:
        """Replace an object, or its status, by the body."""
        obj = await _read_object(request, attempt.resource)
        stored = self._registry.update(
            attempt.resource,
            obj,
            namespace=attempt.namespace,
            name=attempt.name,
            subresource=attempt.subresource,
            manager=_manager(request),
        )
        return json_response(object_body(attempt.resource, stored))

    async def patch(self, request: web.Request, attempt: Attempt) -> web.Response:
        """Merge the body into an object, or into its status."""
        if request.content_type not in _MERGE_PATCHES:
            raise api_errors.unsupported_patch(request.content_type)
        stored = self._registry.patch(
            attempt.resource,
            await _read_json(request),
            namespace=attempt.namespace,
            name=attempt.name,
            subresource=attempt.subresource,
            manager=_manager(request),
        )
        return json_response(object_body(attempt.resource, stored))

    async def delete(self, request: web.Request, attempt: Attempt) -> web.Response:
        """Delete an object with the grace period of the query or of the body's DeleteOptions."""
        options = await _read_json(request) if request.can_read_body else {}
        grace = request.query.get("gracePeriodSeconds", options.get("gracePeriodSeconds"))
        wanted = options.get("preconditions") or {}
        deletion = self.begin_deletion(
            attempt.resource,
            attempt.namespace,
            attempt.name,
            grace=None if grace is None else int(grace),
            preconditions=Preconditions(wanted.get("uid", ""), wanted.get("resourceVersion", "")),
        )
        if attempt.resource.returns_deleted:
            return json_response(object_body(attempt.resource, deletion.stored))
        return json_response(msgspec.json.encode(_success(attempt, deletion)) + b"\n")

    async def delete_collection(self, request: web.Request, attempt: Attempt) -> web.Response:
        """Delete each object that the query selects like `delete`, and return them as a list."""
        options = await _read_json(request) if request.can_read_body else {}
        grace = request.query.get("gracePeriodSeconds", options.get("gracePeriodSeconds"))
        resource = attempt.resource
        deleted = [
            self.begin_deletion(
                resource, stored.namespace, stored.name, grace=None if grace is None else int(grace)
            )
            for stored in self._registry.select(resource, selection_of(request, attempt))
        ]
        head = (
            f'{{"kind":"{resource.kind}List","apiVersion":"{resource.api_version}","metadata":{{}},"items":['
        )
        items = b",".join(deletion.stored.body for deletion in deleted)
        return json_response(head.encode() + items + b"]}\n")

    def begin_deletion(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        grace: int | None = None,
        preconditions: Preconditions = Preconditions(),  # noqa: B008 - an immutable value
    ) -> Deletion:
        """Delete an object; a Pod with a grace period is removed at its end."""
        deletion = self._registry.delete(
            resource, namespace=namespace, name=name, grace=grace, preconditions=preconditions
        )
        if resource is PODS and deletion.grace:
            uid = deletion.stored.decode()["metadata"]["uid"]
            self._timers.add(
                asyncio.get_running_loop().call_later(deletion.grace, self._finish, uid, namespace, name)
            )
        return deletion

    def _finish(self, uid: str, namespace: str, name: str) -> None:
        self._registry.finish_deletion(uid, namespace=namespace, name=name)


def json_response(body: bytes, *, status: int = 200) -> web.Response:
    """Return a response of JSON."""
    return web.Response(body=body, status=status, content_type="application/json")


def _success(attempt: Attempt, deletion: Deletion) -> dict[str, Any]:
    details = {
        "name": attempt.name,
        "group": attempt.resource.group,
        "kind": attempt.resource.plural,
        "uid": deletion.stored.decode()["metadata"]["uid"],
    }
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": {key: value for key, value in details.items() if value},
    }


async def _read_json(request: web.Request) -> Object:
    try:
        body = msgspec.json.decode(await request.read())
    except msgspec.MsgspecError as error:
        raise api_errors.bad_request(f"couldn't get version/kind; json parse error: {error}") from None
    if not isinstance(body, dict):
        raise api_errors.bad_request("couldn't get version/kind; json parse error: not an object")
    return body


async def _read_object(request: web.Request, resource: Resource) -> Object:
    obj = await _read_json(request)
    given = (obj.get("apiVersion", resource.api_version), obj.get("kind", resource.kind))
    if given != (resource.api_version, resource.kind):
        raise api_errors.bad_request(
            f'{given[1]} in version "{given[0]}" cannot be handled as a {resource.kind}'
        )
    obj.setdefault("metadata", {})
    return obj


def _manager(request: web.Request) -> str:
    """Return the manager that a client writes as: its User-Agent up to the first slash."""
    return request.headers.get("User-Agent", "").partition("/")[0] or "unknown"
