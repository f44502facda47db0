"""The kubelets that may be dialled, from the Nodes the API server knows, and the addresses that never are."""

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from k8s_consul_registrar.model import Node
from k8s_consul_registrar.targets.scrape_config import (
    NODE_ADDRESS_TYPES,
    PRIMARY,
    IPAddress,
    is_of_family,
    url_host,
)

# Addresses of a Node that are used: dual stack has two. A Node writes its own status, and may write thousands.
MAX_ADDRESSES = 16

# Destinations that only a mistake or an attack names, besides loopback, link-local (where most clouds have
# their metadata service), multicast and unspecified addresses.
_NEVER: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = (
    *map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # "this network" (RFC 1122, 3.2.1.3); on Linux 0.0.0.0 is this very host
            "100.100.100.200/32",  # metadata of Alibaba Cloud
            "168.63.129.16/32",  # the wire server of Azure
            "192.0.0.192/32",  # metadata of Oracle Cloud, classic
            "255.255.255.255/32",
        ),
    ),
    *map(
        ipaddress.IPv6Network,
        (
            "::ffff:0:0/96",  # IPv4-mapped: no address on a wire (RFC 4291, 2.5.5.2)
            "::ffff:0:0:0/96",  # IPv4-translated (RFC 2765): a translator would dial the IPv4 address
            "64:ff9b:1::/48",  # local NAT64 (RFC 8215), in which the place of the IPv4 address is not known
            "2001::/32",  # Teredo: a tunnel to an IPv4 address
            "fd00:ec2::/32",  # metadata, Pod identity and other local services of AWS
            "fd00:42::42/128",  # metadata of Scaleway
            "fd00:c1::a9fe:a9fe/128",  # metadata of Oracle Cloud
            "fd20:ce::254/128",  # metadata of Google Cloud
        ),
    ),
)
# IPv6 addresses that carry an IPv4 address in their last 32 bits: NAT64 (RFC 6052), which a translator would
# dial, and the deprecated IPv4-compatible form (RFC 4291, 2.5.5.1).
_CARRIES_IPV4 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
# The middle of an interface identifier of ISATAP (RFC 5214, 6.1), with the bit for "universal" left out.
_ISATAP = 0x00005EFE


# What an endpoint is, so that no connection to one kind ever serves another.
KUBELET = "kubelet"
POD = "pod over http"
POD_TLS = "pod over https"


class Endpoint(NamedTuple):
    """An address to dial: an IP literal, the port its object states, and the name its certificate must hold.

    `uid` is the object's: a Node or Pod that is replaced at the same address shares no connection with the
    old one. `peer` is KUBELET, POD or POD_TLS. `namespace` is a Pod's.
    """

    address: str
    port: int
    server_name: str
    uid: str
    peer: str = KUBELET
    namespace: str = ""

    def __str__(self) -> str:
        return f"{url_host(self.address)}:{self.port}"


def is_dialable(address: IPAddress, *, allow_loopback: bool) -> bool:
    """Return True if an address that a Node claims may ever be dialled; a Node writes its own status.

    An IPv6 address that carries an IPv4 address may not be dialled where that one may not.
    """
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        carried = _carried_ipv4(address)
        if carried is not None and not is_dialable(carried, allow_loopback=False):
            return False
    if address.is_loopback:
        return allow_loopback
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    return not any(address in network for network in _NEVER)


def _carried_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 address leads to, None where it leads to itself."""
    if address.sixtofour is not None:
        return address.sixtofour
    is_isatap = (int(address) >> 32) & 0xFDFFFFFF == _ISATAP
    if is_isatap or any(address in network for network in _CARRIES_IPV4):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


class Contest(NamedTuple):
    """An address that several Nodes claim, of which one has it; `winner` and `losers` are names."""

    address: str
    winner: str
    losers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeTable:
    """The kubelets that may be dialled, and the addresses and ports of the API server, which never are.

    `by_address` is keyed by the canonical spelling of an address and the kubelet's port, `by_name` by the
    Node; `addresses` are all that belong to a Node.
    """

    by_address: Mapping[tuple[str, int], Endpoint] = field(default_factory=dict)
    by_name: Mapping[str, Endpoint] = field(default_factory=dict)
    addresses: frozenset[str] = frozenset()
    endpoints: frozenset[Endpoint] = frozenset()
    api_server: frozenset[tuple[str, int]] = frozenset()
    contests: tuple[Contest, ...] = ()

    @classmethod
    def of(
        cls,
        nodes: Iterable[Node],
        *,
        allow_loopback: bool = False,
        verify_node_name: bool = False,
        api_server: frozenset[tuple[str, int]] = frozenset(),
        family: str = PRIMARY,
    ) -> "NodeTable":
        """Build the table.

        A Node is reached by its name, at its first address, whatever other Nodes claim; those of the family come
        before the others. It is reached by any of its InternalIPs (dual stack has two), by ExternalIPs only where
        it has none. An address that is the first
        of some Node is no further address of another. Of two Nodes that claim one address and port in the same
        way the Ready one has it, else the older; at different ports both are reached. The certificate must name
        the address dialled, or the Node with `verify_node_name`.
        """
        by_address: dict[tuple[str, int], Endpoint] = {}
        by_name: dict[str, Endpoint] = {}
        owners: dict[str, str] = {}
        lost: dict[str, list[str]] = defaultdict(list)

        def claim(node: Node, address: str) -> Endpoint:
            endpoint = Endpoint(
                address, node.kubelet_port, node.name if verify_node_name else address, node.uid
            )
            if by_address.setdefault((address, node.kubelet_port), endpoint) is not endpoint:
                lost[address].append(node.name)
            return endpoint

        claims = [
            (node, usable)
            for node in sorted(nodes, key=lambda node: (not node.ready, node.created, node.uid))
            if 0 < node.kubelet_port < 65536
            and (usable := _claims(node, family, allow_loopback=allow_loopback, api_server=api_server))
        ]
        for node, (first, *_) in claims:
            by_name[node.name] = claim(node, first)
            owners.setdefault(first, node.name)
        firsts = frozenset(owners)
        for node, (first, *further) in claims:
            for address in further:
                if address == first:
                    continue
                if address in firsts:
                    lost[address].append(node.name)
                else:
                    claim(node, address)
                    owners.setdefault(address, node.name)
        contests = tuple(Contest(one, owners[one], tuple(losers)) for one, losers in sorted(lost.items()))
        endpoints = frozenset((*by_address.values(), *by_name.values()))
        return cls(by_address, by_name, frozenset(owners), endpoints, api_server, contests)


def _claims(
    node: Node, family: str, *, allow_loopback: bool, api_server: frozenset[tuple[str, int]]
) -> list[str]:
    usable = usable_addresses(node, allow_loopback=allow_loopback)
    usable.sort(key=lambda one: not is_of_family(one, family))
    return [one for one in usable if (one, node.kubelet_port) not in api_server][:MAX_ADDRESSES]


def usable_addresses(node: Node, *, allow_loopback: bool) -> list[str]:
    """Return the addresses a Node may be dialled at, in its own order and each in canonical spelling."""
    for wanted in NODE_ADDRESS_TYPES:
        spelled = [
            dialable_spelling(entry.address, allow_loopback=allow_loopback)
            for entry in node.addresses
            if entry.type == wanted
        ]
        usable = [address for address in dict.fromkeys(spelled) if address]
        if usable:
            return usable
    return []


# The table is built again at every change of a Node, of which there may be thousands, and their addresses stay.
@lru_cache(maxsize=16_384)
def dialable_spelling(text: str, *, allow_loopback: bool) -> str:
    """Return the canonical spelling of an address that may be dialled, empty for any other text.

    A literal with a zone (`fe80::1%eth0`) has a meaning on one machine only, and is no such address.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    if "%" in text or not is_dialable(address, allow_loopback=allow_loopback):
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
