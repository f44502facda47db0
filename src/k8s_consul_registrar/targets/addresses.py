"""IP addresses as Kubernetes writes them, in one canonical spelling."""

import ipaddress
import re
from collections.abc import Sequence

from k8s_consul_registrar.model import Node

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Nearly every address is a plain unicast IPv4 one, already in its one spelling: `ipaddress` takes ten times
# as long to say so, which is felt with ten thousand Pods.
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_UNICAST_IPV4 = re.compile(rf"(?:22[0-3]|2[01][0-9]|1[0-9]{{2}}|[1-9][0-9]?)(?:\.{_OCTET}){{3}}")

NODE_ADDRESS_TYPES = ("InternalIP", "ExternalIP")


def parse_ip(text: str) -> IPAddress | None:
    """Read an IP literal, None where it is none; a mapped IPv4 address is that IPv4 address.

    A literal with a zone (`fe80::1%eth0`) means something on one machine only, so it counts as none.
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
    """Spell an address that can be scraped canonically, None for no IP literal, unspecified or multicast."""
    if _UNICAST_IPV4.fullmatch(text):
        return text
    address = parse_ip(text)
    if address is None or address.is_unspecified or address.is_multicast:
        return None
    return str(address)


def node_address(node: Node, types: Sequence[str] = NODE_ADDRESS_TYPES) -> str | None:
    """Return the address a Node is known by, the first IP literal of the first type that has one.

    Names (`InternalDNS`, `Hostname`) never count: what a name resolves to is not the Node's to say.
    """
    for wanted in types:
        for entry in node.addresses:
            if entry.type == wanted and (address := scraped_address(entry.address)) is not None:
                return address
    return None


def url_host(address: str) -> str:
    """Write an IP literal as a URL's host: IPv6 in brackets (RFC 3986, 3.2.2)."""
    return f"[{address}]" if ":" in address else address
