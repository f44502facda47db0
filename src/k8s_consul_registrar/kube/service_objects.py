"""Services and EndpointSlices out of the API server's JSON, and what the JSON of every kind has in common."""

from collections.abc import Iterable, Sequence
from itertools import compress, count
from operator import ne
from sys import intern
from typing import Annotated, NamedTuple

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
# Endpoints whose bytes are kept, and the bytes of the longest: a few megabytes.
ENDPOINTS_KEPT, LONGEST_KEPT = 16_384, 512
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
        endpoints = _SEEN.read((meta.namespace, meta.name), wire.endpoints or ())
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
        endpoints=tuple(filter(None, endpoints)),
    )


def differing(before: Sequence[object], after: Sequence[object]) -> tuple[slice, slice]:
    """Return the parts of two sequences between what they have in common at their beginning and at their end."""
    shorter = min(len(before), len(after))
    start = _alike(before, after, shorter)
    end = min(_alike(reversed(before), reversed(after), shorter), shorter - start)
    return slice(start, len(before) - end), slice(start, len(after) - end)


def _alike(before: Iterable[object], after: Iterable[object], most: int) -> int:
    """Return how many items from the first on are equal; a loop in Python would take ten times as long."""
    return next(compress(count(), map(ne, before, after)), most)


class _Slice(NamedTuple):
    raws: list[msgspec.Raw]
    endpoints: list[SliceEndpoint | None]


class _SeenSlices:
    """The endpoints of the slices that were read last, with their bytes: an event repeats all, and few of them changed."""

    def __init__(self) -> None:
        self._slices: dict[tuple[str, str], _Slice] = {}
        self._size = 0

    def read(self, key: tuple[str, str], raws: Sequence[msgspec.Raw]) -> list[SliceEndpoint | None]:
        """Return the endpoints of a slice; those whose bytes did not change are the same objects as before."""
        seen = self._slices.pop(key, None) or _Slice([], [])
        self._size -= len(seen.raws)
        was, now = differing(seen.raws, raws)
        moved = dict(zip(map(bytes, seen.raws[was]), seen.endpoints[was], strict=True))
        texts = list(map(bytes, raws[now]))
        seen.endpoints[was] = [moved.get(text) or _endpoint(text) for text in texts]
        if raws and max(map(len, texts), default=0) <= LONGEST_KEPT:
            # Copies: the bytes they came in are those of a whole page.
            seen.raws[was] = map(msgspec.Raw, texts)
            self._slices[key] = seen
            self._size += len(seen.raws)
        while self._size > ENDPOINTS_KEPT:
            self._size -= len(self._slices.pop(next(iter(self._slices))).raws)
        return seen.endpoints


_SEEN = _SeenSlices()


def _endpoint(raw: bytes) -> SliceEndpoint | None:
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
