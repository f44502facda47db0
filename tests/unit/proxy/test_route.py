"""The allow-list's decision on raw request targets."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.model import Node, NodeAddress
from k8s_consul_registrar.proxy.nodes import NodeTable
from k8s_consul_registrar.proxy.refusals import Outcome, Refusal
from k8s_consul_registrar.proxy.routes import PERMITTED_PATHS, Route, find_route
from k8s_consul_registrar.settings.reading import read_proxy


def a_node(name: str, *addresses: str, port: int = 10250) -> Node:
    """Return a Ready Node."""
    entries = tuple(NodeAddress("InternalIP", address) for address in addresses)
    return Node(name=name, uid=name, created="2026", addresses=entries, kubelet_port=port, ready=True)


TABLE = NodeTable.of(
    [
        a_node("worker-1.example", "192.0.2.1", "2001:db8::1"),
        a_node("worker-2", "192.0.2.2", port=10251),
        # A Node may be named like another's address; it must not be mistaken for it.
        a_node("192.0.2.1", "192.0.2.3"),
    ]
)
PATHS = frozenset({"/metrics/cadvisor"})


def find(target: str) -> Route | Refusal:
    """Decide on a target by the table above."""
    return find_route(target.encode("latin-1"), TABLE, PATHS)


@pytest.mark.parametrize(
    ("target", "address", "port"),
    [
        ("/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor", "192.0.2.1", 10250),
        ("/api/v1/nodes/192.0.2.2:10251/metrics/cadvisor", "192.0.2.2", 10251),
        ("/api/v1/nodes/[2001:db8::1]:10250/metrics/cadvisor", "2001:db8::1", 10250),
        ("/api/v1/nodes/%5B2001:db8::1%5D:10250/metrics/cadvisor", "2001:db8::1", 10250),
        ("/api/v1/nodes/%5b2001:DB8:0::1%5d:10250/metrics/cadvisor", "2001:db8::1", 10250),
        ("/api/v1/nodes/worker-1.example/proxy/metrics/cadvisor", "192.0.2.1", 10250),
        ("/api/v1/nodes/worker-2/proxy/metrics/cadvisor", "192.0.2.2", 10251),
        ("/api/v1/nodes/192.0.2.1/proxy/metrics/cadvisor", "192.0.2.3", 10250),
        ("/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor?a=b&../x", "192.0.2.1", 10250),
        ("/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor?", "192.0.2.1", 10250),
    ],
)
def test_allowed(target: str, address: str, port: int) -> None:
    """Leads to the Node asked for, the query left behind."""
    route = find(target)
    assert isinstance(route, Route)
    assert (route.endpoint.address, route.endpoint.port, route.path) == (address, port, "/metrics/cadvisor")


ATTACKS = [
    "/",
    "/metrics/cadvisor",
    "/api/v1/nodes",
    "/api/v1/nodes/",
    "/api/v1/nodes//metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:10255/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:010250/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:+10250/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:10250:10250/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:75786/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:10250/metrics",
    "/api/v1/nodes/192.0.2.1:10250/metrics/resource",
    "/api/v1/nodes/192.0.2.1:10250/pods",
    "/api/v1/nodes/192.0.2.1:10250/exec/ns/pod/container",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor/",
    "/api/v1/nodes/192.0.2.1:10250//metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:10250/metrics//cadvisor",
    "/api/v1/nodes/192.0.2.1:10250/metrics/./cadvisor",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor/../../pods",
    "/api/v1/nodes/192.0.2.1:10250/metrics%2Fcadvisor",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor%2F..%2F..%2Fpods",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor%00",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor;x=y",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor#x",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor?#x",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor\\..\\pods",
    "/api/v1/nodes/192.0.2.1:10250/%6detrics/cadvisor",
    "/api/v1/nodes/192.0.2.1%3A10250/metrics/cadvisor",
    "/api/v1/nodes/192%2E0.2.1:10250/metrics/cadvisor",
    "/api/v1/nodes/user@192.0.2.1:10250/metrics/cadvisor",
    "/api/v1/nodes/user:pass@192.0.2.1:10250/metrics/cadvisor",
    "/api/v1/nodes/[192.0.2.1]:10250/metrics/cadvisor",
    "/api/v1/nodes/2001:db8::1:10250/metrics/cadvisor",
    "/api/v1/nodes/[2001:db8::1%25eth0]:10250/metrics/cadvisor",
    "/api/v1/nodes/%5B2001:db8::1]:10250/metrics/cadvisor",
    "/api/v1/nodes/[2001:db8::1%5D:10250/metrics/cadvisor",
    "/api/v1/nodes/%255B2001:db8::1%255D:10250/metrics/cadvisor",
    "/api/v1/nodes/0300.0.2.1:10250/metrics/cadvisor",
    "/api/v1/nodes/3221225985:10250/metrics/cadvisor",
    "/api/v1/nodes/0xc0000201:10250/metrics/cadvisor",
    "/api/v1/nodes/127.0.0.1:10250/metrics/cadvisor",
    "/api/v1/nodes/169.254.169.254:80/metrics/cadvisor",
    "/api/v1/nodes/[::ffff:127.0.0.1]:10250/metrics/cadvisor",
    "/api/v1/nodes/worker-1.example:10250/metrics/cadvisor",
    "/api/v1/nodes/worker-1.example:10250/proxy/metrics/cadvisor",
    "/api/v1/nodes/https:worker-1.example:10250/proxy/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:10250/proxy/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.2/proxy/metrics/cadvisor",
    "/api/v1/nodes/worker-1.example/proxy/pods",
    "/api/v1/nodes/worker-1.example/proxy/run/ns/pod/container",
    "/api/v1/nodes/worker-1.example/proxy/proxy/metrics/cadvisor",
    "/api/v1/nodes/worker-1.example/proxy//metrics/cadvisor",
    "/api/v1/nodes/worker-1.example/../worker-2/proxy/metrics/cadvisor",
    "/api/v1/nodes/WORKER-2/proxy/metrics/cadvisor",
    "/api/v1/nodes/worker-2./proxy/metrics/cadvisor",
    "/api/v1/namespaces/ns/pods/pod/proxy/metrics",
    "/API/V1/nodes/192.0.2.1:10250/metrics/cadvisor",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor\n",
    "/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor HTTP/1.1\r\nX: y",
    "/api/v1/nodes/192.0.2.\xb1:10250/metrics/cadvisor",
    "http://192.0.2.1:10250/metrics/cadvisor",
    "http://192.0.2.1:10250/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor",
    "//192.0.2.1:10250/metrics/cadvisor",
    "192.0.2.1:10250",
    "*",
    "",
]


@pytest.mark.parametrize("target", ATTACKS)
def test_refused(target: str) -> None:
    """Leads nowhere, with an answer that quotes nothing of the target."""
    refusal = find(target)
    assert isinstance(refusal, Refusal)
    assert refusal.status in (400, 404)


def test_words_of_refusals() -> None:
    """Tells an unknown path, an unknown Node and not yet knowing any apart."""
    assert find("/pods") == Refusal(404, Outcome.UNKNOWN_PATH, find("/pods").reason)  # type: ignore[union-attr]
    unknown = find("/api/v1/nodes/192.0.2.9:10250/metrics/cadvisor")
    assert isinstance(unknown, Refusal)
    assert (unknown.status, unknown.outcome) == (404, Outcome.UNKNOWN_NODE)
    target = b"/api/v1/nodes/192.0.2.1:10250/metrics/cadvisor"
    early = find_route(target, NodeTable(), PATHS, known=False)
    assert isinstance(early, Refusal)
    assert (early.status, early.outcome) == (503, Outcome.NODES_UNKNOWN)
    assert find_route(b"/nothing", NodeTable(), PATHS, known=False).status == 404  # type: ignore[union-attr]


@pytest.mark.parametrize("path", PERMITTED_PATHS)
def test_paths_by_choice(path: str) -> None:
    """Relays each path the permission covers once it is chosen, and only then."""
    target = f"/api/v1/nodes/192.0.2.1:10250{path}".encode()
    assert isinstance(find_route(target, TABLE, PATHS | {path}), Route)
    assert isinstance(find_route(target, TABLE, PATHS), Route) == (path == "/metrics/cadvisor")


def test_paths_beyond_the_permission() -> None:
    """Refuses to relay what nodes/metrics does not cover."""
    with pytest.raises(SettingsError, match="/pods"):
        read_proxy({"PROXY_PATHS": "/metrics,/pods"})


PIECES = st.sampled_from(
    [
        "/api/v1/nodes/",
        "192.0.2.1",
        "192.0.2.2",
        "[2001:db8::1]",
        "%5B2001:db8::1%5D",
        "worker-2",
        ":10250",
        ":10251",
        "/proxy",
        "/metrics/cadvisor",
        "/metrics",
        "?",
        "..",
        "/",
        "//",
        "%2e",
        "%2F",
        "@",
        "\\",
        "#",
        ";",
        "\x00",
        "http://",
    ]
)


@given(st.one_of(st.lists(PIECES, max_size=8).map("".join), st.text(max_size=60)))
@example("/api/v1/nodes/192.0.2.2:10251/metrics/cadvisor")
def test_only_allowed_pairs(target: str) -> None:
    """Whatever the target, leads to a Node's own address and port with an allowed path, or nowhere."""
    route = find_route(target.encode("utf-8", "surrogatepass"), TABLE, PATHS)
    if isinstance(route, Route):
        assert route.endpoint in TABLE.endpoints
        assert route.path == "/metrics/cadvisor"
        bare = target.partition("?")[0]
        assert "//" not in bare
        assert ".." not in bare
        assert bare.startswith("/api/v1/nodes/")
        assert bare.endswith("/metrics/cadvisor")
    else:
        assert route.status in (400, 404)


@pytest.mark.parametrize(
    ("target", "setting"),
    [
        ("/api/v1/nodes/192.0.2.1:10250/metrics", "PROXY_PATHS"),
        ("/api/v1/nodes/worker-2/proxy/metrics/resource", "PROXY_PATHS"),
        ("/api/v1/namespaces/shop/pods/web-1/metrics", "PROXY_PODS"),
    ],
)
def test_a_path_that_a_setting_would_allow_names_the_setting(target: str, setting: str) -> None:
    """The 404 says what to set; one for a path that is never relayed does not."""
    refusal = find(target)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.outcome) == (404, Outcome.UNKNOWN_PATH)
    assert setting in refusal.reason
    never = find("/api/v1/nodes/192.0.2.1:10250/pods")
    assert isinstance(never, Refusal)
    assert "PROXY" not in never.reason
