"""Which addresses may be dialled, whatever a Node claims."""

import pytest

from k8s_consul_registrar.model import Node, NodeAddress
from k8s_consul_registrar.proxy.nodes import Endpoint, Nodes, NodeTable


def a_node(
    name: str, *addresses: str, kind: str = "InternalIP", port: int = 10250, **changes: object
) -> Node:
    """Return a Node of these addresses."""
    values = {"uid": f"uid-{name}", "created": "2026-01-01T00:00:00Z", "ready": True} | changes
    entries = tuple(NodeAddress(kind, address) for address in addresses)
    return Node(name=name, addresses=entries, kubelet_port=port, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "fe80::1",
        "fe80::1%eth0",
        "224.0.0.1",
        "ff02::1",
        "0.0.0.0",
        "0.1.2.3",
        "::",
        "127.0.0.1",
        "127.8.9.10",
        "::1",
        "255.255.255.255",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "::127.0.0.1",
        "kubernetes.default.svc",
        "10.0.0.1:80",
        "010.0.0.1",
        "2130706433",
        "10.1",
        "",
    ],
)
def test_never_dialled(address: str) -> None:
    """Leaves out addresses that are special, carry a special one, or are none."""
    table = NodeTable.of([a_node("one", address)])
    assert not table.by_ip
    assert not table.by_name
    assert not table.endpoints


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "127.0.0.2"])
def test_loopback_by_choice(address: str) -> None:
    """Lets loopback in where it is asked for, and nothing else special."""
    nodes = [a_node("one", address), a_node("two", "169.254.169.254"), a_node("three", "0.0.0.0")]
    assert set(NodeTable.of(nodes, allow_loopback=True).by_ip) == {address}


def test_canonical_spelling() -> None:
    """Knows each address by one spelling; a mapped IPv4 address is that IPv4 address."""
    table = NodeTable.of([a_node("one", "2001:DB8:0::0001"), a_node("two", "::ffff:192.0.2.7")])
    assert set(table.by_ip) == {"2001:db8::1", "192.0.2.7"}


def test_dual_stack_and_external() -> None:
    """Reaches a Node by all its InternalIPs, by ExternalIPs only where it has none."""
    both = a_node("both", "192.0.2.1", "2001:db8::1")
    both_kinds = Node(
        name="kinds",
        uid="u",
        created="2026",
        addresses=(NodeAddress("ExternalIP", "198.51.100.1"), NodeAddress("InternalIP", "192.0.2.2")),
        ready=True,
    )
    outside = a_node("outside", "198.51.100.2", kind="ExternalIP")
    table = NodeTable.of([both, both_kinds, outside, a_node("named", "host.example", kind="Hostname")])
    assert set(table.by_ip) == {"192.0.2.1", "2001:db8::1", "192.0.2.2", "198.51.100.2"}
    assert table.by_name["both"].address == "192.0.2.1"
    assert "named" not in table.by_name


def test_two_nodes_claim_one_address() -> None:
    """Gives an address to the Ready Node, else the older, and never to the other under its name or port."""
    old = a_node("old", "192.0.2.1", ready=False, created="2025-01-01T00:00:00Z")
    new = a_node("new", "192.0.2.1", created="2026-01-01T00:00:00Z")
    thief = a_node("thief", "192.0.2.1", port=6443, created="2026-02-02T00:00:00Z")
    table = NodeTable.of([thief, old, new])
    assert table.by_ip["192.0.2.1"] == Endpoint("192.0.2.1", 10250, "192.0.2.1", "uid-new")
    assert set(table.by_name) == {"new"}
    assert {endpoint.port for endpoint in table.endpoints} == {10250}


@pytest.mark.parametrize("port", [0, -1, 65536, 2**40])
def test_odd_kubelet_ports(port: int) -> None:
    """Leaves out a Node whose kubelet port is no port."""
    assert not NodeTable.of([a_node("one", "192.0.2.1", port=port)]).endpoints


def test_name_to_verify() -> None:
    """Asks the certificate for the address, or for the Node's name where that is chosen."""
    node = a_node("one", "192.0.2.1")
    assert NodeTable.of([node]).by_ip["192.0.2.1"].server_name == "192.0.2.1"
    assert NodeTable.of([node], verify_node_name=True).by_ip["192.0.2.1"].server_name == "one"


def test_holder() -> None:
    """Knows nothing at first and again once told to forget, and tells each change by its version."""
    nodes = Nodes()
    assert not nodes.known
    nodes.replace(NodeTable.of([a_node("one", "192.0.2.1")]))
    seen = [(nodes.known, len(nodes.current.by_name))]
    first = nodes.version
    nodes.forget()
    seen.append((nodes.known, len(nodes.current.by_name)))
    assert seen == [(True, 1), (False, 0)]
    assert nodes.version != first
