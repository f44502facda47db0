"""Zones of Pods: from their Nodes, kept while those are not known, and nothing written twice for it."""

from dataclasses import replace

import pytest

from builders import SCRAPED, make_node, make_pod, our_pod_service
from k8s_consul_registrar.kube.mirror import Mirror
from k8s_consul_registrar.model import Kind, Node, Service, Source, Target
from k8s_consul_registrar.registrar.ledger import Entry
from k8s_consul_registrar.registrar.plan import Plan
from k8s_consul_registrar.registrar.planner import Planner
from k8s_consul_registrar.targets.meta import LABEL_PREFIX, OWN_KEYS, PARAM_PREFIX
from k8s_consul_registrar.targets.sharding import RandomShards
from k8s_consul_registrar.targets.zones import in_zone, zone_of
from test_mirror import NODES, PODS, new_mirror, put_list, quiet, verdict
from test_plan import LAB, written

HELD = our_pod_service("a", zone="z1")
LABEL = "topology.kubernetes.io/zone"


def in_a_zone(zone: str, name: str = "node-a", address: str = "192.0.2.10") -> Node:
    """Return a Node that is labelled with a zone."""
    return make_node(name, ("InternalIP", address), labels={LABEL: zone})


def zones(mirror: Mirror) -> dict[str, str | None]:
    """Return the zone of each Pod's target, None for no such key."""
    claims = mirror.wanted().claims.values()
    pods = [target for (target,) in claims if target.key.kind is Kind.POD]
    return {target.key.name: dict(target.meta).get("zone") for target in pods}


def listed(*nodes: Node) -> Mirror:
    """Return a mirror with Pods `a1` and `a2` on node-a and `b1` on node-b, then these Nodes; all taken."""
    mirror = new_mirror()
    pods = [make_pod("a1"), make_pod("a2"), make_pod("b1", node="node-b")]
    put_list(mirror, PODS, pods)
    put_list(mirror, NODES, nodes)
    mirror.wanted()
    return mirror


def test_a_pod_is_in_its_nodes_zone_whichever_is_seen_first() -> None:
    """Before its Node a Pod has none; after, it has its Node's at once, with every port."""
    both = [in_a_zone("z1"), in_a_zone("z2", "node-b", "192.0.2.11")]
    assert zones(listed()) == {"a1": None, "a2": None, "b1": None}
    mirror = listed(*both)
    assert zones(mirror) == {"a1": "z1", "a2": "z1", "b1": "z2"}
    ports = {**SCRAPED, "prometheus.io/port": "8080,9090"}
    mirror.put(PODS, make_pod("late", annotations=ports))
    late = [one for one in mirror.claims.values() if one[0].key.name == "late"]
    assert [dict(one[0].meta)["zone"] for one in late] == ["z1", "z1"]


def test_another_zone_concerns_the_pods_of_that_node_alone() -> None:
    """A Node that moves, or loses its label, dirties its own Pods; one that says the same, nothing."""
    mirror = listed(in_a_zone("z1"), in_a_zone("z2", "node-b", "192.0.2.11"))
    mirror.put(NODES, in_a_zone("z3"), is_added=False)
    assert set(mirror.changes().claims) == {"node--192.0.2.10", "pod--shop--a1", "pod--shop--a2"}
    mirror.put(NODES, in_a_zone("z3"), is_added=False)
    assert mirror.changes().claims == {}
    knows = mirror._zones
    assert knows is not None
    assert set(knows.learn(in_a_zone("z5"))) == {make_pod("a1").key, make_pod("a2").key}, "it costs no more"
    mirror.put(NODES, make_node(), is_added=False)
    assert zones(mirror) == {"a1": None, "a2": None, "b1": "z2"}
    mirror.put(PODS, make_pod("a1", node="node-b"), is_added=False)
    assert zones(mirror)["a1"] == "z2"


def test_a_zone_outlives_the_sight_of_its_node() -> None:
    """Nodes that fail, vanish from a list, are deleted or rejected take no zone away while Pods are there."""
    mirror = listed(in_a_zone("z1"))
    mirror.fail(NODES, "403")
    put_list(mirror, NODES, [])
    mirror.put(NODES, in_a_zone("z1"))
    mirror.remove(NODES, in_a_zone("z1"))
    mirror.put(PODS, make_pod("a3"))
    assert zones(mirror) == {"a1": "z1", "a2": "z1", "a3": "z1", "b1": None}
    mirror.put(NODES, replace(in_a_zone("z4"), addresses=()))
    assert mirror.rejections
    assert zones(mirror)["a3"] == "z4"


def test_what_is_known_of_a_node_goes_with_it_and_its_last_pod() -> None:
    """Nodes that come and go for years leave nothing behind, in either order."""
    mirror = listed(in_a_zone("z1"))
    knows = mirror._zones
    assert knows is not None
    mirror.remove(NODES, in_a_zone("z1"))
    for name in ("a1", "a2"):
        mirror.remove(PODS, make_pod(name))
    mirror.put(NODES, in_a_zone("z2", "node-b"))
    mirror.remove(PODS, make_pod("b1", node="node-b"))
    put_list(mirror, NODES, [])
    assert (knows._zones, knows._pods, knows._gone) == ({}, {}, set())
    mirror.put(PODS, make_pod("a1"))
    assert zones(mirror) == {"a1": None}


def test_without_nodes_there_is_no_zone() -> None:
    """Where Nodes are none of ours nobody waits for them, and no key appears."""
    mirror = quiet(make_pod("a"))
    assert mirror.nodes_tried.is_set()
    assert zones(mirror) == {"a": None}


def test_pods_of_chosen_namespaces_get_zones_too() -> None:
    """With a source for each namespace a Node's Pods are found in all of them."""
    sources = (Source(Kind.POD, "shop"), Source(Kind.POD, "search"), NODES)
    mirror = Mirror(sources, verdict)
    for source in sources[:2]:
        put_list(mirror, source, [make_pod(source.namespace, source.namespace)])
    put_list(mirror, NODES, [in_a_zone("z1")])
    assert zones(mirror) == {"shop": "z1", "search": "z1"}


def test_meta_stays_sorted() -> None:
    """The zone is put behind every other key there may be, which is where it belongs."""
    assert max(OWN_KEYS | {PARAM_PREFIX, LABEL_PREFIX}) == "zone"


@pytest.mark.parametrize("value", ["", "a\nb", "x" * 513])
def test_a_zone_that_consul_would_not_take_is_none(value: str) -> None:
    """The label of a Node costs its Pods nothing but the zone."""
    assert zone_of(in_a_zone(value)) == ""


def target_of(zone: str | None = None, **changes: str) -> Target:
    """Return the target of Pod `a`, its zone not known for None."""
    found = verdict(make_pod("a", **changes))
    assert isinstance(found, tuple)
    (target,) = found
    return target if zone is None else in_zone(target, zone)


def planned(target: Target, held: Service, last: Entry | None = None) -> Plan:
    """Plan for this one target and what Consul holds of it."""
    mirror = quiet()
    wanted = replace(mirror.wanted(), claims={target.id: (target,)})
    planner = Planner(wanted, LAB, RandomShards(), find=lambda _: last)
    planner.consider(held)
    return planner.plan()


def test_nothing_is_written_to_take_a_zone_away_that_is_not_known() -> None:
    """Consul keeps the zone it has, also when something else of the service has to be written."""
    assert planned(target_of(), HELD).unchanged == 1
    (update,) = written(planned(target_of(ip="198.51.100.77"), HELD).update)
    assert (update.address, update.value("zone")) == ("198.51.100.77", "z1")
    (update,) = written(planned(target_of(), our_pod_service("a", zone="z1", note="by hand")).update)
    assert update == HELD


def test_a_zone_that_is_known_is_repaired() -> None:
    """What a hand wrote, or took away, is made right again; so is a zone where the Node has none."""
    for wrong in (our_pod_service("a", zone="z9"), our_pod_service("a")):
        assert written(planned(target_of("z1"), wrong).update) == [HELD]
    assert written(planned(target_of(""), HELD).update) == [our_pod_service("a")]


def test_what_we_wrote_last_counts_more_than_a_hand() -> None:
    """While Nodes are out of sight a zone that somebody edited comes back to what it was."""
    last = Entry(target_of("z1"), "", "")
    assert written(planned(target_of(), our_pod_service("a", zone="z9"), last).update) == [HELD]
    without = Entry(target_of(), "", "")
    assert written(planned(target_of(), HELD, without).update) == [our_pod_service("a")]


def test_a_zone_of_another_node_is_not_kept() -> None:
    """A Pod that came back under its name elsewhere has the new Node's zone or none."""
    (update,) = written(planned(target_of(node="node-b"), HELD).update)
    assert (update.value("node"), update.value("zone")) == ("node-b", "")
