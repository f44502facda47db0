"""The service IDs of Pods and Nodes, and what an ID of the original program says."""

from k8s_consul_registrar.model import Kind, ObjectKey

POD_PREFIX = "pod--"
NODE_PREFIX = "node--"


def pod_service_id(namespace: str, name: str, prefix: str = "") -> str:
    """Return the service ID of a Pod; another Pod may have the same (see `claims`)."""
    return f"{prefix}{POD_PREFIX}{namespace}--{name}"


def pod_port_id(service_id: str, port: int) -> str:
    """Return the service ID of a further port of the Pod that has this ID for its first."""
    return f"{service_id}--{port}"


def node_service_id(address: str, prefix: str = "") -> str:
    """Return the service ID of the Node at an address."""
    return f"{prefix}{NODE_PREFIX}{address}"


def kind_of_id(service_id: str) -> Kind | None:
    """Tell the kind from an ID's prefix, None where it has neither."""
    if service_id.startswith(POD_PREFIX):
        return Kind.POD
    if service_id.startswith(NODE_PREFIX):
        return Kind.NODE
    return None


def pod_of_id(service_id: str, namespace: str) -> ObjectKey | None:
    """Name the Pod behind an ID whose namespace is known; the ID alone may be read in two ways."""
    prefix = f"{POD_PREFIX}{namespace}--"
    if namespace and service_id.startswith(prefix) and len(service_id) > len(prefix):
        return ObjectKey(Kind.POD, namespace, service_id[len(prefix) :])
    return None
