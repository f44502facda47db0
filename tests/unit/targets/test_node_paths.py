"""Kubelet paths of Nodes: their services, and the paths of Windows Nodes."""

import pytest

from k8s_consul_registrar.model import Node, Target
from k8s_consul_registrar.proxy.nodes import NodeTable
from k8s_consul_registrar.proxy.routes import PERMITTED_PATHS, Route, find_route
from k8s_consul_registrar.settings.reading import read_registrar
from k8s_consul_registrar.targets.resolve import resolve
from k8s_consul_registrar.wiring.registrar import Wiring
from support.builders import make_node

ALL = "/metrics/cadvisor,/metrics,/metrics/resource,/metrics/probes"


def targets(node: Node, **settings: str) -> tuple[Target, ...]:
    """Return the targets of a Node under these settings."""
    resolved = resolve(node, Wiring(read_registrar({"CLUSTER_NAME": "lab", **settings})).targets)
    assert isinstance(resolved, tuple), resolved
    return resolved


def paths(node: Node, **settings: str) -> list[str]:
    """Return the kubelet paths that the services of a Node lead to."""
    return [dict(one.meta)["metrics_path"].partition(":10250")[2] for one in targets(node, **settings)]


WINDOWS = make_node(labels={"kubernetes.io/os": "windows"})


def test_each_path_is_a_service_of_its_own() -> None:
    """The first has the ID that a Node always had, and the address and rank are the same for all."""
    found = targets(make_node(), NODE_PATHS=ALL)
    assert [one.id for one in found] == [
        "node--192.0.2.10",
        "node--192.0.2.10--kubelet",
        "node--192.0.2.10--resource",
        "node--192.0.2.10--probes",
    ]
    assert [dict(one.meta)["node_path"] for one in found] == ALL.split(",")
    assert len({(one.address, one.port, one.name, one.rank) for one in found}) == 1
    assert targets(make_node(), NODE_PATHS="/metrics,/metrics/cadvisor")[1].id == "node--192.0.2.10--cadvisor"


def test_proxy_relays_each_registered_path() -> None:
    """The proxy understands what the registrar writes."""
    table, permitted = NodeTable.of([make_node()]), frozenset(PERMITTED_PATHS)
    for one in targets(make_node(), NODE_PATHS=ALL):
        meta = dict(one.meta)
        route = find_route(meta["metrics_path"].encode(), table, permitted)
        assert isinstance(route, Route)
        assert route.path == meta["node_path"]


def test_nothing_changes_without_the_setting() -> None:
    """On Windows neither: the proxy relays nothing but cadvisor until `PROXY_PATHS` says so."""
    for node in (make_node(), WINDOWS):
        (one,) = targets(node)
        assert dict(one.meta).keys() == {"kind", "metrics_path", "node", "scheme"}
        assert paths(node) == ["/metrics/cadvisor"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"NODE_PATHS": "/metrics/cadvisor"}, ["/metrics/resource"]),
        ({"NODE_PATHS": "/metrics/cadvisor,/metrics,/metrics/resource"}, ["/metrics/resource", "/metrics"]),
        ({"NODE_PATHS": ALL, "NODE_PATHS_WINDOWS": "/metrics"}, ["/metrics"]),
        ({"NODE_PATHS_WINDOWS": "/metrics/cadvisor"}, ["/metrics/cadvisor"]),
    ],
)
def test_windows_node_gets_useful_paths(settings: dict[str, str], expected: list[str]) -> None:
    """Its cadvisor path is empty; each path is registered once, and the meta says that it is no Linux."""
    assert paths(WINDOWS, **settings) == expected
    assert {dict(one.meta)["node_os"] for one in targets(WINDOWS, **settings)} == {"windows"}
    assert "node_os" not in dict(targets(make_node(labels={"kubernetes.io/os": "linux"}), **settings)[0].meta)
