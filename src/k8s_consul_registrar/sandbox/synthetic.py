"""Synthetic objects for benchmarks: Pods of realistic size, four fifths of them annotated."""

import ipaddress
from collections.abc import Iterator
from typing import Any

from k8s_consul_registrar.sandbox import objects

NAMESPACES = 20
ZONES = 3
APPS = 97
_ENVIRONMENT = 68  # variables, for a Pod of about 7 KB
FIRST_POD_IP = ipaddress.IPv4Address("127.64.0.1")
_FIRST_SMALL_POD_IP = int(ipaddress.IPv4Address("127.128.0.1"))
SERVICES_NAMESPACE = "services"
SERVICE_ENDPOINTS = 5000
SLICE_ENDPOINTS = 100
_FIRST_ENDPOINT_IP = int(ipaddress.IPv4Address("127.160.0.1"))
# The network of IPv6 addresses, documentation's (RFC 3849); they end with the 32 bits of the IPv4 ones.
_SIX = ipaddress.IPv6Address("2001:db8::")
_FIRST_NODE_IP = int(ipaddress.IPv4Address("127.32.0.1"))


def synthetic_nodes(count: int) -> Iterator[dict[str, Any]]:
    """Return Nodes from `node-00000` on, each with its own address, in `ZONES` zones."""
    for number in range(count):
        address = str(ipaddress.IPv4Address(_FIRST_NODE_IP + number))
        labels = {"topology.kubernetes.io/zone": f"eu-1{'abc'[number % ZONES]}"}
        yield objects.node(node_name(number), addresses=(("InternalIP", address),), labels=labels)


def synthetic_pods(
    count: int, node_count: int, first_ip: ipaddress.IPv4Address = FIRST_POD_IP
) -> Iterator[dict[str, Any]]:
    """Return Pods of about 7 KB over `NAMESPACES` namespaces; every fifth is not annotated."""
    for number in range(count):
        yield synthetic_pod(number, node_count, first_ip)


def synthetic_pod(
    number: int, node_count: int, first_ip: ipaddress.IPv4Address = FIRST_POD_IP
) -> dict[str, Any]:
    """Return one Pod of about 7 KB; equal numbers give equal Pods."""
    wants_scraping = number % 5 != 4
    node = number % max(node_count, 1)
    pod = objects.pod(
        f"app-{number % APPS}-7d9f8c6b5-{number:05d}",
        namespace=f"team-{number % NAMESPACES:02d}",
        ip=str(first_ip + number),
        node_name=node_name(node),
        host_ip=str(ipaddress.IPv4Address(_FIRST_NODE_IP + node)),
        ports={"http": 8080, "metrics": 9102},
        labels={"app": f"app-{number % APPS}", "pod-template-hash": "7d9f8c6b5", "tier": "backend"},
        annotations={"prometheus.io/scrape": "true", "prometheus.io/port": "9102"}
        if wants_scraping
        else None,
    )
    environment = [
        {"name": f"SETTING_{index:03d}", "value": f"value-{index:03d}-of-{number:05d}-{'x' * 40}"}
        for index in range(_ENVIRONMENT)
    ]
    pod["spec"]["containers"][0]["env"] = environment
    return pod


def small_pods(count: int, namespace: str, *, is_rejected: bool = False) -> Iterator[dict[str, Any]]:
    """Return annotated Pods of less than 1 KB; with `is_rejected` their annotated port does not exist."""
    port = "no-such-port" if is_rejected else "9102"
    for number in range(count):
        yield objects.pod(
            f"{namespace}-{number:06d}",
            namespace=namespace,
            ip=str(ipaddress.IPv4Address(_FIRST_SMALL_POD_IP + number)),
            ports={"metrics": 9102},
            annotations={"prometheus.io/scrape": "true", "prometheus.io/port": port},
        )


def synthetic_services(endpoints: int) -> Iterator[dict[str, Any]]:
    """Return annotated Services of 5,000 endpoints each, with their slices of 100."""
    for service in range(-(-endpoints // SERVICE_ENDPOINTS)):
        left = min(SERVICE_ENDPOINTS, endpoints - service * SERVICE_ENDPOINTS)
        yield objects.service(
            f"service-{service:03d}",
            namespace=SERVICES_NAMESPACE,
            annotations={"prometheus.io/scrape": "true", "prometheus.io/port": "9102"},
        )
        for part in range(-(-left // SLICE_ENDPOINTS)):
            yield synthetic_slice(service, part, min(SLICE_ENDPOINTS, left - part * SLICE_ENDPOINTS))


def synthetic_slice(service: int, part: int, count: int = SLICE_ENDPOINTS) -> dict[str, Any]:
    """Return one slice of a synthetic Service; equal numbers give equal slices."""
    first = service * SERVICE_ENDPOINTS + part * SLICE_ENDPOINTS
    endpoints = [
        objects.endpoint(
            str(ipaddress.IPv4Address(_FIRST_ENDPOINT_IP + number)),
            pod=f"backend-{service:03d}-7d9f8c6b5-{number:06d}",
            node=node_name(number % 200),
            zone=f"eu-1{'abc'[number % ZONES]}",
        )
        for number in range(first, first + count)
    ]
    return objects.endpoint_slice(
        f"service-{service:03d}-{part:03d}",
        f"service-{service:03d}",
        endpoints,
        namespace=SERVICES_NAMESPACE,
    )


def dual_stack(thing: dict[str, Any]) -> dict[str, Any]:
    """Give a Node or Pod an IPv6 address after each IPv4 one, as a dual-stack cluster does, and return it."""
    status = thing["status"]
    for places, key in (("addresses", "address"), ("podIPs", "ip"), ("hostIPs", "ip")):
        places_of = status.get(places, [])
        places_of += [{**one, key: str(_SIX + int(ipaddress.IPv4Address(one[key])))} for one in places_of]
    return thing


def node_name(number: int) -> str:
    """Return the name of a synthetic Node."""
    return f"node-{number:05d}"
