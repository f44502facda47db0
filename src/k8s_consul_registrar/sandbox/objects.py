"""Builders of Kubernetes objects in the form that an API server returns."""

from collections.abc import Iterable, Mapping
from typing import Any


def pod(
    name: str,
    *,
    namespace: str = "default",
    ip: str = "",
    ips: Iterable[str] = (),
    phase: str = "Running",
    is_ready: bool = True,
    node_name: str = "",
    host_ip: str = "",
    host_ips: Iterable[str] = (),
    host_network: bool = False,
    ports: Mapping[str, int] | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return a Pod; `ports` maps the names of its container's ports to their numbers."""
    container: dict[str, Any] = {"name": "app", "image": "registry.example/app:1.0"}
    if ports:
        container["ports"] = [
            {"name": port_name, "containerPort": number, "protocol": "TCP"}
            for port_name, number in ports.items()
        ]
    spec: dict[str, Any] = {"containers": [container]}
    if node_name:
        spec["nodeName"] = node_name
    if host_network:
        spec["hostNetwork"] = True
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": _metadata(name, namespace, labels, annotations),
        "spec": spec,
        "status": pod_status(ip, ips=ips, phase=phase, is_ready=is_ready, host_ip=host_ip, host_ips=host_ips),
    }


def pod_status(
    ip: str = "",
    *,
    ips: Iterable[str] = (),
    phase: str = "Running",
    is_ready: bool = True,
    host_ip: str = "",
    host_ips: Iterable[str] = (),
) -> dict[str, Any]:
    """Return a Pod's status; without an address it has no conditions, like a Pod that is not scheduled.

    `ips` and `host_ips` are those of both families in a dual-stack cluster.
    """
    addresses = list(ips) or ([ip] if ip else [])
    hosts = list(host_ips) or ([host_ip] if host_ip else [])
    status: dict[str, Any] = {"phase": phase}
    if addresses:
        condition = {"type": "Ready", "status": str(is_ready), "lastProbeTime": None}
        status["conditions"] = [{**condition, "lastTransitionTime": None}]
        status["podIP"] = addresses[0]
        status["podIPs"] = [{"ip": address} for address in addresses]
    if hosts:
        status["hostIP"] = hosts[0]
        status["hostIPs"] = [{"ip": address} for address in hosts]
    return {**status, "qosClass": "BestEffort"}


def node(
    name: str,
    *,
    addresses: Iterable[tuple[str, str]] = (),
    kubelet_port: int = 10250,
    is_ready: bool = True,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return a Node; `addresses` are pairs such as `("InternalIP", "192.0.2.10")`."""
    info = ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion")
    more = ("kubeletVersion", "kubeProxyVersion", "operatingSystem", "architecture")
    status: dict[str, Any] = {
        "conditions": [{"type": "Ready", "status": str(is_ready), "reason": "KubeletReady"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet_port}},
        "nodeInfo": dict.fromkeys((*info, *more), ""),
    }
    if pairs := [{"type": kind, "address": address} for kind, address in addresses]:
        status["addresses"] = pairs
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": _metadata(name, "", {"kubernetes.io/hostname": name, **(labels or {})}, None),
        "spec": {},
        "status": status,
    }


def service(
    name: str,
    *,
    namespace: str = "default",
    families: Iterable[str] = ("IPv4",),
    publishes_unready: bool = False,
    external_name: str = "",
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return a Service."""
    spec: dict[str, Any] = {"type": "ClusterIP", "ipFamilies": list(families)}
    if publishes_unready:
        spec["publishNotReadyAddresses"] = True
    if external_name:
        spec = {"type": "ExternalName", "externalName": external_name}
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": _metadata(name, namespace, labels, annotations),
        "spec": spec,
        "status": {"loadBalancer": {}},
    }


def endpoint(
    address: str,
    *,
    pod: str = "",
    node: str = "",
    zone: str = "",
    is_ready: bool = True,
    is_serving: bool = True,
) -> dict[str, Any]:
    """Return one endpoint of an EndpointSlice."""
    made: dict[str, Any] = {
        "addresses": [address],
        "conditions": {"ready": is_ready, "serving": is_serving, "terminating": False},
    }
    if pod:
        made["targetRef"] = {"kind": "Pod", "name": pod}
    if node:
        made["nodeName"] = node
    if zone:
        made["zone"] = zone
    return made


def endpoint_slice(
    name: str,
    service_name: str,
    endpoints: Iterable[Mapping[str, Any]] = (),
    *,
    namespace: str = "default",
    family: str = "IPv4",
    ports: Mapping[str, int] | None = None,
    protocol: str = "TCP",
) -> dict[str, Any]:
    """Return an EndpointSlice of a Service; `ports` maps names to numbers."""
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": _metadata(name, namespace, {"kubernetes.io/service-name": service_name}, None),
        "addressType": family,
        "endpoints": [dict(one) for one in endpoints],
        "ports": [
            {"name": port_name, "port": number, "protocol": protocol}
            for port_name, number in (ports or {"metrics": 9102}).items()
        ],
    }


def namespace(name: str, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a Namespace."""
    return {
        "kind": "Namespace",
        "apiVersion": "v1",
        "metadata": _metadata(name, "", {"kubernetes.io/metadata.name": name, **(labels or {})}, None),
        "spec": {"finalizers": ["kubernetes"]},
        "status": {"phase": "Active"},
    }


def _metadata(
    name: str, namespace: str, labels: Mapping[str, str] | None, annotations: Mapping[str, str] | None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if namespace:
        metadata["namespace"] = namespace
    if labels:
        metadata["labels"] = dict(labels)
    if annotations:
        metadata["annotations"] = dict(annotations)
    return metadata
