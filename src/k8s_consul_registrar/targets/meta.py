"""Meta of services: its keys, Consul's limits, labels that become meta, and zones of Pods, from their Nodes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from msgspec.structs import replace

from k8s_consul_registrar.errors import Reason, Rejected, has_control
from k8s_consul_registrar.model import Kind, Node, ObjectKey, Rejection, Resolved, Target
from k8s_consul_registrar.targets.service_names import is_label_key

# Consul's limits on meta: agent/structs/structs.go, validateMetaPair and metaMaxKeyPairs. 8 of the 64 pairs
# are reserved for what the registrar adds to each service (cluster, instance, shard and the like).
MOST_META_PAIRS = 56
LONGEST_META_KEY = 128
LONGEST_META_VALUE = 512

# Every key the registrar writes, except those that begin with one of the two prefixes below.
OWN_KEYS = frozenset({
    "cluster", "cluster_uid", "instance", "kind", "managed_by", "metrics_path", "namespace", "node", "node_os", "node_path", "pod",
    "scheme", "scrape_interval", "scrape_timeout", "service", "shard_path", "zone",
})  # fmt: skip
PARAM_PREFIX = "param_"
LABEL_PREFIX = "label_"

# Meta keys that tell where a Pod runs.
ZONE, NODE = "zone", "node"
# Kubernetes, "Well-Known Labels, Annotations and Taints".
ZONE_LABEL = "topology.kubernetes.io/zone"

# What follows is the name of a label that the target itself gets from HTTP and file service discovery.
TARGET_PREFIX = "target_"
# Labels that annotations may not set: with them a Pod could be scraped at another address with the collector's
# credentials, or pass for another target.
_DECIDED_LABELS = frozenset({"__address__", "__scheme__", "__metrics_path__", "__name__", "job", "instance"})
_DECIDED_PREFIXES = ("__meta_", "__param_", "__tenant_", "__tmp")
LONGEST_LABEL = 60
_LABEL_NAME = re.compile(rf"(?=.{{1,{LONGEST_LABEL}}}$)_{{0,2}}[A-Za-z][A-Za-z0-9_]*")

_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_]")


# Pairs of key and value, sorted.
Meta = tuple[tuple[str, str], ...]


class LabelMeta(NamedTuple):
    """A Pod label that is copied to meta, and its meta key."""

    label: str
    key: str


def parse_labels(labels: Iterable[str]) -> tuple[LabelMeta, ...]:
    """Return each label with its meta key, which is none of `OWN_KEYS`; raises ValueError for an operator."""
    chosen: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        if not is_label_key(label):
            raise ValueError(f"{label!r} is no label as Kubernetes has them")
        key = LABEL_PREFIX + _NOT_IN_A_KEY.sub("_", label)
        if len(key) > LONGEST_META_KEY:
            raise ValueError(f"{key!r} is over the {LONGEST_META_KEY} characters that Consul allows a key")
        if key in chosen:
            raise ValueError(f"{chosen[key]!r} and {label!r} would both be {key}")
        chosen[key] = label
    return tuple(LabelMeta(label, key) for key, label in chosen.items())


def checked_meta(meta: Mapping[str, str]) -> Meta:
    """Return meta sorted and without empty values; raises `Rejected` for meta over Consul's limits."""
    text = "".join(meta.values())
    # Nearly always all values together are shorter than the limit for one.
    is_plain = len(text) <= LONGEST_META_VALUE and text.isascii() and text.isprintable()
    if not is_plain or len(meta) > MOST_META_PAIRS:
        _check({key: value for key, value in meta.items() if value}, text)
    return tuple([shared_pair((key, meta[key])) for key in sorted(meta) if meta[key]])


def own_zone(labels: Mapping[str, str]) -> Meta:
    """Return the pair of the zone that an object's labels name, none without one or if it exceeds Consul's limits."""
    try:
        return checked_meta({ZONE: labels.get(ZONE_LABEL, "")})
    except Rejected:
        return ()


def _check(meta: Mapping[str, str], text: str) -> None:
    """Raise `Rejected` for meta over Consul's limits; `text` is all values joined."""
    if len(meta) > MOST_META_PAIRS:
        raise Rejected(Reason.META_TOO_MANY, f"{len(meta)} pairs of meta are more than {MOST_META_PAIRS}")
    for key, value in sorted(meta.items()):
        size = len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
        if size > LONGEST_META_VALUE:
            raise Rejected(Reason.META_TOO_LONG, f"{key} is {size} bytes, Consul takes {LONGEST_META_VALUE}")
    if has_control(text):
        odd = min(key for key, value in meta.items() if has_control(value))
        raise Rejected(Reason.INVALID_META, f"{odd} has control characters")


@lru_cache(maxsize=4096)
def shared_pair(pair: tuple[str, str]) -> tuple[str, str]:
    """Return the same object for equal pairs, because tens of thousands of targets share most of theirs."""
    return pair


class TargetLabel(NamedTuple):
    """A label of a target that an annotation sets, by what follows the prefix, and its meta key."""

    name: str
    annotation: str
    key: str


def parse_target_label(text: str) -> TargetLabel:
    """Return the label of a target that an annotation may set; raises ValueError, worded for an operator."""
    if not _LABEL_NAME.fullmatch(text):
        raise ValueError(
            f"{text[:80]!r} is no name of a label in Prometheus, of at most {LONGEST_LABEL} letters"
        )
    if text in _DECIDED_LABELS or text.startswith(_DECIDED_PREFIXES):
        raise ValueError(
            f"{text!r} decides what is scraped and where, which annotations of others may not set"
        )
    return TargetLabel(text, f"label-{text.strip('_')}", TARGET_PREFIX + text)


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
