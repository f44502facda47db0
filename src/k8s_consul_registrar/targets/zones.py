"""The zone of a Pod's target, which is its Node's: pure."""

from msgspec.structs import replace

from k8s_consul_registrar.model import Node, Service, Target
from k8s_consul_registrar.targets.meta import checked_meta, shared_pair
from k8s_consul_registrar.targets.reasons import Refused

# Kubernetes, "Well-Known Labels, Annotations and Taints".
ZONE_LABEL = "topology.kubernetes.io/zone"
ZONE, NODE = "zone", "node"


def zone_of(node: Node) -> str:
    """Return the zone a Node is in, empty for none or for one that Consul would not take."""
    try:
        pairs = checked_meta({ZONE: node.labels.get(ZONE_LABEL, "")})
    except Refused:
        return ""
    return pairs[0][1] if pairs else ""


def in_zone(target: Target, zone: str) -> Target:
    """Return a Pod's target in the zone that its Node is known to be in, empty for none."""
    if target.is_zone_known and _value(target, ZONE) == zone:
        return target
    return replace(target, meta=_with_zone(target, zone), is_zone_known=True)


def keep_zone(target: Target, held: Service) -> Target:
    """Return a target with the zone that its service has, while its Node's is not known.

    Nodes that are not seen, or not yet, are no reason to take a zone away. A service that was written for
    another Node says nothing of this one's zone.
    """
    if target.is_zone_known:
        return target
    zone = held.value(ZONE)
    is_same_node = bool(zone) and held.value(NODE) == _value(target, NODE)
    return replace(target, meta=_with_zone(target, zone)) if is_same_node else target


def node_of(target: Target) -> str:
    """Return the name of the Node that a Pod's target is on, empty where it says none."""
    return _value(target, NODE)


def _value(target: Target, key: str) -> str:
    for name, value in target.meta:
        if name == key:
            return value
    return ""


def _with_zone(target: Target, zone: str) -> tuple[tuple[str, str], ...]:
    # No key of ours sorts behind this one, and the room that is kept for what is added has one more pair.
    meta = target.meta
    if meta and meta[-1][0] == ZONE:
        meta = meta[:-1]
    return (*meta, shared_pair((ZONE, zone))) if zone else meta
