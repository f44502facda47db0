"""What a Pod asks to be scraped by, whoever scrapes it: Prometheus itself, or the proxy in its stead."""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.model import ContainerPort, Pod
from k8s_consul_registrar.targets.addresses import scraped_address
from k8s_consul_registrar.targets.annotations import (
    DEFAULT_PATH,
    named_params,
    scrape_params,
    scrape_path,
    scrape_ports,
    scrape_scheme,
)
from k8s_consul_registrar.targets.reasons import Reason, Refused
from k8s_consul_registrar.targets.text import quoted

# What is read of annotations is kept for the next Pod of the same template: of so many templates, where they
# have no more characters and no more ports than these, so that nobody can fill our memory with them.
TEMPLATES, LONGEST_KEPT, MOST_PORTS_KEPT = 1024, 256, 16
_SCRAPED_PHASES = frozenset({"Running", "Unknown"})


class PodScrape(msgspec.Struct, frozen=True, gc=False):
    """How a Pod is scraped: each of the ports at one path, with the same parameters (values decoded)."""

    address: str
    ports: tuple[int, ...]
    path: str
    params: Mapping[str, str]
    scheme: str


def is_scraped(pod: Pod, prefix: str) -> bool:
    """Say whether a Pod asks to be scraped and can be: it is annotated, and in phase Running or Unknown.

    Succeeded and Failed Pods keep an IP that others may already use, so they are gone at once. A Pod that
    is being deleted is scraped until it leaves these phases.
    """
    return pod.annotations.get(f"{prefix}scrape") == "true" and pod.phase in _SCRAPED_PHASES


def pod_scrape(pod: Pod, prefix: str) -> PodScrape:
    """Read the annotations of a Pod that `is_scraped`; raises `Refused` for what cannot be honoured."""
    given, keys = pod.annotations, _keys(prefix)
    path, scheme, port = given.get(keys.path, DEFAULT_PATH), given.get(keys.scheme, ""), given.get(keys.port)
    params = named_params(given, prefix)
    address = _pod_address(pod)
    size = len(path) + len(scheme) + len(port or "")
    is_kept = not params and size <= LONGEST_KEPT and len(pod.ports) <= MOST_PORTS_KEPT
    read = _read if is_kept else _read.__wrapped__
    return PodScrape(address, *read(path, scheme, port, params, pod.ports))


class _Keys(NamedTuple):
    path: str
    scheme: str
    port: str


@lru_cache(maxsize=4)
def _keys(prefix: str) -> _Keys:
    return _Keys(f"{prefix}path", f"{prefix}scheme", f"{prefix}port")


@lru_cache(maxsize=TEMPLATES)
def _read(
    path: str,
    scheme: str,
    port: str | None,
    named: tuple[tuple[str, str], ...],
    ports: tuple[ContainerPort, ...],
) -> tuple[tuple[int, ...], str, Mapping[str, str], str]:
    """Read the annotations as they are; returns all but the address of a `PodScrape`."""
    path, query = scrape_path(path)
    params = scrape_params(query, named)
    scheme = scrape_scheme(scheme)
    return scrape_ports(port, ports), path, MappingProxyType(params), scheme


def require_declared(pod: Pod, ports: tuple[int, ...]) -> None:
    """Raise `Refused` where a Pod has its node's network and asks for a port that none of its containers has.

    That port would be the node's own: a kubelet's, an etcd's. The API server lets a Pod declare a port there
    that it takes from the node (`hostPort` equals `containerPort`), so a declared one is the Pod's.
    """
    if not pod.host_network:
        return
    declared = {port.number for port in pod.ports if port.protocol == "TCP"}
    for port in ports:
        if port not in declared:
            raise Refused(
                Reason.UNDECLARED_PORT,
                f"the Pod has its node's network and no container declares the TCP port {port}",
            )


def proxied_path(namespace: str, name: str, port: int | None = None) -> str:
    """Return the path at which the proxy relays a Pod; the port is named where the Pod has several."""
    which = name if port is None else f"{name}:{port}"
    return f"/api/v1/namespaces/{namespace}/pods/{which}/metrics"


def _pod_address(pod: Pod) -> str:
    if not pod.ip:
        raise Refused(Reason.NO_IP, "the Pod has no IP yet")
    address = scraped_address(pod.ip)
    if address is None:
        raise Refused(Reason.INVALID_IP, f"the Pod's IP {quoted(pod.ip)} cannot be scraped")
    return address
