"""Scrape configuration of Pods, from `prometheus.io/*` annotations and declared ports, and addresses to scrape."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.errors import Reason, Rejected, quoted
from k8s_consul_registrar.model import ContainerPort, Node, Pod
from k8s_consul_registrar.targets.annotations import (
    IntervalRules,
    Pairs,
    ScrapeSet,
    asks_for_scrapes,
    parse_scrapes,
    scrape_annotations,
)

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Nearly every address is unicast IPv4 in its canonical spelling already. `ipaddress` takes ten times as
# long as this regex to confirm that, which is noticeable with ten thousand Pods.
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_UNICAST_IPV4 = re.compile(rf"(?:22[0-3]|2[01][0-9]|1[0-9]{{2}}|[1-9][0-9]?)(?:\.{_OCTET}){{3}}")

NODE_ADDRESS_TYPES = ("InternalIP", "ExternalIP")


def parse_ip(text: str) -> IPAddress | None:
    """Parse an IP literal, None for any other text; an IPv4-mapped IPv6 address becomes the IPv4 address.

    A literal with a zone (`fe80::1%eth0`) has a meaning on one machine only, so it is not accepted.
    """
    if "%" in text:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def scraped_address(text: str) -> str | None:
    """Return the canonical spelling of a unicast IP literal, None for anything else."""
    if _UNICAST_IPV4.fullmatch(text):
        return text
    address = parse_ip(text)
    if address is None or address.is_unspecified or address.is_multicast:
        return None
    return str(address)


# Families of addresses, of which the primary one is the first that Kubernetes names.
PRIMARY, IPV4, IPV6 = FAMILIES = ("primary", "ipv4", "ipv6")


def is_of_family(address: str, family: str) -> bool:
    """Return True if an IP literal is of a family."""
    return family == PRIMARY or (":" in address) is (family == IPV6)


def node_address(node: Node, types: Sequence[str] = NODE_ADDRESS_TYPES, family: str = PRIMARY) -> str | None:
    """Return the Node's address: the first IP literal, of a family, of the first type that has one.

    Names (`InternalDNS`, `Hostname`) never count: a Node cannot prove what its name resolves to.
    """
    for wanted in types:
        for entry in node.addresses:
            if entry.type != wanted or (address := scraped_address(entry.address)) is None:
                continue
            if is_of_family(address, family):
                return address
    return None


def kubelet_address(node: Node, family: str = PRIMARY) -> str | None:
    """Return the address at which the proxy reaches a Node's kubelet, of a family where the Node has one."""
    for wanted in NODE_ADDRESS_TYPES:
        spelled = [scraped_address(entry.address) for entry in node.addresses if entry.type == wanted]
        usable = [address for address in spelled if address is not None]
        if usable:
            return next((one for one in usable if is_of_family(one, family)), usable[0])
    return None


def url_host(address: str) -> str:
    """Format an IP literal as the host of a URL: IPv6 in brackets (RFC 3986, 3.2.2)."""
    return f"[{address}]" if ":" in address else address


def socket_address(address: str, port: int) -> str:
    """Return `address:port`, with brackets around an IPv6 address."""
    return f"{url_host(address)}:{port}"


PORT_NAMES = ("metrics", "http-metrics", "prometheus", "prom")
TCP = "TCP"
# Each port of a Pod is a service, so without a limit one annotation could create thousands.
MOST_PORTS = 16
_NUMBER = re.compile(r"[0-9]{1,9}")

# Pods of one template have equal annotations and ports, so the result of reading them is cached. The limits
# keep a user who may create Pods from filling the memory.
TEMPLATES, LONGEST_KEPT, MOST_PORTS_KEPT = 1024, 256, 16
SCRAPED_PHASES = frozenset({"Running", "Unknown"})


class ScrapedPort(NamedTuple):
    """A port of a Pod and how it is scraped; `ordinal` is 1 for the first scrape of a port, 2 for the second."""

    number: int
    scrape: ScrapeSet
    ordinal: int = 1

    @property
    def suffix(self) -> str:
        """The port in a service ID, with the number of its scrape where it has several, such as of two paths."""
        return str(self.number) if self.ordinal == 1 else f"{self.number}--{self.ordinal}"


class PortOwner(NamedTuple):
    """The owner of the ports among which one is chosen, in the words of rejections."""

    none: str
    named: str


CONTAINERS = PortOwner("no container declares a TCP port", "a container's port")
SERVICE = PortOwner("the Service has no TCP port", "a port of the Service")


class ScrapeConfig(msgspec.Struct, frozen=True, gc=False):
    """Address and ports at which a Pod is scraped, in the order of its annotations."""

    address: str
    ports: tuple[ScrapedPort, ...]


def is_scraped(pod: Pod, prefix: str) -> bool:
    """Return whether a Pod is annotated and in phase Running or Unknown.

    The IP of a Succeeded or Failed Pod may already belong to another Pod, so its targets are dropped at
    once. A Pod that is being deleted is scraped until it leaves these phases.
    """
    return asks_for_scrapes(pod.annotations, prefix) and pod.phase in SCRAPED_PHASES


def pod_scrape(
    pod: Pod, prefix: str, intervals: IntervalRules | None = None, family: str = PRIMARY
) -> ScrapeConfig:
    """Read the annotations of a Pod that `is_scraped`; raises `Rejected` for invalid ones.

    `family` is that of its address where no annotation names another one.
    """
    address = _pod_address(pod, annotated_family(pod.annotations, prefix) or family)
    pairs = scrape_annotations(pod.annotations, prefix)
    size = 0
    for name, value in pairs:
        # The value of a parameter may be another one for each Pod.
        size += len(value) if name[:5] != "param" else LONGEST_KEPT + 1
    read = _read if size <= LONGEST_KEPT and len(pod.ports) <= MOST_PORTS_KEPT else _read.__wrapped__
    return ScrapeConfig(address, read(pairs, pod.ports, intervals))


@lru_cache(maxsize=TEMPLATES)
def _read(
    pairs: Pairs, ports: tuple[ContainerPort, ...], intervals: IntervalRules | None
) -> tuple[ScrapedPort, ...]:
    return scraped_ports(parse_scrapes(pairs, intervals), ports)


def scraped_ports(
    scrapes: Sequence[ScrapeSet], ports: Sequence[ContainerPort], owner: PortOwner = CONTAINERS
) -> tuple[ScrapedPort, ...]:
    """Return the ports of every set of annotations; one that repeats an earlier scrape adds nothing."""
    found: list[ScrapedPort] = []
    seen: dict[int, list[tuple[str, str, Mapping[str, str]]]] = {}
    for scrape in scrapes:
        place = (scrape.scheme, scrape.path, scrape.params)
        for number in scrape_ports(scrape.port, ports, owner):
            places = seen.setdefault(number, [])
            if place not in places:
                places.append(place)
                found.append(ScrapedPort(number, scrape, len(places)))
    _check_count(len(found))
    return tuple(found)


def _check_count(ports: int) -> None:
    if ports > MOST_PORTS:
        raise Rejected(Reason.TOO_MANY_PORTS, f"{ports} ports are more than {MOST_PORTS}")


def require_declared(pod: Pod, ports: Sequence[ScrapedPort]) -> None:
    """Raise `Rejected` if a Pod on its Node's network asks for a port that none of its containers declares.

    An undeclared port could be another process's on the Node, such as the kubelet's or etcd's. A declared
    one is the Pod's: on the Node's network `hostPort` equals `containerPort`, and the scheduler gives it to
    one Pod.
    """
    if not pod.host_network:
        return
    declared = {port.number for port in pod.ports if port.protocol == TCP}
    for port in ports:
        if port.number not in declared:
            raise Rejected(
                Reason.UNDECLARED_PORT,
                f"the Pod has its node's network and no container declares the TCP port {port.number}",
            )


PROXIED_PODS = "/api/v1/namespaces/"


def is_proxied(path: str) -> bool:
    """Return True if a `metrics_path` is the proxy's of a Pod, so that the Pod is not scraped at its own address."""
    return path.startswith(PROXIED_PODS)


def proxied_path(namespace: str, name: str, port: ScrapedPort | None = None) -> str:
    """Return the path at which the proxy serves a Pod; `port` is needed only if the Pod has several."""
    which = name if port is None else f"{name}:{port.number}"
    ordinal = "" if port is None or port.ordinal == 1 else f"/{port.ordinal}"
    return f"{PROXIED_PODS}{namespace}/pods/{which}/metrics{ordinal}"


def annotated_family(annotations: Mapping[str, str], prefix: str) -> str:
    """Return the family of addresses that an annotation names, empty without one; raises `Rejected`."""
    given = annotations.get(f"{prefix}ip-family")
    family = "" if given is None else given.strip().lower()
    if family and family not in FAMILIES:
        raise Rejected(
            Reason.INVALID_IP_FAMILY, f"ip-family {quoted(family)} is none of {', '.join(FAMILIES)}"
        )
    return family


def _pod_address(pod: Pod, family: str) -> str:
    if not pod.ip:
        raise Rejected(Reason.NO_IP, "the Pod has no IP yet")
    for text in (pod.ip,) if family == PRIMARY else pod.ips or (pod.ip,):
        address = scraped_address(text)
        if address is None:
            raise Rejected(Reason.INVALID_IP, f"the Pod's IP {quoted(text)} cannot be scraped")
        if is_of_family(address, family):
            return address
    raise Rejected(Reason.NO_IP_FAMILY, f"the Pod has no {family} address beside {quoted(pod.ip)}")


def host_address(pod: Pod, family: str) -> str:
    """Return the address of a Pod's Node; raises `Rejected` without one of the family."""
    for text in (pod.host_ip,) if family == PRIMARY else pod.host_ips or (pod.host_ip,):
        host = parse_ip(text)
        if host is None or host.is_unspecified or host.is_multicast:
            continue
        if is_of_family(str(host), family):
            return str(host)
    which = "" if family == PRIMARY else f"{family} "
    raise Rejected(Reason.NO_HOST_IP, f"the Pod's status names no {which}address of its node")


def scrape_ports(text: str | None, ports: Sequence[ContainerPort], owner: PortOwner) -> tuple[int, ...]:
    """Return the port numbers to scrape, in the annotation's order and without repeats.

    The annotation holds numbers or names of TCP ports, separated by commas. Without one, the port is the
    TCP port named metrics, http-metrics, prometheus or prom, in this order, otherwise the only TCP port.
    Raises `Rejected` where no port or more than one could be meant, and where any entry is invalid.
    """
    if text is not None and text.strip():
        entries = [entry.strip() for entry in text.split(",")]
        numbers = dict.fromkeys(_annotated_port(entry, ports, owner) for entry in entries)
        _check_count(len(numbers))
        return tuple(numbers)
    return (_implied_port(ports, owner),)


def _implied_port(ports: Sequence[ContainerPort], owner: PortOwner) -> int:
    for name in PORT_NAMES:
        if (number := _named_port(name, ports)) is not None:
            return number
    numbers = {port.number for port in ports if port.protocol == TCP}
    if len(numbers) == 1:
        return numbers.pop()
    if numbers:
        raise Rejected(
            Reason.AMBIGUOUS_PORT,
            f"there are {len(numbers)} TCP ports and none is named {', '.join(PORT_NAMES)}: annotate the port",
        )
    raise Rejected(Reason.NO_PORT, f"no port is annotated and {owner.none}")


def _annotated_port(text: str, ports: Sequence[ContainerPort], owner: PortOwner) -> int:
    if _NUMBER.fullmatch(text):
        number = int(text)
        if 1 <= number <= 65535:
            return number
        raise Rejected(Reason.INVALID_PORT, f"the port {text} is not between 1 and 65535")
    if text and (named := _named_port(text, ports)) is not None:
        return named
    protocols = sorted({port.protocol for port in ports if text and port.name == text})
    if protocols:
        raise Rejected(
            Reason.UNKNOWN_PORT_NAME, f"the port {quoted(text)} is {quoted('/'.join(protocols))}, not TCP"
        )
    raise Rejected(
        Reason.UNKNOWN_PORT_NAME,
        f"the port {quoted(text)} is neither a number from 1 to 65535 nor the name of {owner.named}",
    )


def _named_port(name: str, ports: Sequence[ContainerPort]) -> int | None:
    """Return the number of the TCP port with this name, None if no container has one.

    Kubernetes keeps port names unique within one container only, so containers can disagree on the number.
    """
    numbers = {port.number for port in ports if port.name == name and port.protocol == TCP}
    if len(numbers) > 1:
        some = ", ".join(str(number) for number in sorted(numbers)[:4])
        raise Rejected(
            Reason.AMBIGUOUS_PORT,
            f"{len(numbers)} TCP ports are named {quoted(name)} ({some}): annotate the number",
        )
    return numbers.pop() if numbers else None
