"""The values everyone shares: what Kubernetes has, what Prometheus scrapes, what Consul records.

Most are msgspec structs: they load and are made ten times faster than frozen dataclasses. The garbage
collector does not visit those that come by the ten thousand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import ClassVar, NamedTuple, TypeAlias

import msgspec


class Kind(StrEnum):
    """The kinds of object that are followed.

    `ENDPOINT` is the kind of EndpointSlices as a source, and of the targets made of them.
    """

    POD = "pod"
    NODE = "node"
    SERVICE = "service"
    ENDPOINT = "endpoint"
    NAMESPACE = "namespace"


# The kinds that a target can have. Services only say how their endpoints are scraped, Namespaces give labels.
TARGET_KINDS = (Kind.POD, Kind.NODE, Kind.ENDPOINT)
# The kinds of object that are in no namespace.
CLUSTER_KINDS = frozenset({Kind.NODE, Kind.NAMESPACE})
# Those counted from the start, even where there is none.
USUAL_KINDS = (Kind.POD, Kind.NODE)


class ObjectKey(msgspec.Struct, frozen=True, order=True, gc=False, cache_hash=True):
    """Names one Kubernetes object; `namespace` is empty for a Node and for a Namespace.

    The key of an endpoint's target has the name of its Service: EndpointSlices come and go.
    """

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


class Source(NamedTuple):
    """Where objects are listed from: a kind, or a kind in one namespace when namespaces are chosen."""

    kind: Kind
    namespace: str = ""

    @property
    def needed(self) -> tuple["Source", ...]:
        """The sources that show its objects together: endpoints are known by their slices and their Service."""
        return (self, Source(Kind.SERVICE, self.namespace)) if self.kind is Kind.ENDPOINT else (self,)

    def __str__(self) -> str:
        return f"{self.kind}s of {self.namespace}" if self.namespace else f"{self.kind}s"


class Selector(NamedTuple):
    """The objects of a kind that the API server lists and watches, by labels and by fields; empty texts select all."""

    labels: str = ""
    fields: str = ""


EVERY_OBJECT = Selector()


class ContainerPort(msgspec.Struct, frozen=True, gc=False):
    """A port a container declares; `number` is 1 to 65535, `host_port` 0 without one."""

    name: str
    number: int
    protocol: str
    host_port: int = 0
    container: str = ""


class NamespacedObject(msgspec.Struct, frozen=True, gc=False):
    """An object of one kind, in a namespace."""

    KIND: ClassVar[Kind]
    namespace: str
    name: str

    @property
    def key(self) -> ObjectKey:
        """The name of this object."""
        return ObjectKey(self.KIND, self.namespace, self.name)


class Pod(NamespacedObject, frozen=True, gc=False):
    """The few fields of a Pod that decide how it is scraped.

    `created` is the API server's RFC 3339 text (it sorts as time does). `deleted` is True once the API server
    was asked to delete the Pod, which may still be running. `ports` are those of the containers and of native
    sidecars (init containers whose restartPolicy is Always). `owner` is its controller, empty without one.
    `ips` and `host_ips` are those of both address families, where there are two.
    """

    KIND: ClassVar[Kind] = Kind.POD
    uid: str
    created: str
    phase: str
    ip: str
    host_ip: str = ""
    node: str = ""
    host_network: bool = False
    deleted: bool = False
    ready: bool = False
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    annotations: Mapping[str, str] = msgspec.field(default_factory=dict)
    ports: tuple[ContainerPort, ...] = ()
    owner_kind: str = ""
    owner: str = ""
    ips: tuple[str, ...] = ()
    host_ips: tuple[str, ...] = ()


class NodeAddress(NamedTuple):
    """One entry of a Node's `status.addresses`, for example `("InternalIP", "192.0.2.10")`."""

    type: str
    address: str


@dataclass(frozen=True, slots=True)
class Node:
    """The few fields of a Node that decide how its kubelet is reached.

    `kubelet_port` is `status.daemonEndpoints.kubeletEndpoint.Port`, 10250 where the Node names none.
    """

    name: str
    uid: str
    created: str
    addresses: tuple[NodeAddress, ...] = ()
    kubelet_port: int = 10250
    ready: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> ObjectKey:
        """The name of this object."""
        return ObjectKey(Kind.NODE, "", self.name)


class Namespace(msgspec.Struct, frozen=True, gc=False):
    """A Namespace and its labels."""

    name: str
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)

    @property
    def key(self) -> ObjectKey:
        """The name of this object."""
        return ObjectKey(Kind.NAMESPACE, "", self.name)


class KubeService(NamespacedObject, frozen=True, gc=False):
    """The few fields of a Kubernetes Service that decide how its endpoints are scraped.

    `families` are those of `spec.ipFamilies`, the primary one first. `publishes_unready` is
    `spec.publishNotReadyAddresses`.
    """

    KIND: ClassVar[Kind] = Kind.SERVICE
    uid: str
    created: str
    type: str = "ClusterIP"
    families: tuple[str, ...] = ()
    publishes_unready: bool = False
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    annotations: Mapping[str, str] = msgspec.field(default_factory=dict)


class SliceEndpoint(msgspec.Struct, frozen=True, gc=False):
    """One endpoint of an EndpointSlice; `pod` and `pod_uid` are empty where it is not a Pod's."""

    address: str
    pod: str = ""
    node: str = ""
    zone: str = ""
    ready: bool = True
    serving: bool = True
    pod_uid: str = ""


class EndpointSlice(NamespacedObject, frozen=True, gc=False):
    """A part of the endpoints of one Service; `family` is IPv4, IPv6 or FQDN."""

    KIND: ClassVar[Kind] = Kind.ENDPOINT
    service: str
    family: str
    ports: tuple[ContainerPort, ...] = ()
    endpoints: tuple[SliceEndpoint, ...] = ()


class ServiceWithSlices(msgspec.Struct, frozen=True):
    """A Service and its EndpointSlices, read together; `service` is Undecodable if it could not be read."""

    key: ObjectKey
    service: "KubeService | Undecodable"
    slices: tuple[EndpointSlice, ...]


class Undecodable(msgspec.Struct, frozen=True):
    """An item of a list that could not be read; `key` is None when not even its name could."""

    kind: Kind
    key: ObjectKey | None
    problem: str


class Target(msgspec.Struct, frozen=True, gc=False):
    """An address Prometheus scrapes, as one Kubernetes object asks for it.

    `meta` holds what the object itself decides, sorted by key; whose cluster it is and which shard it
    gets are added when a service is made of it. `rank` orders targets that ask for the same `id`: the
    least one comes first. Where `name` and `tags` depend on the shard its place is still held open
    (`targets.service_names`). `ready` is None if readiness is not registered. It `awaits` what its Namespace and Node
    give to `meta` (`targets.meta`) while they are not known. `has_own_address` is True for a Pod that is scraped at an IP
    of its own: no other Pod can rightly be at the same address and port, as can happen on a Node's network or
    behind the proxy. `is_terminating` is True while the Pod is being deleted. With `has_own_zone` the Pod's own
    labels name the zone. `notes` say in what it differs from what the object asks for (`errors`).
    """

    key: ObjectKey
    id: str
    name: str
    address: str
    port: int
    meta: tuple[tuple[str, str], ...]
    rank: tuple[int, str, str] = (0, "", "")
    tags: tuple[str, ...] = ()
    ready: bool | None = None
    awaits: tuple[Kind, ...] = ()
    has_own_zone: bool = False
    has_own_address: bool = False
    is_terminating: bool = False
    notes: tuple[str, ...] = ()


class Rejection(msgspec.Struct, frozen=True):
    """Why an object that asks to be scraped is not a target.

    `reason` is one of a fixed set (`errors`), fit for a metric's label; `detail` is for people.
    What Consul already holds of the object, `id` included, is left as it is while it is rejected. `uid` is the
    object's, empty unless Kubernetes Events tell of it.
    """

    key: ObjectKey
    reason: str
    detail: str
    id: str = ""
    uid: str = ""


# An object's targets, none if it asks for none, or its rejection.
Resolved: TypeAlias = tuple[Target, ...] | Rejection

# What `managed_by` says, in the meta of all that a registrar wrote.
MANAGED_BY = "k8s-consul-registrar"
# The `index` of a service that an agent holds and the catalog lacks: it is to be registered again.
UNSYNCED = -1


class Service(msgspec.Struct, frozen=True, gc=False, eq=False):
    """Consul's record of a target.

    `meta` and `tags` are sorted. `index` is the ModifyIndex of the catalog's record that this one replaces,
    0 where there must be none yet or the record comes from an agent; `UNSYNCED` marks one that an agent
    holds and the catalog lacks. It takes no part in equality. `ready` is what a service check says of the
    target, None where there is to be no check.
    """

    id: str
    name: str
    address: str
    port: int
    meta: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ()
    index: int = 0
    ready: bool | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Service):
            return NotImplemented
        return (
            self.id == other.id
            and self.meta == other.meta
            and self.address == other.address
            and self.port == other.port
            and self.name == other.name
            and self.tags == other.tags
            and self.ready == other.ready
        )

    __ne__ = object.__ne__  # that of msgspec does not negate another __eq__

    def __hash__(self) -> int:
        return hash((self.id, self.name, self.address, self.port, self.meta, self.tags, self.ready))

    def __post_init__(self) -> None:
        """Refuse an empty ID: a catalog deregister without one removes the whole node."""
        if not self.id:
            raise ValueError("a service needs an ID")

    def value(self, key: str) -> str:
        """Return the value of a meta key, empty when absent."""
        return dict(self.meta).get(key, "")


class Drift(IntEnum):
    """Changes of the services in Consul since the last full read, as far as a cheap look shows them."""

    NONE = 0
    CHANGED = 1  # another writer may have changed something
    EMPTIED = 2  # the services are gone


# The check that Consul keeps for each node that has an agent, and what it says of one that cannot be reached.
SERF_HEALTH = "serfHealth"
CRITICAL = "critical"


class AgentHealth(NamedTuple):
    """A node as a check in the catalog shows it; `version` is its ModifyIndex, another after each change."""

    node: str
    check: str
    status: str
    version: int


class WriteFailure(msgspec.Struct, frozen=True):
    """A write that Consul refused for this one service, and why."""

    id: str
    problem: str


class Written(msgspec.Struct, frozen=True):
    """Results of a batch of writes: how many were done, and which were refused one by one.

    `indexes` are the new ModifyIndexes by ID, from the catalog only. `stale` are IDs whose record was not
    the one that `Service.index` names, because another client wrote it: they must be read again.
    """

    done: int = 0
    failures: tuple[WriteFailure, ...] = ()
    indexes: Mapping[str, int] = msgspec.field(default_factory=dict)
    stale: tuple[str, ...] = ()

    def __add__(self, other: "Written") -> "Written":
        return Written(
            self.done + other.done,
            (*self.failures, *other.failures),
            {**self.indexes, **other.indexes},
            (*self.stale, *other.stale),
        )


class Ghosts(NamedTuple):
    """Services that the catalog shows at our agent's node and that the agent does not hold.

    `deregistered` are the IDs that the agent deregistered for this process. `may_write` is False if the agent
    has never written its node, for which it needs the right that a removal needs.
    """

    node: str
    services: tuple[Service, ...] = ()
    deregistered: frozenset[str] = frozenset()
    may_write: bool = True


@dataclass(frozen=True, slots=True)
class Lease:
    """Who holds a lock that is kept in the API server, and since when (coordination.k8s.io/v1).

    An empty `holder` means that it is free. `duration` is in seconds; `acquired` and `renewed` are the
    holder's own wall clock as MicroTime text. `version` is the resourceVersion, empty where there is no such
    object yet; `origin` is the whole object as it was read, so that a write keeps what others put there.
    Leases are equal when their records are.
    """

    holder: str
    duration: int
    acquired: str = ""
    renewed: str = ""
    transitions: int = 0
    version: str = field(default="", compare=False)
    origin: bytes = field(default=b"", repr=False, compare=False)
