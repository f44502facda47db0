"""The cluster as a whole: which one answers, and the Lease by which one replica leads in it."""

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import msgspec

from k8s_consul_registrar.errors import (
    AccessError,
    ClusterConflict,
    ClusterError,
    ClusterForbidden,
    ClusterRefused,
)
from k8s_consul_registrar.kube.access import SERVICE_ACCOUNT
from k8s_consul_registrar.kube.client import KubeClient
from k8s_consul_registrar.kube.responses import ApiAction
from k8s_consul_registrar.model import Lease
from k8s_consul_registrar.rotating import read_file

# The UID of this namespace stands for the cluster's identity, by a convention many tools share.
IDENTITY_NAMESPACE = "kube-system"

RESOURCE = "leases.coordination.k8s.io"
NAME_PREFIX = "k8s-consul-registrar"
_ROOT = "/apis/coordination.k8s.io/v1"
_NAME_PART = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# Every namespace is a DNS label (RFC 1123).
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class NamespaceReader(Protocol):
    """Reads a namespace's UID."""

    async def namespace_uid(self, name: str) -> str | None:
        """Return the UID, None where it is hidden or missing; raises a ClusterError."""


class ClusterUid:
    """The cluster's UID, asked for whenever a source has reason to doubt it.

    Sources that doubt it together, having lost their connections together, share a question. `uid` is the
    last one seen, empty while none was; `on_change` hears each new one.
    """

    def __init__(
        self,
        client: NamespaceReader,
        on_change: Callable[[str], None] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._on_change = on_change
        self._clock = clock
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._answer: str | ClusterError = ""
        self._uid = ""

    @property
    def uid(self) -> str:
        """The last UID seen, empty while it is not known."""
        return self._uid

    @property
    def was_asked(self) -> bool:
        """True if the API server answered once, or could not be asked."""
        return self._asked_at > float("-inf")

    async def confirm(self) -> str:
        """Return the UID as it is now, empty where we may not see it; raises a ClusterError.

        A question that was asked before this call does not count.
        """
        called_at = self._clock()
        async with self._lock:
            if self._asked_at < called_at:
                asked_at = self._clock()
                self._answer = await self._ask()
                self._asked_at = asked_at
        if isinstance(self._answer, str):
            return self._answer
        raise self._answer

    async def _ask(self) -> str | ClusterError:
        try:
            uid = await self._client.namespace_uid(IDENTITY_NAMESPACE) or ""
        except ClusterError as error:
            return error
        if uid and uid != self._uid:
            self._uid = uid
            if self._on_change is not None:
                self._on_change(uid)
        return uid


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str


class _Spec(msgspec.Struct, frozen=True, rename="camel"):
    """The API's own names and optional fields; an absent one is null."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class _Object(msgspec.Struct, frozen=True):
    metadata: _Metadata
    spec: _Spec = _Spec()


_DECODER = msgspec.json.Decoder(_Object)


def decode_lease(body: bytes) -> Lease:
    """Decode a Lease object; raises a ValueError when it is none."""
    found = _DECODER.decode(body)
    return Lease(
        holder=found.spec.holder_identity or "",
        duration=found.spec.lease_duration_seconds or 0,
        acquired=found.spec.acquire_time or "",
        renewed=found.spec.renew_time or "",
        transitions=found.spec.lease_transitions or 0,
        version=found.metadata.resource_version,
        origin=body,
    )


def encode_lease(lease: Lease, namespace: str, name: str) -> bytes:
    """Encode a Lease object, over what else the object it was read from holds."""
    whole = msgspec.json.decode(lease.origin) if lease.origin else {"metadata": {}}
    spec = _Spec(
        holder_identity=lease.holder,
        lease_duration_seconds=lease.duration,
        acquire_time=lease.acquired or None,
        renew_time=lease.renewed or None,
        lease_transitions=lease.transitions,
    )
    metadata = {**whole["metadata"], "namespace": namespace, "name": name}
    if lease.version:
        metadata["resourceVersion"] = lease.version
    return msgspec.json.encode(
        {
            **whole,
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {**(whole.get("spec") or {}), **msgspec.to_builtins(spec)},
        }
    )


class LeaseClient:
    """Reads and writes one Lease; each method raises a ClusterError."""

    def __init__(self, client: KubeClient, namespace: str, name: str) -> None:
        self._client = client
        self._namespace = namespace
        self._name = name
        self._collection = f"{_ROOT}/namespaces/{quote(namespace, safe='')}/leases"
        self._path = f"{self._collection}/{quote(name, safe='')}"

    async def get(self) -> Lease | None:
        """Return the Lease, None where there is none."""
        try:
            return await self._request("get", self._path, "GET")
        except ClusterRefused as error:
            if error.status == 404:
                return None
            raise

    async def create(self, lease: Lease) -> Lease:
        """Create the Lease; raises ClusterConflict when there is one already."""
        return await self._request("create", self._collection, "POST", lease)

    async def update(self, lease: Lease) -> Lease:
        """Replace the version the lease names; raises ClusterConflict when that is no longer there."""
        try:
            return await self._request("update", self._path, "PUT", lease)
        except ClusterRefused as error:
            if error.status == 404:
                raise ClusterConflict(str(error)) from None
            raise

    async def _request(self, verb: str, path: str, method: str, lease: Lease | None = None) -> Lease:
        action = ApiAction(verb, RESOURCE, self._namespace)
        body = encode_lease(lease, self._namespace, self._name) if lease is not None else None
        try:
            answer = await self._client.request(action, path, method=method, body=body)
        except ClusterForbidden as error:
            needed = f"leader election needs get, create and update on {RESOURCE} in {self._namespace}"
            raise ClusterForbidden(f"{error}; {needed}") from None
        except ClusterRefused as error:
            if error.status == 409:
                raise ClusterConflict(str(error)) from None
            raise
        try:
            return decode_lease(answer)
        except (ValueError, RecursionError):
            raise ClusterRefused(f"cannot {action}: the answer is no Lease", 200) from None


def default_lease_name(cluster: str, instance: str) -> str:
    """Return a name of its own for the Lease of each cluster name and instance.

    Where those are no parts of a Kubernetes name as they are, a digest keeps apart what reads alike.
    """
    parts = [cluster, instance] if instance else [cluster]
    if all(_NAME_PART.fullmatch(part) for part in parts):
        return f"{NAME_PREFIX}-{'.'.join(parts)}"
    digest = hashlib.sha256(f"{cluster}/{instance}".encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
    return "-".join(part for part in (NAME_PREFIX, readable, digest) if part)


def new_identity(host: str) -> str:
    """Return a name for this run: the Pod's, and what tells it from an earlier run in the same Pod."""
    return f"{host}_{secrets.token_hex(4)}"


def pod_namespace(folder: Path = SERVICE_ACCOUNT) -> str:
    """Return the namespace we run in; raises AccessError where no service account says it."""
    path = folder / "namespace"
    text = read_file(path, "LEASE_NAMESPACE is not set").decode(errors="replace").strip()
    if not _NAMESPACE.fullmatch(text):
        raise AccessError(f"LEASE_NAMESPACE is not set: {path} names no namespace")
    return text
