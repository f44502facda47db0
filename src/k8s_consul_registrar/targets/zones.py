"""Zones of Pods, learned from their Nodes."""

from collections.abc import Sequence

from msgspec.structs import replace

from k8s_consul_registrar.model import Kind, Node, ObjectKey, Rejection, Target
from k8s_consul_registrar.targets.meta import NODE, ZONE, own_zone, shared_pair
from k8s_consul_registrar.targets.resolve import Resolved


class Zones:
    """The zone of each Node, and the Pods with targets on it.

    A Node's zone is kept while Pods run on it, even after the Node is deleted or its source fails: dropping
    it would rewrite every service twice.
    """

    def __init__(self) -> None:
        self._zones: dict[str, str] = {}
        self._pods: dict[str, set[ObjectKey]] = {}
        self._gone: set[str] = set()

    def learn(self, node: Node) -> Sequence[ObjectKey]:
        """Record a Node's zone; return the Pods on it if the zone is new or has changed."""
        zone = zone_of(node)
        self._gone.discard(node.name)
        if self._zones.get(node.name) == zone:
            return ()
        self._zones[node.name] = zone
        return tuple(self._pods.get(node.name, ()))

    def place(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Return the targets of one Pod with their Node's zone; unchanged if that is unknown, or if the Pod names its own."""
        if not targets or targets[0].key.kind is not Kind.POD or targets[0].has_own_zone:
            return targets
        zone = self._zones.get(_value(targets[0], NODE))
        return targets if zone is None else tuple(in_zone(target, zone) for target in targets)

    def moved(self, key: ObjectKey, before: Resolved, after: Resolved) -> None:
        """Record a change of an object: where a Pod's targets are, or that a Node was deleted."""
        if key.kind is Kind.NODE:
            if after == () and key.name in self._zones:
                self._gone.add(key.name)
                self._tidy(key.name)
            return
        was, now = _node(before), _node(after)
        if was == now:
            return
        if was:
            self._pods[was].discard(key)
            self._tidy(was)
        if now:
            self._pods.setdefault(now, set()).add(key)

    def _tidy(self, name: str) -> None:
        """Drop the zone of a deleted Node with the last Pod on it."""
        if self._pods.get(name):
            return
        self._pods.pop(name, None)
        if name in self._gone:
            self._gone.discard(name)
            self._zones.pop(name, None)


def zone_of(node: Node) -> str:
    """Return a Node's zone, empty if it has none or one that exceeds Consul's limits."""
    pairs = own_zone(node.labels)
    return pairs[0][1] if pairs else ""


def in_zone(target: Target, zone: str) -> Target:
    """Return a Pod's target with the known zone of its Node, empty if the Node has none."""
    if target.is_zone_known and _value(target, ZONE) == zone:
        return target
    return replace(target, meta=_with_zone(target, zone), is_zone_known=True)


def keep_zone(target: Target, zone: str, node: str) -> Target:
    """Return a target with the zone of its record in Consul, as long as its Node's zone is unknown.

    A Node that is not listed yet must not remove a zone; a record of another `node` tells nothing of it.
    """
    if target.is_zone_known or not zone or node != _value(target, NODE):
        return target
    return replace(target, meta=_with_zone(target, zone))


def _value(target: Target, key: str) -> str:
    for name, value in target.meta:
        if name == key:
            return value
    return ""


def _with_zone(target: Target, zone: str) -> tuple[tuple[str, str], ...]:
    # `zone` sorts after every other key, and MOST_META_PAIRS leaves room for it.
    meta = target.meta
    if meta and meta[-1][0] == ZONE:
        meta = meta[:-1]
    return (*meta, shared_pair((ZONE, zone))) if zone else meta


def _node(resolved: Resolved) -> str:
    return "" if isinstance(resolved, Rejection) or not resolved else _value(resolved[0], NODE)
