"""Short ways to write Pods, Nodes, targets and services in tests."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from k8s_consul_registrar.model import (
    MANAGED_BY,
    ContainerPort,
    EndpointSlice,
    KubeService,
    Node,
    NodeAddress,
    Pod,
    Service,
    SliceEndpoint,
    Written,
)

SCRAPED = {"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}


def make_pod(name: str = "web-1", namespace: str = "shop", **changes: Any) -> Pod:
    """Return a Pod that is scraped on port 9102 unless changed."""
    fields: dict[str, Any] = {
        "uid": f"uid-{namespace}-{name}",
        "created": "2026-11-22T10:00:00Z",
        "phase": "Running",
        "ip": "198.51.100.10",
        "node": "node-a",
        "annotations": SCRAPED,
    }
    return Pod(namespace, name, **{**fields, **changes})


def annotated(**annotations: str) -> dict[str, str]:
    """Return the annotations of a scraped Pod; `param__x` stands for `param-x`, no port by default."""
    return {
        "prometheus.io/scrape": "true",
        **{f"prometheus.io/{key.replace('__', '-')}": value for key, value in annotations.items()},
    }


def make_node(name: str = "node-a", *addresses: tuple[str, str], **changes: Any) -> Node:
    """Return a Ready Node at 192.0.2.10 unless changed."""
    entries = addresses or (("InternalIP", "192.0.2.10"),)
    fields: dict[str, Any] = {
        "uid": f"uid-{name}",
        "created": "2026-11-22T10:00:00Z",
        "addresses": tuple(NodeAddress(*entry) for entry in entries),
        "ready": True,
    }
    return Node(name, **{**fields, **changes})


def make_kube_service(name: str = "web", namespace: str = "shop", **changes: Any) -> KubeService:
    """Return a Service whose endpoints are scraped at the only TCP port unless changed."""
    fields: dict[str, Any] = {
        "uid": f"uid-{namespace}-{name}",
        "created": "2026-11-22T10:00:00Z",
        "families": ("IPv4",),
        "annotations": {"prometheus.io/scrape": "true"},
    }
    return KubeService(namespace, name, **{**fields, **changes})


def make_slice(
    name: str, *endpoints: SliceEndpoint, service: str = "web", namespace: str = "shop", **changes: Any
) -> EndpointSlice:
    """Return an IPv4 EndpointSlice with the TCP port 9102 unless changed."""
    fields: dict[str, Any] = {"family": "IPv4", "ports": (tcp(9102),)}
    return EndpointSlice(namespace, name, service, endpoints=endpoints, **{**fields, **changes})


def tcp(number: int, name: str = "", protocol: str = "TCP") -> ContainerPort:
    """Return a container's port."""
    return ContainerPort(name, number, protocol)


def make_service(service_id: str, meta: Mapping[str, str] | None = None, **changes: Any) -> Service:
    """Return a service with exactly this meta."""
    fields: dict[str, Any] = {"name": service_id, "address": "198.51.100.10", "port": 9102}
    return Service(service_id, meta=tuple(sorted((meta or {}).items())), **{**fields, **changes})


def our_pod_service(name: str, namespace: str = "shop", **meta: str) -> Service:
    """Return what a registrar of cluster `lab` wrote for a Pod made by `make_pod`."""
    service_id = f"pod--{namespace}--{name}"
    ours = {
        "cluster": "lab",
        "managed_by": MANAGED_BY,
        "kind": "pod",
        "namespace": namespace,
        "pod": name,
        "node": "node-a",
        "scheme": "http",
        "metrics_path": "/metrics",
    }
    return make_service(service_id, {**ours, **meta})


async def unaudited(
    write: Callable[[Sequence[Service]], Awaitable[Written]], services: Sequence[Service]
) -> Written:
    """Remove services as a previous location does, without a proof."""
    return await write(services)
