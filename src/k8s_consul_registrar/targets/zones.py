"""Zones of Pods' targets, taken from their Nodes."""

from collections.abc import Sequence

from msgspec.structs import replace

from k8s_consul_registrar.model import Kind, Node, ObjectKey, Rejection, Service, Target
from k8s_consul_registrar.targets.meta import ZONE_LABEL, checked_meta, shared_pair
from k8s_consul_registrar.targets.reasons import Rejected
from k8s_consul_registrar.targets.resolve import Resolved

ZONE, NODE = "zone", "node"


class Zones:
    """Gives targets of Pods the zone of their Node, and knows whom a Node's new zone concerns.

    What was learned of a Node stays while it has Pods, though the Node be gone or its source be lost: a
    zone that vanished and came back would be two changes of nothing. It belongs to one mirror.
    """

    def __init__(self) -> None:
        self._zones: dict[str, str] = {}
        self._pods: dict[str, set[ObjectKey]] = {}
        self._gone: set[str] = set()

    def learn(self, node: Node) -> Sequence[ObjectKey]:
        """Take in a Node as it is now; return the Pods that are in another zone than was known."""
        zone = zone_of(node)
        self._gone.discard(node.name)
        if self._zones.get(node.name) == zone:
            return ()
        self._zones[node.name] = zone
        return tuple(self._pods.get(node.name, ()))

    def place(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Return the targets of one Pod in their Node's zone; as they are where that is not known."""
        if not targets or targets[0].key.kind is not Kind.POD:
            return targets
        zone = self._zones.get(node_of(targets[0]))
        return targets if zone is None else tuple(in_zone(target, zone) for target in targets)

    def moved(self, key: ObjectKey, before: Resolved, after: Resolved) -> None:
        """Take in what became of an object: a Pod's targets, or a Node that is gone."""
        if key.kind is Kind.NODE:
            if after == ():
                self._forget(key.name)
            return
        was, now = _node(before), _node(after)
        if was == now:
            return
        if was:
            self._pods[was].discard(key)
            self._tidy(was)
        if now:
            self._pods.setdefault(now, set()).add(key)

    def _forget(self, name: str) -> None:
        """Keep what is known of a Node that is gone for its Pods alone."""
        if name in self._zones:
            self._gone.add(name)
            self._tidy(name)

    def _tidy(self, name: str) -> None:
        if self._pods.get(name):
            return
        self._pods.pop(name, None)
        if name in self._gone:
            self._gone.discard(name)
            self._zones.pop(name, None)


def zone_of(node: Node) -> str:
    """Return the zone a Node is in, empty for none or for one that Consul would not take."""
    try:
        pairs = checked_meta({ZONE: node.labels.get(ZONE_LABEL, "")})
    except Rejected:
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


def _node(resolved: Resolved) -> str:
    return "" if isinstance(resolved, Rejection) or not resolved else node_of(resolved[0])
