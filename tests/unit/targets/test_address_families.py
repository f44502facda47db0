"""Addresses of dual-stack Pods and Nodes, and Pods at host ports."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.kube.objects import decode_object
from k8s_consul_registrar.model import ContainerPort, Kind, Pod, Rejection, Target
from k8s_consul_registrar.proxy.nodes import NodeTable
from k8s_consul_registrar.proxy.routes import PERMITTED_PATHS, Route, find_route, proxied_pod
from k8s_consul_registrar.settings.reading import read_proxy, read_registrar
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from k8s_consul_registrar.targets.scrape_config import FAMILIES, url_host
from support.builders import SCRAPED, make_node, make_pod
from support.memory import MemoryCluster

V4, V6 = "198.51.100.10", "2001:db8::a"
HOST4, HOST6 = "192.0.2.10", "2001:db8:2::1"
DUAL: dict[str, Any] = {"ip": V4, "ips": (V4, V6), "host_ip": HOST4, "host_ips": (HOST4, HOST6)}
PREFIX = "prometheus.io/"


def asking(family: str) -> dict[str, str]:
    """Return the annotations of a Pod that asks for a family."""
    return {**SCRAPED, f"{PREFIX}ip-family": family}


def target_of(pod: Pod, **rules: Any) -> Target:
    """Return the one target of a Pod."""
    resolved = resolve(pod, TargetRules(**rules))
    assert isinstance(resolved, tuple), resolved
    (target,) = resolved
    return target


def reason_of(pod: Pod, **rules: Any) -> str:
    """Return why a Pod is rejected."""
    resolved = resolve(pod, TargetRules(**rules))
    assert isinstance(resolved, Rejection), resolved
    return resolved.reason


@pytest.mark.parametrize(
    ("setting", "annotation", "address"),
    [
        ("primary", None, V4),
        ("ipv4", None, V4),
        ("ipv6", None, V6),
        ("primary", "ipv6", V6),
        ("ipv6", "ipv4", V4),
        ("ipv6", "primary", V4),
        ("ipv6", " IPv4 ", V4),
        ("ipv6", "", V6),
    ],
)
def test_annotation_then_setting_chooses_the_family(
    setting: str, annotation: str | None, address: str
) -> None:
    """The ID stays, whatever the address."""
    pod = make_pod(annotations=SCRAPED if annotation is None else asking(annotation), **DUAL)
    target = target_of(pod, pod_ip_family=setting)
    assert (target.address, target.id) == (address, "pod--shop--web-1")
    proxied = proxied_pod(pod, PREFIX, family=setting)
    assert proxied is not None
    assert proxied.routes[0].endpoint.address == address


def test_family_that_the_pod_lacks_or_that_is_none_rejects_it() -> None:
    """The proxy serves no such Pod either."""
    pod = make_pod(annotations=asking("ipv6"))
    assert reason_of(pod) == Reason.NO_IP_FAMILY
    assert proxied_pod(pod, PREFIX) is None
    assert reason_of(make_pod(), pod_ip_family="ipv6") == Reason.NO_IP_FAMILY
    assert reason_of(make_pod(ip=""), pod_ip_family="ipv6") == Reason.NO_IP
    assert reason_of(make_pod(annotations=asking("both"), **DUAL)) == Reason.INVALID_IP_FAMILY
    assert reason_of(make_pod(ip=V4, ips=(V4, "odd")), pod_ip_family="ipv6") == Reason.INVALID_IP
    assert target_of(make_pod(ip=V6), pod_ip_family="ipv6").address == V6


@pytest.mark.parametrize(("family", "address"), [("primary", HOST4), ("ipv4", HOST4), ("ipv6", HOST6)])
def test_node_is_reached_at_its_address_of_the_family(family: str, address: str) -> None:
    """Its ID stays; the proxy reaches its kubelet, and Prometheus a Pod through the proxy, at the same address."""
    node = make_node("node-a", ("InternalIP", HOST4), ("InternalIP", HOST6))
    resolved = resolve(node, TargetRules(node_ip_family=family))
    assert isinstance(resolved, tuple)
    (target,) = resolved
    assert (target.address, target.id) == (address, f"node--{HOST4}")
    path = dict(target.meta)["metrics_path"]
    assert path == f"/api/v1/nodes/{url_host(address)}:10250/metrics/cadvisor"
    table = NodeTable.of([node], family=family)
    assert find_route(path.encode(), table, frozenset(PERMITTED_PATHS)) == (
        table.by_name["node-a"],
        "/metrics/cadvisor",
    )
    assert table.by_name["node-a"].address == address
    through = target_of(make_pod(**DUAL), node_ip_family=family, pods_through_proxy=True)
    assert (through.address, through.port) == (address, 31112)


def test_cluster_of_one_family_is_whole_in_it_and_nothing_in_the_other() -> None:
    """An IPv6 address is in brackets in the path, and as it is in the ID."""
    node = make_node("node-a", ("InternalIP", HOST6))
    resolved = resolve(node, TargetRules(node_ip_family="ipv6"))
    assert isinstance(resolved, tuple)
    assert (resolved[0].id, resolved[0].address) == (f"node--{HOST6}", HOST6)
    assert f"[{HOST6}]:10250" in dict(resolved[0].meta)["metrics_path"]
    rejected = resolve(node, TargetRules(node_ip_family="ipv4"))
    assert isinstance(rejected, Rejection)
    assert rejected.reason == Reason.NO_ADDRESS
    pod = make_pod(ip=V6, host_ip=HOST6)
    assert reason_of(pod, node_ip_family="ipv4", pods_through_proxy=True) == Reason.NO_HOST_IP


@pytest.mark.parametrize(
    ("kubelet", "family", "dialled"),
    [((HOST4,), "ipv6", HOST4), ((HOST4, HOST6), "ipv6", HOST6), ((HOST6, HOST4), "ipv4", HOST4)],
)
def test_path_names_an_address_that_the_proxy_dials(
    kubelet: tuple[str, ...], family: str, dialled: str
) -> None:
    """Prometheus may reach a Node at an ExternalIP of a family that its kubelet does not have."""
    outside = (("ExternalIP", "203.0.113.1"), ("ExternalIP", "2001:db8:9::1"))
    node = make_node("node-a", *outside, *(("InternalIP", one) for one in kubelet))
    resolved = resolve(node, TargetRules(node_ip_family=family, node_address_types=("ExternalIP",)))
    assert isinstance(resolved, tuple)
    (target,) = resolved
    assert target.id == f"node--{kubelet[0]}"
    assert target.address == {"ipv4": "203.0.113.1", "ipv6": "2001:db8:9::1"}[family]
    route = find_route(
        dict(target.meta)["metrics_path"].encode(), NodeTable.of([node]), frozenset(PERMITTED_PATHS)
    )
    assert isinstance(route, Route)
    assert route.endpoint.address == dialled


def test_pod_at_its_host_port() -> None:
    """The ID keeps the container's port; meta is that of a direct scrape."""
    port = ContainerPort("metrics", 9102, "TCP", 31000, "app")
    pod = make_pod(ports=(ContainerPort("dns", 9102, "UDP", 53, "app"), port), **DUAL)
    target = target_of(pod, pods_at_host=True)
    assert (target.address, target.port, target.id) == (HOST4, 31000, "pod--shop--web-1")
    assert target.meta == target_of(pod).meta
    assert not target.has_own_address
    assert target_of(pod, pods_at_host=True, node_ip_family="ipv6").address == HOST6
    six = make_pod(ports=(port,), annotations=asking("ipv6"), **DUAL)
    assert target_of(six, pods_at_host=True).address == HOST6


def test_pod_without_a_host_port_or_host_is_rejected() -> None:
    """On its Node's network a Pod has its ports there."""
    bare = make_pod(ports=(ContainerPort("metrics", 9102, "TCP"),), **DUAL)
    assert reason_of(bare, pods_at_host=True) == Reason.NO_HOST_PORT
    other = make_pod(ports=(ContainerPort("metrics", 9102, "UDP", 9102),), **DUAL)
    assert reason_of(other, pods_at_host=True) == Reason.NO_HOST_PORT
    port = ContainerPort("metrics", 9102, "TCP", 31000)
    assert reason_of(make_pod(ports=(port,)), pods_at_host=True) == Reason.NO_HOST_IP
    shared = make_pod(host_network=True, **DUAL)
    assert target_of(shared, pods_at_host=True).port == 9102


def test_both_modes_read_the_families() -> None:
    """So that the proxy dials what the registrar registers."""
    assert read_registrar({"NODE_IP_FAMILY": "ipv6"}).common.node_ip_family == "ipv6"
    assert read_proxy({"NODE_IP_FAMILY": "ipv6"}).common.node_ip_family == "ipv6"
    assert read_registrar({"POD_IP_FAMILY": "ipv6", "POD_ADDRESS": "host"}).selection.ip_family == "ipv6"
    pods = read_proxy({"PROXY_PODS": "true", "POD_IP_FAMILY": "ipv6", "PROXY_BEARER_TOKEN_FILE": "/t"}).pods
    assert pods is not None
    assert pods.ip_family == "ipv6"


def test_addresses_of_both_families_are_read() -> None:
    """A Pod of one family has them once."""
    status = {"podIP": V4, "podIPs": [{"ip": V4}, {"ip": V6}], "hostIP": HOST4, "hostIPs": [{"ip": HOST4}]}
    raw = json.dumps({"metadata": {"name": "a", "namespace": "shop"}, "status": status}).encode()
    pod = decode_object(raw, Kind.POD)
    assert isinstance(pod, Pod)
    assert (pod.ips, pod.host_ips) == ((V4, V6), ())


_TEXTS = st.sampled_from(
    ["", V4, V6, HOST4, HOST6, "odd", "fe80::1%eth0", "::", "0.0.0.0", "::ffff:192.0.2.1"]
)
_PORTS = st.lists(
    st.builds(
        ContainerPort,
        st.sampled_from(["metrics", "web", ""]),
        st.sampled_from([80, 9102]),
        st.sampled_from(["TCP", "UDP"]),
        st.sampled_from([0, 31000]),
    ),
    max_size=3,
)


_FAMILY = st.sampled_from(FAMILIES)
_PODS = st.builds(
    make_pod,
    ip=_TEXTS,
    ips=st.lists(_TEXTS, max_size=3).map(tuple),
    host_ip=_TEXTS,
    host_ips=st.lists(_TEXTS, max_size=3).map(tuple),
    ports=_PORTS.map(tuple),
    annotations=st.sampled_from([*FAMILIES, "both", ""]).map(asking),
    host_network=st.booleans(),
)
_RULES = st.builds(
    TargetRules,
    pod_ip_family=_FAMILY,
    node_ip_family=_FAMILY,
    pods_through_proxy=st.booleans(),
    pods_at_host=st.booleans(),
)


@given(_PODS, _RULES)
def test_any_pod_is_targets_or_has_one_reason(pod: Pod, rules: TargetRules) -> None:
    """Whatever its addresses are, a target has one that can be scraped, of the family that was asked for."""
    cluster = MemoryCluster(rules=rules)
    cluster.put(pod)
    claims, rejections = cluster.desired.claims, cluster.desired.rejections
    assert bool(claims) is not bool(rejections)
    annotated = pod.annotations[f"{PREFIX}ip-family"]
    for (target,) in claims.values():
        assert 1 <= target.port <= 65535
        assert target.address in {V4, V6, HOST4, HOST6, "192.0.2.1"}
        family = annotated or (rules.node_ip_family if rules.pods_at_host else rules.pod_ip_family)
        if rules.pods_through_proxy:
            family = rules.node_ip_family
        if family != "primary":
            assert (":" in target.address) is (family == "ipv6")
