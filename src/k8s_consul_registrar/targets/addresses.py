"""IP addresses as Kubernetes writes them, in one canonical spelling."""

import ipaddress
from collections.abc import Sequence

from k8s_consul_registrar.model import Node

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

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


def node_address(node: Node, types: Sequence[str] = NODE_ADDRESS_TYPES) -> str | None:
    """Return the address a Node is known by, the first IP literal of the first type that has one.

    Names (`InternalDNS`, `Hostname`) never count: what a name resolves to is not the Node's to say.
    """
    for wanted in types:
        for entry in node.addresses:
            if entry.type == wanted and (address := parse_ip(entry.address)) is not None:
                if address.is_unspecified or address.is_multicast:
                    continue
                return str(address)
    return None


def url_host(address: str) -> str:
    """Write an IP literal as a URL's host: IPv6 in brackets (RFC 3986, 3.2.2)."""
    return f"[{address}]" if ":" in address else address
