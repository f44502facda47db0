"""IP addresses from Kubernetes objects, in one canonical spelling."""

import ipaddress
import re
from collections.abc import Sequence

from k8s_consul_registrar.model import Node

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
