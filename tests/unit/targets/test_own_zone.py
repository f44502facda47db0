"""The zone that a Pod's own labels name."""

from k8s_consul_registrar.model import Kind, Pod, Source, Target
from k8s_consul_registrar.registrar.desired import DesiredState
from k8s_consul_registrar.registrar.observed import ObservedState
from k8s_consul_registrar.targets.endpoints import resolve_item
from k8s_consul_registrar.targets.meta import ZONE_LABEL, Inheritance, Inherited, keep_inherited
from k8s_consul_registrar.targets.resolve import TargetRules, resolve_pod
from support.builders import make_node, make_pod

OWN = {ZONE_LABEL: "zone-own"}


def target_of(pod: Pod) -> Target:
    """Return the one target of a Pod."""
    resolved = resolve_pod(pod, TargetRules())
    assert isinstance(resolved, tuple), resolved
    (target,) = resolved
    return target


def test_own_label_of_a_pod_is_its_zone_without_any_node() -> None:
    """Kubernetes sets it from 1.35 on, and no Node has to be followed."""
    target = target_of(make_pod(labels=OWN))
    assert target.meta[-1] == ("zone", "zone-own")
    assert tuple(sorted(target.meta)) == target.meta


def test_zone_of_the_node_changes_nothing_of_a_pod_that_names_its_own() -> None:
    """Neither at once nor when the Node is known later."""
    target = target_of(make_pod(labels=OWN))
    zones = Inheritance([Kind.NODE], {})
    zones.learn(make_node(labels={ZONE_LABEL: "zone-node"}))
    assert zones.place((target,)) == (target,)
    assert keep_inherited(target, Inherited("shop", "node-a", (("zone", "zone-before"),))) == target


def test_pod_with_a_zone_too_long_for_consul_has_its_node_s() -> None:
    """As a Pod without the label."""
    zones = Inheritance([Kind.NODE], {})
    zones.learn(make_node(labels={ZONE_LABEL: "zone-node"}))
    (placed,) = zones.place((target_of(make_pod(labels={ZONE_LABEL: "z" * 600})),))
    assert placed.meta[-1] == ("zone", "zone-node")


def test_changed_node_moves_only_pods_without_a_zone_of_their_own() -> None:
    """The claims show what is to be registered."""
    sources = (Source(Kind.NODE), Source(Kind.POD))
    desired = DesiredState(sources, lambda item: resolve_item(item, TargetRules()), ObservedState())
    desired.store.put(sources[1], make_pod("own", labels=OWN))
    desired.store.put(sources[1], make_pod("none", ip="198.51.100.11"))
    for zone in ("zone-1", "zone-2"):
        desired.store.put(sources[0], make_node(labels={ZONE_LABEL: zone}))
        found = {name: desired.claims[f"pod--shop--{name}"][0].meta[-1][1] for name in ("own", "none")}
        assert found == {"own": "zone-own", "none": zone}
