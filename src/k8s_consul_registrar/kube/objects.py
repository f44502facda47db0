"""Objects out of the API server's JSON: only the fields we use, one object at a time.

The structs below name those fields and nothing else, so a 7 KB Pod costs a few hundred bytes and the rest
of it is skipped, not parsed. Go encodes an absent slice or map as `null` where the field lacks
`omitempty` (a bookmark has `"containers": null`), hence the many `| None`.
"""

from collections.abc import Callable, Mapping, Sequence
from sys import intern
from typing import Annotated, Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec

from k8s_consul_registrar.errors import ClusterRefused
from k8s_consul_registrar.kube.service_objects import (
    Metadata,
    Wire,
    WireService,
    WireSlice,
    problem_of,
    service_of,
    slice_of,
)
from k8s_consul_registrar.model import (
    ContainerPort,
    EndpointSlice,
    Kind,
    KubeService,
    Node,
    NodeAddress,
    ObjectKey,
    Pod,
    ServiceWithSlices,
    Undecodable,
)

Item: TypeAlias = Pod | Node | KubeService | EndpointSlice | ServiceWithSlices | Undecodable
ItemT = TypeVar("ItemT")

KUBELET_PORT = 10250
# A version is a number of at most 20 digits in practice; a longer one would not fit into a request.
VERSION_LENGTH = 256
LIST_KINDS = {
    Kind.POD: "PodList",
    Kind.NODE: "NodeList",
    Kind.SERVICE: "ServiceList",
    Kind.ENDPOINT: "EndpointSliceList",
}


class Page(NamedTuple):
    """A part of a list; `continue_token` is the one of the whole page that the server sent."""

    items: tuple[Item, ...]
    resource_version: str
    continue_token: str


class _Condition(Wire):
    type: str = ""
    status: str = ""


class _Port(Wire):
    container_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    name: str = ""
    protocol: str = "TCP"


class _Container(Wire):
    ports: list[_Port] | None = None
    restart_policy: str | None = None


class _PodSpec(Wire):
    node_name: str = ""
    host_network: bool = False
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = None


class _PodStatus(Wire):
    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    host_ip: str = msgspec.field(name="hostIP", default="")
    conditions: list[_Condition] | None = None


class _Pod(Wire):
    metadata: Metadata
    spec: _PodSpec | None = None
    status: _PodStatus | None = None


class _Address(Wire):
    type: str = ""
    address: str = ""


class _Endpoint(Wire):
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = msgspec.field(name="Port", default=0)


class _DaemonEndpoints(Wire):
    kubelet_endpoint: _Endpoint | None = None


class _NodeStatus(Wire):
    addresses: list[_Address] | None = None
    daemon_endpoints: _DaemonEndpoints | None = None
    conditions: list[_Condition] | None = None


class _Node(Wire):
    metadata: Metadata
    status: _NodeStatus | None = None


class _Event(Wire, Generic[ItemT]):
    type: str
    object: ItemT


class _Name(Wire):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class _Named(Wire):
    metadata: _Name


class _ListMetadata(Wire):
    resource_version: Annotated[str, msgspec.Meta(min_length=1, max_length=VERSION_LENGTH)]
    continue_token: str = msgspec.field(name="continue", default="")


class _List(Wire, Generic[ItemT], gc=True):
    """A list; `items` is required, so that a body without them is never taken for an empty cluster."""

    kind: str
    metadata: _ListMetadata
    items: list[ItemT] | None


_OBJECTS: Mapping[Kind, msgspec.json.Decoder[Any]] = {
    Kind.POD: msgspec.json.Decoder(_Pod),
    Kind.NODE: msgspec.json.Decoder(_Node),
    Kind.SERVICE: msgspec.json.Decoder(WireService),
    Kind.ENDPOINT: msgspec.json.Decoder(WireSlice),
}
_EVENTS: Mapping[Kind, msgspec.json.Decoder[_Event[Any]]] = {
    Kind.POD: msgspec.json.Decoder(_Event[_Pod]),
    Kind.NODE: msgspec.json.Decoder(_Event[_Node]),
    Kind.SERVICE: msgspec.json.Decoder(_Event[WireService]),
    Kind.ENDPOINT: msgspec.json.Decoder(_Event[WireSlice]),
}
_LISTS: Mapping[Kind, msgspec.json.Decoder[_List[Any]]] = {
    Kind.POD: msgspec.json.Decoder(_List[_Pod]),
    Kind.NODE: msgspec.json.Decoder(_List[_Node]),
    Kind.SERVICE: msgspec.json.Decoder(_List[WireService]),
    Kind.ENDPOINT: msgspec.json.Decoder(_List[WireSlice]),
}
_RAW_LIST = msgspec.json.Decoder(_List[msgspec.Raw])
_NAMED = msgspec.json.Decoder(_Named)
_EMPTY_SPEC = _PodSpec()
_EMPTY_POD_STATUS = _PodStatus()
_EMPTY_NODE_STATUS = _NodeStatus()


class RawPage(NamedTuple):
    """One page whose items are not ours yet: as they were sent, or as bytes where one of them cannot be read."""

    kind: Kind
    items: Sequence[Wire | msgspec.Raw]
    resource_version: str
    continue_token: str

    def decode(self, part: slice = slice(None)) -> Page:
        """Convert a part of the items; one that cannot be read becomes an `Undecodable` in its place."""
        items = tuple([_item(item, self.kind) for item in self.items[part]])
        return Page(items, self.resource_version, self.continue_token)


def split_page(body: bytes, kind: Kind) -> RawPage:
    """Read one answer to a list request: its items, and where the list goes on.

    Items are read in one go, which costs a third less than one by one; only a page with an item that cannot be
    read is taken apart. Raises ClusterRefused where the body is not a list of this kind as a whole.
    """
    expected = LIST_KINDS[kind]
    try:
        answer = _LISTS[kind].decode(body)
    except (ValueError, RecursionError):
        answer = _split_list(body, expected)
    if answer.kind != expected:
        raise ClusterRefused(f"the answer is not a {expected} but a {answer.kind[:60]!r}", 200)
    return RawPage(kind, answer.items or [], answer.metadata.resource_version, answer.metadata.continue_token)


def _split_list(body: bytes, expected: str) -> _List[msgspec.Raw]:
    try:
        return _RAW_LIST.decode(body)
    except (ValueError, RecursionError) as error:
        raise ClusterRefused(f"the answer is not a {expected}: {problem_of(error)}", 200) from None


def _item(item: Wire | msgspec.Raw, kind: Kind) -> Item:
    return decode_object(item, kind) if isinstance(item, msgspec.Raw) else _MAKERS[kind](item)


def decode_object(raw: bytes | msgspec.Raw, kind: Kind) -> Item:
    """Decode one object of the kind; never raises on its content."""
    return decode_versioned(raw, kind)[0]


def decode_versioned(raw: bytes | msgspec.Raw, kind: Kind) -> tuple[Item, str]:
    """Decode one object with its resourceVersion, empty where not even that can be read."""
    try:
        wire = _OBJECTS[kind].decode(raw)
        return _MAKERS[kind](wire), wire.metadata.resource_version
    except (ValueError, RecursionError) as error:
        return _undecodable(raw, kind, problem_of(error))


def decode_event(line: bytes, kind: Kind) -> tuple[str, Item, str] | None:
    """Decode a watch event about an object in one go: its type, the object and its resourceVersion.

    None stands for an event of another shape, or an object that cannot be read: those take a closer look.
    """
    try:
        event = _EVENTS[kind].decode(line)
        return event.type, _MAKERS[kind](event.object), event.object.metadata.resource_version
    except (ValueError, RecursionError):
        return None


def _pod(wire: _Pod) -> Pod | Undecodable:
    meta, spec, status = wire.metadata, wire.spec or _EMPTY_SPEC, wire.status or _EMPTY_POD_STATUS
    if not meta.namespace:
        return Undecodable(Kind.POD, None, "a Pod without a namespace")
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
    )


def _node(wire: _Node) -> Node:
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


_MAKERS: Mapping[Kind, Callable[[Any], Item]] = {
    Kind.POD: _pod,
    Kind.NODE: _node,
    Kind.SERVICE: service_of,
    Kind.ENDPOINT: slice_of,
}


def _ports(spec: _PodSpec) -> tuple[ContainerPort, ...]:
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
                ContainerPort(intern(port.name), port.container_port, intern(port.protocol or "TCP"))
                for port in container.ports
            ]
    return tuple(ports)


def _is_ready(conditions: list[_Condition] | None) -> bool:
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
    namespace = "" if kind is Kind.NODE else meta.namespace
    is_named = bool(meta.name and (namespace or kind is Kind.NODE))
    key = ObjectKey(kind, namespace, meta.name) if is_named else None
    return Undecodable(kind, key, problem), meta.resource_version
