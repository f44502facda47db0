"""Which zone each Node is in, and which Pods with targets are on it."""

from collections.abc import Sequence

from k8s_consul_registrar.kube.known import Verdict
from k8s_consul_registrar.model import Kind, Node, ObjectKey, Rejection, Target
from k8s_consul_registrar.targets.zones import in_zone, node_of, zone_of


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

    def moved(self, key: ObjectKey, before: Verdict, after: Verdict) -> None:
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


def _node(verdict: Verdict) -> str:
    return "" if isinstance(verdict, Rejection) or not verdict else node_of(verdict[0])
