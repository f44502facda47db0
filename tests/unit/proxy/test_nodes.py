"""Which addresses may be dialled, whatever a Node claims."""

import pytest

from k8s_consul_registrar.model import Node, NodeAddress
from k8s_consul_registrar.proxy.nodes import MAX_ADDRESSES, Contest, Endpoint, Nodes, NodeTable


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
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd00:42::42",
        "fd00:c1::a9fe:a9fe",
        "fd20:ce::254",
        "2001:0:a9fe:a9fe::",
        "::ffff:192.0.2.7",
        "::ffff:0:192.0.2.7",
        "64:ff9b::6464:64c8",
        "64:ff9b:1::a9fe:a9fe",
        "64:ff9b:1:a9fe:a9:fe00::",
        "2002:6464:64c8::",
        "2002:a83f:8110::1",
        "2001:db8::5efe:a9fe:a9fe",
        "2001:db8::200:5efe:7f00:1",
        "::5efe:a9fe:a9fe",
        "::168.63.129.16",
        "fd00::1%eth0",
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
    assert not table.by_address
    assert not table.addresses
    assert not table.by_name
    assert not table.endpoints


@pytest.mark.parametrize(
    "address",
    ["240.0.0.1", "254.1.2.3", "100.100.100.201", "2001:db8::1", "2001:1::1", "fd00:ec3::254", "fd00::1"],
)
def test_dialled(address: str) -> None:
    """Leaves in the neighbours of special addresses, and what is reserved for future use."""
    assert NodeTable.of([a_node("one", address)]).addresses == {address}


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "127.0.0.2"])
def test_loopback_by_choice(address: str) -> None:
    """Lets loopback in where it is asked for, and nothing else special."""
    nodes = [a_node("one", address), a_node("two", "169.254.169.254"), a_node("three", "0.0.0.0")]
    assert NodeTable.of(nodes, allow_loopback=True).addresses == {address}


def test_canonical_spelling() -> None:
    """Knows each address by one spelling."""
    table = NodeTable.of([a_node("one", "2001:DB8:0::0001"), a_node("two", "192.0.2.7")])
    assert set(table.by_address) == {("2001:db8::1", 10250), ("192.0.2.7", 10250)}


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
    assert table.addresses == {"192.0.2.1", "2001:db8::1", "192.0.2.2", "198.51.100.2"}
    assert table.by_name["both"].address == "192.0.2.1"
    assert "named" not in table.by_name


def test_family_comes_first_at_a_dual_stack_node_and_takes_no_address_away() -> None:
    """By its name a Node is reached in the family, by address in both; one of the other family stays reachable."""
    nodes = [a_node("both", "192.0.2.1", "2001:db8::1"), a_node("four", "192.0.2.2")]
    table = NodeTable.of(nodes, family="ipv6")
    assert {name: one.address for name, one in table.by_name.items()} == {
        "both": "2001:db8::1",
        "four": "192.0.2.2",
    }
    assert table.addresses == {"192.0.2.1", "2001:db8::1", "192.0.2.2"}


def test_address_of_the_family_is_its_nodes_whatever_an_older_node_claims_beside_its_own() -> None:
    """The path that the registrar writes names a first address, which a further one does not take over."""
    victim = a_node("victim", "192.0.2.1", "2001:db8::1", created="2026-02-02T00:00:00Z")
    older = a_node("older", "192.0.2.9", "2001:db8::9", "2001:db8::1", created="2025-01-01T00:00:00Z")
    table = NodeTable.of([older, victim], family="ipv6")
    assert table.by_address["2001:db8::1", 10250].uid == "uid-victim"
    assert table.contests == (Contest("2001:db8::1", "victim", ("older",)),)


VICTIM = a_node("victim", "192.0.2.1", created="2026-02-02T00:00:00Z")


@pytest.mark.parametrize("verify_node_name", [False, True])
@pytest.mark.parametrize("port", [10250, 4433])
def test_older_node_that_claims_anothers_first_address_does_not_erase_it(
    port: int, *, verify_node_name: bool
) -> None:
    """A first address wins over a further one at any port, by address and by name; the claim is contested."""
    older = a_node("older", "192.0.2.9", "192.0.2.1", port=port, created="2025-01-01T00:00:00Z")
    table = NodeTable.of([older, VICTIM], verify_node_name=verify_node_name)
    name = "victim" if verify_node_name else "192.0.2.1"
    expected = Endpoint("192.0.2.1", 10250, name, "uid-victim")
    assert table.by_name["victim"] == table.by_address["192.0.2.1", 10250] == expected
    assert table.by_name["older"].address == "192.0.2.9"
    assert set(table.by_address) == {("192.0.2.1", 10250), ("192.0.2.9", port)}
    assert table.contests == (Contest("192.0.2.1", "victim", ("older",)),)


def test_node_whose_first_address_another_has_is_reached_by_its_name() -> None:
    """Of two first claims at one port the Ready Node, else the older, has the address; each keeps its name."""
    old = a_node("old", "192.0.2.1", ready=False, created="2025-01-01T00:00:00Z")
    table = NodeTable.of([old, VICTIM, a_node("young", "192.0.2.1", created="2026-03-03T00:00:00Z")])
    assert table.by_address["192.0.2.1", 10250].uid == "uid-victim"
    assert {name: endpoint.uid for name, endpoint in table.by_name.items()} == {
        "old": "uid-old",
        "victim": "uid-victim",
        "young": "uid-young",
    }
    assert table.endpoints == set(table.by_name.values())
    assert table.contests == (Contest("192.0.2.1", "victim", ("young", "old")),)


def test_two_kubelets_at_one_address_and_different_ports_are_both_reached() -> None:
    """Neither is contested: an address and a port together name a kubelet."""
    table = NodeTable.of([VICTIM, a_node("other", "192.0.2.1", port=10251)])
    assert table.by_address["192.0.2.1", 10250] == table.by_name["victim"]
    assert table.by_address["192.0.2.1", 10251] == table.by_name["other"]
    assert not table.contests


def test_api_server_is_not_dialled_and_a_kubelet_beside_it_is() -> None:
    """Only its own address and port are taken out, for a Node's first and further addresses."""
    control_plane = a_node("control-plane", "192.0.2.1")
    table = NodeTable.of(
        [
            control_plane,
            a_node("evil", "192.0.2.1", port=6443),
            a_node("other", "192.0.2.2", "192.0.2.1", port=6443),
        ],
        api_server=frozenset({("192.0.2.1", 6443)}),
    )
    assert set(table.by_address) == {("192.0.2.1", 10250), ("192.0.2.2", 6443)}
    assert set(table.by_name) == {"control-plane", "other"}


def test_node_is_reached_at_a_bounded_number_of_addresses() -> None:
    """A Node may write thousands into its own status."""
    many = a_node("many", *(f"198.18.{number // 250}.{number % 250 + 1}" for number in range(3000)))
    assert len(NodeTable.of([many]).by_address) == MAX_ADDRESSES


@pytest.mark.parametrize("port", [0, -1, 65536, 2**40])
def test_odd_kubelet_ports(port: int) -> None:
    """Leaves out a Node whose kubelet port is no port."""
    assert not NodeTable.of([a_node("one", "192.0.2.1", port=port)]).endpoints


def test_name_to_verify() -> None:
    """Asks the certificate for the address, or for the Node's name where that is chosen."""
    node = a_node("one", "192.0.2.1")
    assert NodeTable.of([node]).by_address["192.0.2.1", 10250].server_name == "192.0.2.1"
    assert NodeTable.of([node], verify_node_name=True).by_address["192.0.2.1", 10250].server_name == "one"


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
