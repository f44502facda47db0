"""The resources of the sandbox's API server."""

from dataclasses import dataclass

_NODE_INFO = (
    b'"nodeInfo":{"machineID":"","systemUUID":"","bootID":"","kernelVersion":"","osImage":"",'
    b'"containerRuntimeVersion":"","kubeletVersion":"","kubeProxyVersion":"","operatingSystem":"",'
    b'"architecture":""}'
)


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object, and its place in URLs.

    `empty_body` follows the metadata of an object without content, which BOOKMARK events send.
    """

    plural: str
    kind: str
    empty_body: bytes
    group: str = ""
    is_namespaced: bool = True
    has_status: bool = True
    creates_on_update: bool = False
    returns_deleted: bool = False

    @property
    def api_version(self) -> str:
        """The group and version in the form of an object's `apiVersion`."""
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def qualified(self) -> str:
        """The plural with its group, for messages."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def root(self) -> str:
        """The beginning of this resource's URL path."""
        return f"/apis/{self.group}/v1" if self.group else "/api/v1"

    @property
    def type_prefix(self) -> bytes:
        """The beginning of an object with its kind and version; the rest of the object follows."""
        return f'{{"kind":"{self.kind}","apiVersion":"{self.api_version}",'.encode()

    def key(self, namespace: str, name: str) -> str:
        """Return the object's key in the store, in the order of etcd."""
        return f"{namespace}/{name}" if self.is_namespaced else name


PODS = Resource("pods", "Pod", b'"spec":{"containers":null},"status":{}', returns_deleted=True)
NODES = Resource(
    "nodes",
    "Node",
    b'"spec":{},"status":{"daemonEndpoints":{"kubeletEndpoint":{"Port":0}},' + _NODE_INFO + b"}",
    is_namespaced=False,
)
NAMESPACES = Resource("namespaces", "Namespace", b'"spec":{},"status":{}', is_namespaced=False)
LEASES = Resource(
    "leases",
    "Lease",
    b'"spec":{}',
    group="coordination.k8s.io",
    has_status=False,
    creates_on_update=True,
)
SERVICES = Resource("services", "Service", b'"spec":{},"status":{"loadBalancer":{}}', returns_deleted=True)
ENDPOINT_SLICES = Resource(
    "endpointslices",
    "EndpointSlice",
    b'"addressType":"","endpoints":null,"ports":null',
    group="discovery.k8s.io",
    has_status=False,
)
EVENTS = Resource(
    "events",
    "Event",
    b'"eventTime":null,"regarding":{},"deprecatedSource":{}',
    group="events.k8s.io",
    has_status=False,
)
RESOURCES = (PODS, NODES, NAMESPACES, LEASES, SERVICES, ENDPOINT_SLICES, EVENTS)


def resource_of(kind: str) -> Resource:
    """Return the resource of a kind; KeyError if the sandbox has none."""
    return _BY_KIND[kind]


_BY_KIND = {resource.kind: resource for resource in RESOURCES}
