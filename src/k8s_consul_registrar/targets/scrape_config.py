"""Scrape configuration of Pods, from `prometheus.io/*` annotations and declared ports, and addresses to scrape."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qsl

import msgspec

from k8s_consul_registrar.model import ContainerPort, Node, Pod
from k8s_consul_registrar.targets.reasons import Reason, Rejected, has_control, quoted

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


def node_address(node: Node, types: Sequence[str] = NODE_ADDRESS_TYPES) -> str | None:
    """Return the Node's address: the first IP literal of the first type that has one.

    Names (`InternalDNS`, `Hostname`) never count: a Node cannot prove what its name resolves to.
    """
    for wanted in types:
        for entry in node.addresses:
            if entry.type == wanted and (address := scraped_address(entry.address)) is not None:
                return address
    return None


def url_host(address: str) -> str:
    """Format an IP literal as the host of a URL: IPv6 in brackets (RFC 3986, 3.2.2)."""
    return f"[{address}]" if ":" in address else address


DEFAULT_PATH = "/metrics"
PORT_NAMES = ("metrics", "http-metrics", "prometheus", "prom")
TCP = "TCP"
MOST_PARAMS = 40
# Each port of a Pod is a service, so without a limit one annotation could create thousands.
MOST_PORTS = 16

# Prometheus reads a parameter from the label `__param_<name>`, so the name must be valid in a label name.
_PARAM_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")
_NUMBER = re.compile(r"[0-9]{1,9}")
# The start of a URL that names a host: a scheme, `//host/path` or `//host:80` (RFC 3986, 4.2). `//metrics` is
# only a doubled slash, and in `/http://host` the slash says that all of it is a path.
_URL_START = re.compile(r"https?:|[a-z][a-z0-9+.-]*:[/\\]{2}|//[^/]+/.|//[^/]*:[0-9]", re.IGNORECASE)

# Pods of one template have equal annotations and ports, so the result of reading them is cached. The limits
# keep a user who may create Pods from filling the memory.
TEMPLATES, LONGEST_KEPT, MOST_PORTS_KEPT = 1024, 256, 16
SCRAPED_PHASES = frozenset({"Running", "Unknown"})


class ScrapeConfig(msgspec.Struct, frozen=True, gc=False):
    """Scrape settings of a Pod; path, parameters (values decoded) and scheme are the same for all ports."""

    address: str
    ports: tuple[int, ...]
    path: str
    params: Mapping[str, str]
    scheme: str


def is_scraped(pod: Pod, prefix: str) -> bool:
    """Return whether a Pod is annotated and in phase Running or Unknown.

    The IP of a Succeeded or Failed Pod may already belong to another Pod, so its targets are dropped at
    once. A Pod that is being deleted is scraped until it leaves these phases.
    """
    return pod.annotations.get(f"{prefix}scrape") == "true" and pod.phase in SCRAPED_PHASES


def pod_scrape(pod: Pod, prefix: str) -> ScrapeConfig:
    """Read the annotations of a Pod that `is_scraped`; raises `Rejected` for invalid ones."""
    given, keys = pod.annotations, _keys(prefix)
    path, scheme, port = given.get(keys.path, DEFAULT_PATH), given.get(keys.scheme, ""), given.get(keys.port)
    params = named_params(given, prefix)
    address = _pod_address(pod)
    size = len(path) + len(scheme) + len(port or "")
    is_kept = not params and size <= LONGEST_KEPT and len(pod.ports) <= MOST_PORTS_KEPT
    read = _read if is_kept else _read.__wrapped__
    return ScrapeConfig(address, *read(path, scheme, port, params, pod.ports))


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
    """Parse the texts of the annotations; returns the fields of a `ScrapeConfig` after the address."""
    path, query = scrape_path(path)
    params = scrape_params(query, named)
    scheme = scrape_scheme(scheme)
    return scrape_ports(port, ports), path, MappingProxyType(params), scheme


def require_declared(pod: Pod, ports: tuple[int, ...]) -> None:
    """Raise `Rejected` if a Pod on its Node's network asks for a port that none of its containers declares.

    An undeclared port could be another process's on the Node, such as the kubelet's or etcd's. A declared
    one is the Pod's: on the Node's network `hostPort` equals `containerPort`, and the scheduler gives it to
    one Pod.
    """
    if not pod.host_network:
        return
    declared = {port.number for port in pod.ports if port.protocol == TCP}
    for port in ports:
        if port not in declared:
            raise Rejected(
                Reason.UNDECLARED_PORT,
                f"the Pod has its node's network and no container declares the TCP port {port}",
            )


def proxied_path(namespace: str, name: str, port: int | None = None) -> str:
    """Return the path at which the proxy serves a Pod; `port` is needed only if the Pod has several."""
    which = name if port is None else f"{name}:{port}"
    return f"/api/v1/namespaces/{namespace}/pods/{which}/metrics"


def _pod_address(pod: Pod) -> str:
    if not pod.ip:
        raise Rejected(Reason.NO_IP, "the Pod has no IP yet")
    address = scraped_address(pod.ip)
    if address is None:
        raise Rejected(Reason.INVALID_IP, f"the Pod's IP {quoted(pod.ip)} cannot be scraped")
    return address


def scrape_path(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Split a path annotation into the path, with a leading slash, and the parameters of its query.

    Raises `Rejected` for control characters, for a URL in place of a path, and for a query that is too long
    or not UTF-8 in percent encoding. Everything else in the path is kept: Prometheus escapes it.
    """
    text = text.strip()
    if has_control(text):
        raise Rejected(Reason.INVALID_PATH, f"the path {quoted(text)} has control characters")
    path, _, query = text.partition("?")
    if _URL_START.match(path):
        raise Rejected(
            Reason.INVALID_PATH, f"{quoted(text)} is a URL: give the path only, such as {DEFAULT_PATH}"
        )
    path = path or DEFAULT_PATH
    if not path.startswith("/"):
        path = f"/{path}"
    if not query:
        return path, []
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=MOST_PARAMS)
    except (ValueError, UnicodeError):
        raise Rejected(Reason.INVALID_PATH, f"the query of {quoted(text)} is too long or not UTF-8") from None
    return path, pairs


def named_params(annotations: Mapping[str, str], prefix: str) -> tuple[tuple[str, str], ...]:
    """Return the names and values of the annotations `<prefix>param-<name>`, sorted."""
    start = f"{prefix}param-"
    keys = [key for key in annotations if key.startswith(start)]
    return tuple([(key[len(start) :], annotations[key]) for key in sorted(keys)]) if keys else ()


def scrape_params(query: Sequence[tuple[str, str]], named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Merge the parameters of the query and of `named_params`.

    Raises `Rejected` for a name that is not valid in Prometheus, a repeated name and control characters.
    """
    params: dict[str, str] = {}
    for name, value in (*query, *named):
        if not _PARAM_NAME.fullmatch(name):
            raise Rejected(
                Reason.INVALID_PARAM, f"the parameter name {quoted(name)} is not made of A-Z a-z 0-9 _"
            )
        if name in params:
            raise Rejected(Reason.INVALID_PARAM, f"the parameter {name} is given twice")
        if has_control(value):
            raise Rejected(Reason.INVALID_PARAM, f"the parameter {name} has control characters")
        params[name] = value
    return params


def scrape_scheme(text: str) -> str:
    """Return `http` (the default) or `https`; raises `Rejected` for anything else."""
    scheme = text.strip().lower() or "http"
    if scheme not in ("http", "https"):
        raise Rejected(Reason.INVALID_SCHEME, f"the scheme {quoted(text)} is neither http nor https")
    return scheme


def scrape_ports(text: str | None, ports: Sequence[ContainerPort]) -> tuple[int, ...]:
    """Return the port numbers to scrape, in the annotation's order and without repeats.

    The annotation holds numbers or names of TCP ports, separated by commas. Without one, the port is the
    TCP port named metrics, http-metrics, prometheus or prom, in this order, otherwise the only TCP port.
    Raises `Rejected` where no port or more than one could be meant, and where any entry is invalid.
    """
    if text is not None and text.strip():
        entries = [entry.strip() for entry in text.split(",")]
        numbers = dict.fromkeys(_annotated_port(entry, ports) for entry in entries)
        if len(numbers) > MOST_PORTS:
            raise Rejected(Reason.TOO_MANY_PORTS, f"{len(numbers)} ports are more than {MOST_PORTS}")
        return tuple(numbers)
    return (_implied_port(ports),)


def _implied_port(ports: Sequence[ContainerPort]) -> int:
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
    raise Rejected(Reason.NO_PORT, "no port is annotated and no container declares a TCP port")


def _annotated_port(text: str, ports: Sequence[ContainerPort]) -> int:
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
        f"the port {quoted(text)} is neither a number from 1 to 65535 nor the name of a container's port",
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
