"""Meta that targets inherit from their Namespace and their Node: who has it, what fits, and what keeps it."""

from collections.abc import Mapping

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.model import Kind, Namespace, Node, SliceEndpoint, Source, Target, Undecodable
from k8s_consul_registrar.registrar import desired as module
from k8s_consul_registrar.registrar.claims import Change
from k8s_consul_registrar.registrar.decide import Desired, InSync, Register, Rules, Update, decide
from k8s_consul_registrar.registrar.observed import AsDesired, observe
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.targets.meta import (
    MOST_META_PAIRS,
    NAMESPACE_LABEL_PREFIX,
    NODE_LABEL_PREFIX,
    LabelMeta,
    parse_labels,
)
from k8s_consul_registrar.targets.resolve import TargetRules
from k8s_consul_registrar.targets.service_names import RandomShards
from support.builders import make_kube_service, make_node, make_pod, make_slice, our_pod_service
from support.memory import NAMESPACES, NODES, PODS, SERVICES, SLICES, MemoryCluster

SOURCES = (NAMESPACES, NODES, PODS)
RULES = TargetRules(
    namespace_labels=parse_labels(["team", "cost/center"], NAMESPACE_LABEL_PREFIX),
    node_labels=parse_labels(["pool"], NODE_LABEL_PREFIX),
)
DECISIONS = Rules(Identity("lab"), RandomShards())
ZONE_LABEL = "topology.kubernetes.io/zone"
OF_SHOP = {"namespace_label_team": "web", "namespace_label_cost_center": "7"}
OF_NODE = {"node_label_pool": "spot"}


def shop(**labels: str) -> Namespace:
    """Return the Namespace shop of the team web unless changed."""
    return Namespace("shop", {"team": "web", "cost/center": "7", "other": "x", **labels})


def pooled(pool: str = "spot", **labels: str) -> Node:
    """Return the Node of the Pods, in a pool."""
    return make_node(labels={"pool": pool, **labels})


def world(*, rules: TargetRules = RULES, sources: tuple[Source, ...] = SOURCES) -> MemoryCluster:
    """Return a cluster of which nothing is listed yet."""
    return MemoryCluster(sources, rules=rules)


def listed() -> MemoryCluster:
    """Return a cluster of one Namespace, Node and Pod."""
    made = world()
    made.put_list([shop()], NAMESPACES)
    made.put_list([pooled()], NODES)
    made.put_list([make_pod("a")], PODS)
    return made


def target_in(cluster: MemoryCluster, name: str = "a") -> Target:
    """Return the one target of a Pod."""
    (target,) = cluster.desired.claims[f"pod--shop--{name}"]
    return target


def inherited(cluster: MemoryCluster, name: str = "a") -> dict[str, str]:
    """Return what a Pod's target has of its Namespace and Node."""
    return {
        key: value
        for key, value in target_in(cluster, name).meta
        if key.startswith(("namespace_label_", "node_label_", "zone"))
    }


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_pod_has_the_labels_of_its_namespace_and_node_whichever_is_seen_first(order: tuple[int, ...]) -> None:
    """Only those that are named, and sorted like all meta."""
    cluster = world()
    lists = ([shop()], NAMESPACES), ([pooled()], NODES), ([make_pod("a")], PODS)
    for number in order:
        items, source = lists[number]
        cluster.put_list(items, source)
    assert inherited(cluster) == OF_SHOP | OF_NODE
    assert list(target_in(cluster).meta) == sorted(target_in(cluster).meta)
    assert target_in(cluster).awaits == ()


def test_node_has_its_own_labels() -> None:
    """Like the Pods on it."""
    (target,) = listed().desired.claims["node--192.0.2.10"]
    assert dict(target.meta)["node_label_pool"] == "spot"


def test_pod_that_names_its_own_zone_has_the_other_labels_of_its_node() -> None:
    """The zone of the Pod wins in any order."""
    cluster = listed()
    cluster.put(make_pod("a", labels={ZONE_LABEL: "own"}))
    cluster.put(pooled("ondemand", **{ZONE_LABEL: "of-node"}))
    assert inherited(cluster) == OF_SHOP | {"node_label_pool": "ondemand", "zone": "own"}


def test_changed_label_of_a_namespace_changes_its_pods_as_bulk_work() -> None:
    """Pods of other namespaces are left alone; an equal Namespace changes nothing."""
    cluster = listed()
    cluster.put(make_pod("b", namespace="other"))
    changes: list[Change] = []
    cluster.desired.subscribe(changes.append, lambda *_: None)
    cluster.put(shop(other="y"))
    assert changes == []
    cluster.put(shop(team="search"))
    assert [(one.asked, one.dropped, one.heard_at) for one in changes] == [(("pod--shop--a",), (), None)]
    assert inherited(cluster)["namespace_label_team"] == "search"
    cluster.put(Namespace("shop"))
    assert inherited(cluster) == OF_NODE


def test_namespace_with_many_pods_is_handed_down_in_slices() -> None:
    """One step has a bound, so that the loop never stalls."""
    cluster = listed()
    names = [f"p{number}" for number in range(2 * module.SLICE)]
    for number, name in enumerate(names):
        cluster.put(make_pod(name, ip=f"10.0.{number // 200}.{number % 200 + 1}"))
    cluster.put(shop(team="search"))

    def changed() -> int:
        return sum(inherited(cluster, name)["namespace_label_team"] == "search" for name in names)

    assert 0 < changed() <= module.SLICE
    while cluster.desired.hand_down():
        pass
    assert changed() == len(names)


def test_meta_outlives_the_sight_of_its_namespace_and_node() -> None:
    """A failure, a list without them, a deletion and an object that cannot be read take nothing away."""
    cluster = listed()
    for source in (NAMESPACES, NODES):
        cluster.store.fail(source, "403", "denied")
        cluster.put_list([], source)
    assert inherited(cluster) == OF_SHOP | OF_NODE
    cluster.put(shop())
    cluster.store.put(NAMESPACES, Undecodable(Kind.NAMESPACE, shop().key, "odd"))
    assert cluster.store.get(shop().key) == shop()
    for item in (shop(), pooled()):
        cluster.put(item)
        cluster.remove(item)
    cluster.put(make_pod("b", ip="198.51.100.11"))
    assert inherited(cluster) == inherited(cluster, "b") == OF_SHOP | OF_NODE


def test_namespace_is_forgotten_with_its_last_pod() -> None:
    """Namespaces that come and go for years leave nothing behind, in either order."""
    cluster = listed()
    cluster.remove(shop())
    cluster.remove(make_pod("a"))
    cluster.put(make_pod("a"))
    assert inherited(cluster) == OF_NODE
    cluster.put(shop())
    cluster.remove(make_pod("a"))
    cluster.remove(shop())
    cluster.put(make_pod("a"))
    assert inherited(cluster) == OF_NODE


# What Consul holds meanwhile


def decided(cluster: MemoryCluster, meta: Mapping[str, str]) -> InSync | Update | Register:
    """Return the decision about the Pod's service whose record in Consul has this meta."""
    record = observe(our_pod_service("a", **meta), Identity("lab"), "")
    action = decide(Desired("pod--shop--a", (target_in(cluster),)), record, DECISIONS)
    assert isinstance(action, (InSync, Update, Register)), action
    return action


@pytest.mark.parametrize("hidden", [(), (NAMESPACES,), (NODES,), (NAMESPACES, NODES)])
def test_record_keeps_the_meta_of_what_is_not_listed_yet(hidden: tuple[Source, ...]) -> None:
    """A start without the right to Namespaces, or to Nodes, rewrites nothing."""
    cluster = world()
    for items, source in (([shop()], NAMESPACES), ([pooled(**{ZONE_LABEL: "z1"})], NODES)):
        if source in hidden:
            cluster.store.fail(source, "403", "denied")
        else:
            cluster.put_list(items, source)
    cluster.put_list([make_pod("a")], PODS)
    held = OF_SHOP | OF_NODE | {"zone": "z1"}
    action = decided(cluster, held)
    assert isinstance(action, InSync)
    # What is in step is remembered, and still keeps the meta when something else is to be written.
    cluster.put(make_pod("a", ip="198.51.100.77"))
    again = decide(Desired("pod--shop--a", (target_in(cluster),)), action.entry, DECISIONS)
    assert isinstance(again, Update)
    assert held.items() <= dict(again.entry.target.meta).items()
    assert again.entry.target.address == "198.51.100.77"


def test_record_of_another_node_keeps_nothing_of_it() -> None:
    """A Pod that came back under its name elsewhere has its new Node's labels or none."""
    cluster = world()
    cluster.put_list([make_pod("a", node="node-b")], PODS)
    action = decided(cluster, OF_SHOP | OF_NODE)
    assert isinstance(action, Update)
    kept = dict(action.entry.target.meta)
    assert OF_SHOP.items() <= kept.items()
    assert "node_label_pool" not in kept


def test_meta_that_is_known_is_repaired() -> None:
    """Labels that were written by hand, and those that the Namespace no longer has."""
    cluster = listed()
    assert isinstance(decided(cluster, OF_SHOP | OF_NODE), InSync)
    for wrong in ({}, OF_SHOP | {"node_label_pool": "x"}, OF_SHOP | OF_NODE | {"namespace_label_old": "1"}):
        action = decided(cluster, wrong)
        assert isinstance(action, Update)
        assert dict(action.entry.target.meta).items() >= (OF_SHOP | OF_NODE).items()
        assert "namespace_label_old" not in dict(action.entry.target.meta)


def test_setting_that_is_taken_away_takes_its_meta_away() -> None:
    """Nothing is awaited of Namespaces then."""
    cluster = world(rules=TargetRules(), sources=(NODES, PODS))
    cluster.put_list([pooled()], NODES)
    cluster.put_list([make_pod("a")], PODS)
    action = decided(cluster, OF_SHOP | OF_NODE)
    assert isinstance(action, Update)
    assert not [key for key, _ in action.entry.target.meta if "_label_" in key]


def test_namespaces_that_are_not_watched_are_not_awaited() -> None:
    """By default a Pod waits for its Node only, for the zone."""
    cluster = world(rules=TargetRules(), sources=(PODS,))
    cluster.put_list([make_pod("a")], PODS)
    assert target_in(cluster).awaits == (Kind.NODE,)


# Limits


def many(count: int, prefix: str) -> tuple[LabelMeta, ...]:
    """Return this many labels."""
    return parse_labels([f"l{number:02}" for number in range(count)], prefix)


def test_labels_that_do_not_fit_are_dropped_from_the_end_the_node_s_first() -> None:
    """And counted, whichever object is seen last; with fewer labels they come back."""
    rules = TargetRules(
        namespace_labels=many(40, NAMESPACE_LABEL_PREFIX), node_labels=many(40, NODE_LABEL_PREFIX)
    )
    labels = {f"l{number:02}": "v" for number in range(40)}
    for order in ((NAMESPACES, NODES), (NODES, NAMESPACES)):
        cluster = world(rules=rules)
        cluster.put_list([make_pod("a")], PODS)
        items: dict[Source, Namespace | Node] = {
            NAMESPACES: Namespace("shop", labels),
            NODES: make_node(labels={**labels, ZONE_LABEL: "z1"}),
        }
        for source in order:
            cluster.put_list([items[source]], source)
        target = target_in(cluster)
        own = [
            key for key, _ in target.meta if not key.startswith(("namespace_label_", "node_label_", "zone"))
        ]
        node = [key for key, _ in target.meta if key.startswith("node_label_")]
        assert len(target.meta) == MOST_META_PAIRS + 1
        assert len(inherited(cluster)) == MOST_META_PAIRS + 1 - len(own)
        assert node == [f"node_label_l{number:02}" for number in range(MOST_META_PAIRS - len(own) - 40)]
        assert dict(target.meta)["zone"] == "z1"
        assert cluster.desired.notes["labels_dropped"] == 1
        cluster.put(Namespace("shop"))
        assert len([key for key, _ in target_in(cluster).meta if key.startswith("node_label_")]) == 40
        assert cluster.desired.notes["labels_dropped"] == 0


@pytest.mark.parametrize("value", ["v" * 513, "a\nb", "\ud800"])
def test_value_that_consul_does_not_take_is_dropped_and_counted(value: str) -> None:
    """The Pod is a target all the same."""
    cluster = listed()
    cluster.put(shop(team=value))
    assert inherited(cluster) == OF_NODE | {"namespace_label_cost_center": "7"}
    assert cluster.desired.notes["labels_dropped"] == 1
    cluster.put(shop())
    assert cluster.desired.notes["labels_dropped"] == 0


# Endpoints of Services


def endpoint_meta(cluster: MemoryCluster, pod: str) -> dict[str, str]:
    """Return what an endpoint's target has of its Namespace and Node."""
    (target,) = cluster.desired.claims[f"svc--shop--web--{pod}--9102"]
    return {key: value for key, value in target.meta if "_label_" in key or key == "zone"}


def test_endpoint_has_the_labels_of_its_namespace_and_node() -> None:
    """Whenever they are seen, changed or out of sight; its zone is its slice's."""
    cluster = world(sources=(*SOURCES, SERVICES, SLICES))
    cluster.put_list([make_kube_service()], SERVICES)
    endpoints = [
        SliceEndpoint("198.51.100.7", "a", "node-a", "z1"),
        SliceEndpoint("198.51.100.8", "b", "node-b", "z2"),
    ]
    cluster.put_list([make_slice("web-1", *endpoints)], SLICES)
    assert endpoint_meta(cluster, "a") == {"zone": "z1"}
    cluster.put_list([shop()], NAMESPACES)
    cluster.put_list([pooled(**{ZONE_LABEL: "of-node"})], NODES)
    assert endpoint_meta(cluster, "a") == OF_SHOP | OF_NODE | {"zone": "z1"}
    assert endpoint_meta(cluster, "b") == OF_SHOP | {"zone": "z2"}
    changes: list[Change] = []
    cluster.desired.subscribe(changes.append, lambda *_: None)
    cluster.put(pooled("ondemand"))
    asked = [(one.asked, one.heard_at) for one in changes]
    assert (("svc--shop--web--a--9102",), None) in asked
    assert not [one for one in changes if "svc--shop--web--b--9102" in one.asked or one.dropped]
    cluster.store.fail(NAMESPACES, "403", "denied")
    cluster.put(make_slice("web-1", replace(endpoints[0], ready=False), endpoints[1]))
    assert endpoint_meta(cluster, "a")["node_label_pool"] == "ondemand"
    cluster.put(shop(team="v" * 513))
    assert cluster.desired.notes["labels_dropped"] == 2
    cluster.remove(make_slice("web-1", *endpoints))
    assert not [key for key in cluster.desired.claims if key.startswith("svc--")]
    assert cluster.desired.notes["labels_dropped"] == 0
    assert not any(givers.heirs for givers in cluster.desired._inheritance._givers.values())


def test_endpoint_keeps_the_labels_of_its_record_while_they_are_not_known() -> None:
    """As a Pod does: a start without the right to Namespaces rewrites nothing."""
    cluster = world(sources=(*SOURCES, SERVICES, SLICES))
    cluster.put_list([make_kube_service()], SERVICES)
    cluster.put_list([make_slice("web-1", SliceEndpoint("198.51.100.7", "a", "node-a", "z1"))], SLICES)
    (target,) = cluster.desired.claims["svc--shop--web--a--9102"]
    entry = AsDesired(target, "", "")
    held = replace(
        entry, target=replace(target, meta=tuple(sorted((*target.meta, *(OF_SHOP | OF_NODE).items()))))
    )
    record = observe(held.service(Identity("lab")), Identity("lab"), "")
    action = decide(Desired(target.id, (target,)), record, DECISIONS)
    assert isinstance(action, InSync)
