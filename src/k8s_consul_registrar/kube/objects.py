"""Objects and watch events out of the API server's JSON: only the fields we use, one object at a time.

The structs below name those fields and nothing else, so a 7 KB Pod costs a few hundred bytes and the rest
of it is skipped, not parsed. Go encodes an absent slice or map as `null` where the field lacks
`omitempty` (a bookmark has `"containers": null`), hence the many `| None`. A watch answers with one JSON object a
line (Kubernetes API concepts, "Efficient detection of changes").
"""

from collections.abc import Callable, Mapping
from sys import intern
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import msgspec

from k8s_consul_registrar.errors import ClusterError, ClusterRefused
from k8s_consul_registrar.kube.responses import RESOURCES, ApiAction, cluster_error, decode_status
from k8s_consul_registrar.kube.service_objects import (
    Wire,
    WireService,
    WireSlice,
    problem_of,
    service_of,
    slice_of,
)
from k8s_consul_registrar.kube.wire import (
    WireCondition,
    WireIp,
    WireNamespace,
    WireNode,
    WireNodeStatus,
    WireOwner,
    WirePod,
    WirePodSpec,
    WirePodStatus,
)
from k8s_consul_registrar.model import (
    CLUSTER_KINDS,
    ContainerPort,
    EndpointSlice,
    Kind,
    KubeService,
    Namespace,
    Node,
    NodeAddress,
    ObjectKey,
    Pod,
    ServiceWithSlices,
    Undecodable,
)

Item: TypeAlias = Pod | Node | Namespace | KubeService | EndpointSlice | ServiceWithSlices | Undecodable
ItemT = TypeVar("ItemT")

KUBELET_PORT = 10250
# A version is a number of at most 20 digits in practice; a longer one would not fit into a request.
VERSION_LENGTH = 256
# etcd takes 1.5 MiB a request by default and few raise it far; JSON of it is a few times that at most.
LINE_LIMIT = 32 << 20


class _Event(Wire, Generic[ItemT]):
    type: str
    object: ItemT


class _Name(Wire):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class _Named(Wire):
    metadata: _Name


_OBJECTS: Mapping[Kind, msgspec.json.Decoder[Any]] = {
    Kind.POD: msgspec.json.Decoder(WirePod),
    Kind.NODE: msgspec.json.Decoder(WireNode),
    Kind.SERVICE: msgspec.json.Decoder(WireService),
    Kind.ENDPOINT: msgspec.json.Decoder(WireSlice),
    Kind.NAMESPACE: msgspec.json.Decoder(WireNamespace),
}
_EVENTS: Mapping[Kind, msgspec.json.Decoder[_Event[Any]]] = {
    Kind.POD: msgspec.json.Decoder(_Event[WirePod]),
    Kind.NODE: msgspec.json.Decoder(_Event[WireNode]),
    Kind.SERVICE: msgspec.json.Decoder(_Event[WireService]),
    Kind.ENDPOINT: msgspec.json.Decoder(_Event[WireSlice]),
    Kind.NAMESPACE: msgspec.json.Decoder(_Event[WireNamespace]),
}
_NAMED = msgspec.json.Decoder(_Named)
_EMPTY_SPEC = WirePodSpec()
_EMPTY_POD_STATUS = WirePodStatus()
_EMPTY_NODE_STATUS = WireNodeStatus()
_NO_OWNER = WireOwner()


def decode_object(raw: bytes | msgspec.Raw, kind: Kind) -> Item:
    """Decode one object of the kind; never raises on its content."""
    return decode_versioned(raw, kind)[0]


def decode_versioned(raw: bytes | msgspec.Raw, kind: Kind) -> tuple[Item, str]:
    """Decode one object with its resourceVersion, empty where not even that can be read."""
    try:
        wire = _OBJECTS[kind].decode(raw)
        return MAKERS[kind](wire), wire.metadata.resource_version
    except (ValueError, RecursionError) as error:
        return _undecodable(raw, kind, problem_of(error))


def decode_event(line: bytes, kind: Kind) -> tuple[str, Item, str] | None:
    """Decode a watch event about an object in one go: its type, the object and its resourceVersion.

    None stands for an event of another shape, or an object that cannot be read: those take a closer look.
    """
    try:
        event = _EVENTS[kind].decode(line)
        return event.type, MAKERS[kind](event.object), event.object.metadata.resource_version
    except (ValueError, RecursionError):
        return None


def _pod(wire: WirePod) -> Pod | Undecodable:
    meta, spec, status = wire.metadata, wire.spec or _EMPTY_SPEC, wire.status or _EMPTY_POD_STATUS
    if not meta.namespace:
        return Undecodable(Kind.POD, None, "a Pod without a namespace")
    owner = _owner(meta.owner_references)
    return Pod(
        namespace=intern(meta.namespace),
        name=meta.name,
        uid=meta.uid,
        created=meta.creation_timestamp or "",
        phase=intern(status.phase),
        ip=status.pod_ip,
        host_ip=intern(status.host_ip),
        node=intern(spec.node_name),
        host_network=spec.host_network,
        deleted=meta.deletion_timestamp is not None,
        ready=_is_ready(status.conditions),
        labels=meta.labels or {},
        annotations=meta.annotations or {},
        ports=_ports(spec),
        owner_kind=intern(owner.kind),
        owner=owner.name,
        ips=_ips(status.pod_ips),
        host_ips=_ips(status.host_ips),
    )


def _node(wire: WireNode) -> Node:
    meta, status = wire.metadata, wire.status or _EMPTY_NODE_STATUS
    endpoint = status.daemon_endpoints.kubelet_endpoint if status.daemon_endpoints else None
    return Node(
        name=intern(meta.name),
        uid=meta.uid,
        created=meta.creation_timestamp or "",
        addresses=tuple(NodeAddress(intern(entry.type), entry.address) for entry in status.addresses or ()),
        kubelet_port=(endpoint.port if endpoint else 0) or KUBELET_PORT,
        ready=_is_ready(status.conditions),
        labels=meta.labels or {},
    )


def _namespace(wire: WireNamespace) -> Namespace:
    return Namespace(intern(wire.metadata.name), wire.metadata.labels or {})


MAKERS: Mapping[Kind, Callable[[Any], Item]] = {
    Kind.POD: _pod,
    Kind.NODE: _node,
    Kind.SERVICE: service_of,
    Kind.ENDPOINT: slice_of,
    Kind.NAMESPACE: _namespace,
}


def _ports(spec: WirePodSpec) -> tuple[ContainerPort, ...]:
    """Return the ports of what runs for the Pod's whole life.

    An init container that restarts always is a sidecar (Kubernetes: "Sidecar Containers"); any other has
    ended when the Pod runs.
    """
    running = spec.containers or []
    if spec.init_containers:
        running = running + [one for one in spec.init_containers if one.restart_policy == "Always"]
    ports: list[ContainerPort] = []
    for container in running:
        if container.ports:
            ports += [
                ContainerPort(
                    intern(port.name),
                    port.container_port,
                    intern(port.protocol or "TCP"),
                    port.host_port,
                    intern(container.name),
                )
                for port in container.ports
            ]
    return tuple(ports)


def _ips(entries: list[WireIp] | None) -> tuple[str, ...]:
    return tuple([one.ip for one in entries]) if entries and len(entries) > 1 else ()


def _owner(references: list[WireOwner] | None) -> WireOwner:
    return next((one for one in references or () if one.controller), _NO_OWNER)


def _is_ready(conditions: list[WireCondition] | None) -> bool:
    for condition in conditions or ():  # noqa: SIM110 - a generator costs three times as much
        if condition.type == "Ready" and condition.status == "True":
            return True
    return False


def _undecodable(raw: bytes | msgspec.Raw, kind: Kind, problem: str) -> tuple[Undecodable, str]:
    try:
        meta = _NAMED.decode(raw).metadata
        if kind is Kind.ENDPOINT:
            # Which Service it is a part of is in what cannot be read, so that it may hold any endpoint.
            return Undecodable(kind, None, problem), meta.resource_version
    except (ValueError, RecursionError):
        return Undecodable(kind, None, problem), ""
    namespace = "" if kind in CLUSTER_KINDS else meta.namespace
    is_named = bool(meta.name and (namespace or kind in CLUSTER_KINDS))
    key = ObjectKey(kind, namespace, meta.name) if is_named else None
    return Undecodable(kind, key, problem), meta.resource_version


class Changed(msgspec.Struct, frozen=True, gc=False):
    """An object was added or modified.

    `version` is the one to resume from, empty where it could not be read or is absurdly long. `is_added` says that the object
    was not there before, or did not match what is watched.
    """

    item: Item
    version: str
    is_added: bool = True


class Deleted(msgspec.Struct, frozen=True, gc=False):
    """An object is gone; `item` is its last state."""

    item: Item
    version: str


class Bookmark(msgspec.Struct, frozen=True):
    """Nothing else changed up to `version`."""

    version: str


class Broken(msgspec.Struct, frozen=True):
    """The watch cannot go on, for the reason `error`; it is the last event of its stream."""

    error: ClusterError
    version: str = ""


WatchEvent: TypeAlias = Changed | Deleted | Bookmark | Broken


class _RawEvent(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Version(msgspec.Struct, rename="camel"):
    resource_version: Annotated[str, msgspec.Meta(min_length=1, max_length=VERSION_LENGTH)]


class _Bookmark(msgspec.Struct):
    metadata: _Version


_RAW_EVENT = msgspec.json.Decoder(_RawEvent)
_BOOKMARK = msgspec.json.Decoder(_Bookmark)


class WatchDecoder:
    """Decodes one watch stream, fed in pieces of any size.

    After `Broken` nothing further comes out. A line cut off by the end of the stream is no event.
    """

    def __init__(self, kind: Kind, namespace: str = "", *, line_limit: int = LINE_LIMIT) -> None:
        self._kind = kind
        self._action = ApiAction("watch", RESOURCES[kind], namespace)
        self._line_limit = line_limit
        self._buffer = bytearray()
        self._is_broken = False

    def feed(self, data: bytes) -> list[WatchEvent]:
        """Return the events that are complete with these bytes."""
        events: list[WatchEvent] = []
        start = 0
        while not self._is_broken and (end := data.find(b"\n", start)) >= 0:
            # Only these bytes are searched: a long line costs O(n).
            line = bytes(self._buffer) + data[start:end]
            self._buffer.clear()
            start = end + 1
            if line.strip():
                events.append(self._decode(line))
        self._buffer += data[start:]
        if len(self._buffer) > self._line_limit and not self._is_broken:
            events.append(self._broken(f"an event is longer than {self._line_limit} bytes"))
        if self._is_broken:
            self._buffer.clear()
        return events

    def _decode(self, line: bytes) -> WatchEvent:
        whole = decode_event(line, self._kind)
        if whole is not None and (event := _event(*whole)) is not None:
            return event
        try:
            envelope = _RAW_EVENT.decode(line)
        except (ValueError, RecursionError):
            return self._broken("a line is not an event")
        match envelope.type:
            case "BOOKMARK":
                return self._bookmark(envelope.object)
            case "ERROR":
                self._is_broken = True
                status = decode_status(envelope.object)
                return Broken(cluster_error(self._action, status.code, status))
        event = _event(envelope.type, *decode_versioned(envelope.object, self._kind))
        return event or self._broken(f"an event of the unknown type {envelope.type[:30]!r}")

    def _bookmark(self, raw: msgspec.Raw) -> WatchEvent:
        try:
            return Bookmark(_BOOKMARK.decode(raw).metadata.resource_version)
        except (ValueError, RecursionError):
            return self._broken("a bookmark without a usable version")

    def _broken(self, problem: str) -> Broken:
        self._is_broken = True
        return Broken(ClusterRefused(f"cannot {self._action}: {problem}", 200))


def _event(word: str, item: Item, version: str) -> Changed | Deleted | None:
    """Return the event of this type about an object, None where the type is not about objects."""
    match word:
        case "ADDED" | "MODIFIED":
            return Changed(item, _usable(version), is_added=word == "ADDED")
        case "DELETED":
            return Deleted(item, _usable(version))
    return None


def _usable(version: str) -> str:
    return version if len(version) <= VERSION_LENGTH else ""
