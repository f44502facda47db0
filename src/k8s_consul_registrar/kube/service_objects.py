"""Services and EndpointSlices out of the API server's JSON, and what the JSON of every kind has in common."""

from collections.abc import Sequence
from functools import lru_cache
from sys import intern
from typing import Annotated

import msgspec

from k8s_consul_registrar.model import (
    ContainerPort,
    EndpointSlice,
    Kind,
    KubeService,
    SliceEndpoint,
    Undecodable,
)

# The label with which every EndpointSlice names its Service.
SERVICE_LABEL = "kubernetes.io/service-name"
# An event about a slice repeats all its endpoints, and all but one were seen before. The bounds hold the memory
# of what is remembered at a few megabytes.
ENDPOINTS_KEPT, LONGEST_KEPT = 8192, 512
PROBLEM_LENGTH = 200


class Wire(msgspec.Struct, gc=False, rename="camel"):
    """A part of an object as it is sent; what it does not name is skipped."""


class Metadata(Wire):
    """The metadata that every kind has."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class _ServiceSpec(Wire):
    type: str = "ClusterIP"
    ip_families: list[str] | None = None
    publish_not_ready_addresses: bool = False


class WireService(Wire):
    """A Service as it is sent."""

    metadata: Metadata
    spec: _ServiceSpec | None = None


class _SlicePort(Wire):
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    name: str | None = None
    protocol: str | None = None


class _SliceConditions(Wire):
    ready: bool | None = None
    serving: bool | None = None


class _TargetRef(Wire):
    kind: str = ""
    name: str = ""
    uid: str = ""


class _WireEndpoint(Wire):
    addresses: list[str] | None = None
    conditions: _SliceConditions | None = None
    target_ref: _TargetRef | None = None
    node_name: str | None = None
    zone: str | None = None


class WireSlice(Wire):
    """An EndpointSlice as it is sent, its endpoints still bytes."""

    metadata: Metadata
    address_type: str = ""
    ports: list[_SlicePort] | None = None
    endpoints: list[msgspec.Raw] | None = None


_EMPTY_SPEC, _NO_REFERENCE = _ServiceSpec(), _TargetRef()
_ENDPOINT = msgspec.json.Decoder(_WireEndpoint)


def problem_of(error: Exception) -> str:
    """Say what is wrong and where; msgspec's texts hold types and paths, never values."""
    return str(error)[:PROBLEM_LENGTH]


def service_of(wire: WireService) -> KubeService | Undecodable:
    """Return a Service as we use it."""
    meta, spec = wire.metadata, wire.spec or _EMPTY_SPEC
    if not meta.namespace:
        return Undecodable(Kind.SERVICE, None, "a Service without a namespace")
    return KubeService(
        namespace=intern(meta.namespace),
        name=intern(meta.name),
        uid=meta.uid,
        created=meta.creation_timestamp or "",
        type=intern(spec.type),
        families=tuple(intern(one) for one in spec.ip_families or ()),
        publishes_unready=spec.publish_not_ready_addresses,
        labels=meta.labels or {},
        annotations=meta.annotations or {},
    )


def slice_of(wire: WireSlice) -> EndpointSlice | Undecodable:
    """Return an EndpointSlice as we use it."""
    meta = wire.metadata
    if not meta.namespace:
        return Undecodable(Kind.ENDPOINT, None, "an EndpointSlice without a namespace")
    try:
        endpoints = _endpoints(wire.endpoints or ())
    except (ValueError, RecursionError) as error:
        return Undecodable(Kind.ENDPOINT, None, problem_of(error))
    return EndpointSlice(
        namespace=intern(meta.namespace),
        name=meta.name,
        service=intern((meta.labels or {}).get(SERVICE_LABEL, "")),
        family=intern(wire.address_type),
        # A port without a number stands for every port, so that there is none to scrape.
        ports=tuple(
            ContainerPort(intern(one.name or ""), one.port, intern(one.protocol or "TCP"))
            for one in wire.ports or ()
            if one.port is not None
        ),
        endpoints=tuple([one for one in endpoints if one is not None]),
    )


def _endpoints(parts: Sequence[msgspec.Raw]) -> list[SliceEndpoint | None]:
    texts = list(map(bytes, parts))
    is_kept = max(map(len, texts), default=0) <= LONGEST_KEPT
    return list(map(endpoint_of if is_kept else endpoint_of.__wrapped__, texts))


@lru_cache(maxsize=ENDPOINTS_KEPT)
def endpoint_of(raw: bytes) -> SliceEndpoint | None:
    """Return an endpoint at the first of its addresses, which all lead to the same place; None without one.

    A condition that is missing means ready, or as ready as the endpoint is (Kubernetes: EndpointConditions).
    """
    wire = _ENDPOINT.decode(raw)
    if not wire.addresses:
        return None
    conditions, reference = wire.conditions, wire.target_ref or _NO_REFERENCE
    ready = conditions is None or conditions.ready is not False
    return SliceEndpoint(
        address=wire.addresses[0],
        pod=reference.name if reference.kind == "Pod" else "",
        node=intern(wire.node_name or ""),
        zone=intern(wire.zone or ""),
        ready=ready,
        serving=ready if conditions is None or conditions.serving is None else conditions.serving,
        pod_uid=reference.uid if reference.kind == "Pod" else "",
    )
