"""Pods registered at the proxy: the address, the path and what the proxy would refuse."""

import pytest

from k8s_consul_registrar.errors import Reason
from k8s_consul_registrar.model import Pod, Rejection, Target
from k8s_consul_registrar.proxy.nodes import NodeTable
from k8s_consul_registrar.proxy.routes import Pods, Route, find_pod, proxied_pod
from k8s_consul_registrar.targets.resolve import TargetRules, resolve
from support.builders import annotated, make_node, make_pod, tcp

RULES = TargetRules(pods_through_proxy=True)


def targets(pod: Pod, rules: TargetRules = RULES) -> tuple[Target, ...]:
    """Return the targets of a Pod on a node at 192.0.2.10."""
    resolved = resolve(pod, rules)
    assert isinstance(resolved, tuple), resolved
    return resolved


def test_pod_is_the_proxy_at_its_node() -> None:
    """Address and port are the proxy's, the ID is the Pod's own, and its path and parameters are left out."""
    annotations = annotated(port="9102", path="/stats?a=b", scheme="https", param__c="d")
    (target,) = targets(make_pod(host_ip="192.0.2.10", annotations=annotations))
    assert (target.id, target.address, target.port) == ("pod--shop--web-1", "192.0.2.10", 31112)
    assert dict(target.meta) == {
        "kind": "pod",
        "metrics_path": "/api/v1/namespaces/shop/pods/web-1/metrics",
        "namespace": "shop",
        "node": "node-a",
        "pod": "web-1",
        "scheme": "http",
    }


def test_several_ports_are_several_paths() -> None:
    """Each names its port; the IDs are those that the ports have without the proxy."""
    pod = make_pod(host_ip="192.0.2.10", annotations=annotated(port="9102,9103"))
    through, direct = targets(pod), targets(pod, TargetRules())
    assert [one.id for one in through] == [one.id for one in direct]
    assert [dict(one.meta)["metrics_path"] for one in through] == [
        "/api/v1/namespaces/shop/pods/web-1:9102/metrics",
        "/api/v1/namespaces/shop/pods/web-1:9103/metrics",
    ]
    assert {one.port for one in through} == {31112}


def test_pod_behind_the_proxy_has_no_address_of_its_own() -> None:
    """All Pods of a Node share the proxy's address and port, which is no conflict."""
    pod = make_pod(host_ip="192.0.2.10")
    assert [one.has_own_address for one in (*targets(pod), *targets(pod, TargetRules()))] == [False, True]


def test_proxys_scheme_is_for_nodes_and_pods() -> None:
    """Both are scraped by https where the proxy speaks it; Pods at their own address are not concerned."""
    rules = TargetRules(pods_through_proxy=True, proxy_scheme="https")
    (pod,) = targets(make_pod(host_ip="192.0.2.10"), rules)
    node = resolve(make_node(), rules)
    assert isinstance(node, tuple)
    assert [dict(one.meta)["scheme"] for one in (pod, *node)] == ["https", "https"]
    (direct,) = targets(make_pod(), TargetRules(proxy_scheme="https"))
    assert dict(direct.meta)["scheme"] == "http"


@pytest.mark.parametrize("host_ip", ["", "node-a", "0.0.0.0", "ff02::1"])
def test_node_without_an_address(host_ip: str) -> None:
    """A Pod whose status names no address of its node is rejected."""
    resolved = resolve(make_pod(host_ip=host_ip), RULES)
    assert isinstance(resolved, Rejection)
    assert (resolved.reason, resolved.id) == (Reason.NO_HOST_IP, "pod--shop--web-1")


@pytest.mark.parametrize(
    ("ports", "is_refused"),
    [((), True), ((tcp(9102),), False), ((tcp(9103),), True), ((tcp(9102, "u", "UDP"),), True)],
)
def test_pod_with_its_nodes_network(ports: tuple[object, ...], is_refused: bool) -> None:
    """An undeclared port is rejected where it goes through the proxy, and only there."""
    pod = make_pod(host_ip="192.0.2.10", host_network=True, ports=ports)
    resolved = resolve(pod, RULES)
    assert isinstance(resolved, Rejection) is is_refused
    if isinstance(resolved, Rejection):
        assert resolved.reason == Reason.UNDECLARED_PORT
    assert isinstance(resolve(pod, TargetRules()), tuple)


def test_pod_is_rejected_for_what_it_would_be_without_the_proxy() -> None:
    """The same annotations are honoured either way."""
    pod = make_pod(host_ip="192.0.2.10", ip="", annotations=annotated(port="9102"))
    resolved = resolve(pod, RULES)
    assert isinstance(resolved, Rejection)
    assert resolved.reason == Reason.NO_IP


@pytest.mark.parametrize("port", ["9102", "9102,9103", "9103, 9102"])
def test_proxy_knows_every_path_that_is_registered(port: str) -> None:
    """A path that the registrar writes leads, in the proxy, to that very port of the Pod."""
    pod = make_pod(host_ip="192.0.2.10", annotations=annotated(port=port))
    pods = Pods()
    pods.put(pod.namespace, pod.name, proxied_pod(pod, "prometheus.io/"))
    pods.known = True
    direct = targets(pod, TargetRules())
    for target, own in zip(targets(pod), direct, strict=True):
        route = find_pod(dict(target.meta)["metrics_path"].encode(), pods, NodeTable())
        assert isinstance(route, Route)
        assert (route.endpoint.address, route.endpoint.port) == (own.address, own.port)
