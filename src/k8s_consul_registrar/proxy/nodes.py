"""Which kubelets may be dialled, by the Nodes the API server knows."""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from k8s_consul_registrar.model import Node
from k8s_consul_registrar.targets.scrape_config import NODE_ADDRESS_TYPES, IPAddress, parse_ip, url_host

# RFC 6052: an IPv4 address carried in the last 32 bits, which a translator would dial.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# RFC 4291, 2.5.5.1 (deprecated): an IPv4 address written as IPv6.
V4_COMPATIBLE = ipaddress.IPv6Network("::/96")
# RFC 1122, 3.2.1.3: "this network"; on Linux 0.0.0.0 is this very host.
THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
BROADCAST = ipaddress.IPv4Address("255.255.255.255")


# What an endpoint is, so that no connection to one kind ever serves another.
KUBELET = "kubelet"
POD = "pod over http"
POD_TLS = "pod over https"


class Endpoint(NamedTuple):
    """Whom to dial: an IP literal, the port its object states, and the name its certificate must hold.

    `uid` is the object's: a Node or Pod that is replaced at the same address shares no connection with the
    old one. `peer` is KUBELET, POD or POD_TLS.
    """

    address: str
    port: int
    server_name: str
    uid: str
    peer: str = KUBELET

    def __str__(self) -> str:
        return f"{url_host(self.address)}:{self.port}"


def is_dialable(address: IPAddress, *, allow_loopback: bool) -> bool:
    """Say whether an address a Node claims may ever be dialled; a Node writes its own status.

    Link-local (the clouds' metadata services), multicast, broadcast, unspecified and loopback addresses
    may not, nor an IPv6 address that carries one of them.
    """
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        carried = carried_ipv4(address)
        if carried is not None:
            return is_dialable(carried, allow_loopback=False)
    if address.is_loopback:
        return allow_loopback
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    return not (
        isinstance(address, ipaddress.IPv4Address) and (address in THIS_NETWORK or address == BROADCAST)
    )


def carried_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address an IPv6 address stands for, None where it stands for itself."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address in NAT64 or address in V4_COMPATIBLE:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


@dataclass(frozen=True, slots=True)
class NodeTable:
    """The kubelets that may be dialled: `by_ip` in the address's canonical spelling, `by_name` of the Node."""

    by_ip: Mapping[str, Endpoint] = field(default_factory=dict)
    by_name: Mapping[str, Endpoint] = field(default_factory=dict)
    endpoints: frozenset[Endpoint] = frozenset()

    @classmethod
    def of(
        cls, nodes: Iterable[Node], *, allow_loopback: bool = False, verify_node_name: bool = False
    ) -> "NodeTable":
        """Build the table; where two Nodes claim one address the Ready one has it, else the older.

        A Node is reached by any of its InternalIPs (dual stack has two), by ExternalIPs only where it has
        none. The certificate must name the address dialled, or the Node with `verify_node_name`.
        """
        by_ip: dict[str, Endpoint] = {}
        by_name: dict[str, Endpoint] = {}
        for node in sorted(nodes, key=lambda node: (not node.ready, node.created, node.uid)):
            if not 0 < node.kubelet_port < 65536:
                continue
            for address in usable_addresses(node, allow_loopback=allow_loopback):
                if address in by_ip:
                    continue
                name = node.name if verify_node_name else address
                endpoint = Endpoint(address, node.kubelet_port, name, node.uid)
                by_ip[address] = endpoint
                by_name.setdefault(node.name, endpoint)
        return cls(by_ip, by_name, frozenset(by_ip.values()))


def usable_addresses(node: Node, *, allow_loopback: bool) -> list[str]:
    """Return the addresses a Node may be dialled at, in its own order and each in canonical spelling."""
    for wanted in NODE_ADDRESS_TYPES:
        spelled = [
            dialable_spelling(entry.address, allow_loopback=allow_loopback)
            for entry in node.addresses
            if entry.type == wanted
        ]
        usable = [address for address in spelled if address]
        if usable:
            return usable
    return []


# The table is built anew at every change of a Node, of which there may be thousands, and their addresses stay.
@lru_cache(maxsize=16_384)
def dialable_spelling(text: str, *, allow_loopback: bool) -> str:
    """Return the canonical spelling of an address that may be dialled, empty where it may not or is none."""
    address = parse_ip(text)
    if address is None or not is_dialable(address, allow_loopback=allow_loopback):
        return ""
    return str(address)


class Nodes:
    """Holds the current table, replaced whole; `version` tells those who remember something of it."""

    __slots__ = ("current", "known", "version")

    def __init__(self) -> None:
        self.current = NodeTable()
        self.known = False
        self.version = 0

    def replace(self, table: NodeTable) -> None:
        """Serve this table from now on."""
        self.current = table
        self.known = True
        self.version += 1

    def forget(self) -> None:
        """Serve nothing until a table comes: what was known is too old to be trusted."""
        self.current = NodeTable()
        self.known = False
        self.version += 1
