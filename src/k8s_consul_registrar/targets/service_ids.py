"""Service IDs of Pods and Nodes; the original program uses the same format."""

from k8s_consul_registrar.model import Kind, ObjectKey

POD_PREFIX = "pod--"
NODE_PREFIX = "node--"


def pod_service_id(namespace: str, name: str, prefix: str = "") -> str:
    """Return the service ID of a Pod, which two Pods can share: `a` with `b--c`, and `a--b` with `c`."""
    return f"{prefix}{POD_PREFIX}{namespace}--{name}"


def pod_port_id(service_id: str, port: int) -> str:
    """Return the service ID of another port of the Pod whose first port has `service_id`."""
    return f"{service_id}--{port}"


def node_service_id(address: str, prefix: str = "") -> str:
    """Return the service ID of the Node at this address."""
    return f"{prefix}{NODE_PREFIX}{address}"


def kind_of_id(service_id: str) -> Kind | None:
    """Return the kind that the prefix of an ID stands for, None if it has neither prefix."""
    if service_id.startswith(POD_PREFIX):
        return Kind.POD
    if service_id.startswith(NODE_PREFIX):
        return Kind.NODE
    return None


def pod_of_id(service_id: str, namespace: str) -> ObjectKey | None:
    """Return the key of the Pod in a service ID; without the namespace an ID can be ambiguous."""
    prefix = f"{POD_PREFIX}{namespace}--"
    if namespace and service_id.startswith(prefix) and len(service_id) > len(prefix):
        return ObjectKey(Kind.POD, namespace, service_id[len(prefix) :])
    return None
