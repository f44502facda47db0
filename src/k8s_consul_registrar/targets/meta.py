"""Meta of services: its keys, Consul's limits, labels that become meta, and what targets inherit from Nodes and Namespaces."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.errors import Note, Reason, Rejected, has_control
from k8s_consul_registrar.model import Kind, Namespace, Node, ObjectKey, Rejection, Resolved, Service, Target
from k8s_consul_registrar.targets.service_names import is_label_key

# Consul's limits on meta: agent/structs/structs.go, validateMetaPair and metaMaxKeyPairs. 8 of the 64 pairs
# are reserved for what the registrar adds to each service (cluster, instance, shard, zone and the like).
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
NAMESPACE_LABEL_PREFIX = "namespace_label_"
NODE_LABEL_PREFIX = "node_label_"
ANNOTATION_PREFIX = "annotation_"
# What EXTRA_META adds to Pods.
EXTRA_KEYS = ("port_name", "container", "pod_uid", "workload", "workload_kind", "ready")

# Meta keys that tell where a Pod runs.
ZONE, NODE = "zone", "node"
# Kubernetes, "Well-Known Labels, Annotations and Taints".
ZONE_LABEL = "topology.kubernetes.io/zone"

# The kinds of object whose meta targets inherit, in the order in which it is fitted in, and the keys of all of it.
GIVERS = (Kind.NAMESPACE, Kind.NODE)
_INHERITED_KEYS = (NAMESPACE_LABEL_PREFIX, NODE_LABEL_PREFIX, ZONE)
# Keys beside `MOST_META_PAIRS`: they come to a target later.
_BESIDE_OTHERS = frozenset({ZONE, "service"})

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
    """A label or annotation that is copied to meta, and its meta key."""

    label: str
    key: str


def parse_labels(labels: Iterable[str], prefix: str = LABEL_PREFIX) -> tuple[LabelMeta, ...]:
    """Return each label with its meta key, which begins with the prefix; raises ValueError for an operator."""
    chosen: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        if not is_label_key(label):
            raise ValueError(f"{label!r} is no label as Kubernetes has them")
        key = prefix + _NOT_IN_A_KEY.sub("_", label)
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
    return tuple([shared_pair(pair) for pair in sorted(meta.items()) if pair[1]])


def own_zone(labels: Mapping[str, str]) -> Meta:
    """Return the pair of the zone that an object's labels name, none without one or if it exceeds Consul's limits."""
    zone = labels.get(ZONE_LABEL, "")
    return (shared_pair((ZONE, zone)),) if zone and is_fit_for_meta(zone) else ()


def with_room(meta: Meta, pairs: Iterable[tuple[str, str]], note: Note) -> tuple[Meta, tuple[str, ...]]:
    """Return meta with further pairs as far as Consul takes them, in their order; the note if it does not take all."""
    wanted = [shared_pair(pair) for pair in pairs if pair[1]]
    if not wanted:
        return meta, ()
    fitting = [pair for pair in wanted if is_fit_for_meta(pair[1])][: max(0, MOST_META_PAIRS - len(meta))]
    return tuple(sorted((*meta, *fitting))), (note.value,) if len(fitting) < len(wanted) else ()


def is_fit_for_meta(value: str) -> bool:
    """Return True if Consul takes a text as a value of meta."""
    return len(value.encode("utf-8", "replace")) <= LONGEST_META_VALUE and not has_control(value)


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


def with_shared_meta(service: Service) -> Service:
    """Return a service that shares most of its meta with others: at a start those of a whole cluster are kept."""
    return replace(service, meta=tuple(map(shared_pair, service.meta)))


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


class GivenMeta(msgspec.Struct, frozen=True, gc=False):
    """The pairs of meta that a Namespace or Node gives; `is_cut` if it has others that exceed Consul's limits."""

    pairs: Meta = ()
    is_cut: bool = False

    @property
    def has_labels(self) -> bool:
        """True if there is more than a zone."""
        return self.is_cut or bool(self.pairs and self.pairs[0][0] != ZONE)


class Inherited(msgspec.Struct, frozen=True, gc=False):
    """The meta that a service has of its Namespace and of its Node, and the names of the two."""

    namespace: str = ""
    node: str = ""
    pairs: Meta = ()

    def name(self, kind: Kind) -> str:
        """Return the name of its Namespace or Node."""
        return self.namespace if kind is Kind.NAMESPACE else self.node

    def of(self, kind: Kind) -> Meta:
        """Return the pairs of its Namespace or Node."""
        return tuple([pair for pair in self.pairs if _giver(pair[0]) is kind])


def inherited_in(meta: Meta, namespace: str) -> Inherited:
    """Return what the meta of a service in a namespace has of its Namespace and Node."""
    pairs = tuple([shared_pair(pair) for pair in meta if pair[0].startswith(_INHERITED_KEYS)])
    return _shared_inherited(namespace, _value(meta, NODE), pairs)


@lru_cache(maxsize=4096)
def _shared_inherited(namespace: str, node: str, pairs: Meta) -> Inherited:
    return Inherited(namespace, node, pairs)


def _namespace_of(target: Target) -> str:
    return target.key.namespace


def _node_of(target: Target) -> str:
    return _value(target.meta, NODE)


_NAME_OF = {Kind.NAMESPACE: _namespace_of, Kind.NODE: _node_of}


class _Givers(msgspec.Struct):
    """The objects of one kind by name: what they give, the keys of their heirs, and which were deleted."""

    labels: Sequence[LabelMeta]
    # Returns the name of the one that a target inherits from.
    name_of: Callable[[Target], str]
    known: dict[str, GivenMeta] = msgspec.field(default_factory=dict)
    heirs: dict[str, set[ObjectKey]] = msgspec.field(default_factory=dict)
    gone: set[str] = msgspec.field(default_factory=set)

    def name_for(self, resolved: Resolved) -> str:
        """Return the name of the one that an object's targets inherit from, empty without targets."""
        return "" if isinstance(resolved, Rejection) or not resolved else self.name_of(resolved[0])

    def tidy(self, name: str) -> None:
        """Forget a deleted object with its last heir."""
        if self.heirs.get(name):
            return
        self.heirs.pop(name, None)
        if name in self.gone:
            self.gone.discard(name)
            self.known.pop(name, None)


class Inheritance:
    """The meta that targets inherit from their Namespace and their Node, and whose targets do.

    What an object gives is kept while it has heirs, even after it is deleted or its source fails: dropping it
    would rewrite every service twice. Heirs whose meta has changed wait until `take` returns them, because a
    Namespace can have thousands.
    """

    def __init__(self, kinds: Collection[Kind], labels: Mapping[Kind, Sequence[LabelMeta]]) -> None:
        """Make it for the kinds that are followed, with the labels that each gives; a Node gives its zone too."""
        giving = [kind for kind in GIVERS if kind in kinds and (kind is Kind.NODE or labels.get(kind))]
        self._givers = {kind: _Givers(labels.get(kind, ()), _NAME_OF[kind]) for kind in giving}
        of_pods = tuple(self._givers.items())
        # Endpoints have their zone from their slice, and want labels only. Nodes inherit nothing.
        of_endpoints = tuple([one for one in of_pods if one[1].labels])
        self._givers_of = {Kind.POD: of_pods, Kind.ENDPOINT: of_endpoints}
        self._changed: dict[ObjectKey, None] = {}

    def learn(self, giver: Namespace | Node) -> None:
        """Record what an object gives; where that is new, its heirs have changed."""
        givers, name = self._givers.get(giver.key.kind), giver.name
        if givers is None:
            return
        given = _given_by(giver, givers.labels)
        givers.gone.discard(name)
        if givers.known.get(name) != given:
            givers.known[name] = given
            self._changed.update(dict.fromkeys(givers.heirs.get(name, ())))

    def lose(self, key: ObjectKey) -> None:
        """Record that an object was deleted, or that a list lacks it."""
        if (givers := self._givers.get(key.kind)) is not None and key.name in givers.known:
            givers.gone.add(key.name)
            givers.tidy(key.name)

    def take(self, most: int) -> list[ObjectKey]:
        """Return at most this many heirs that have changed, each once."""
        return [self._changed.popitem()[0] for _ in range(min(most, len(self._changed)))]

    @property
    def is_settled(self) -> bool:
        """True if no heir waits."""
        return not self._changed

    def place(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Return the targets of one object with what they inherit, as far as it is known."""
        if not targets:
            return targets
        given: dict[Kind, GivenMeta] = {}
        for kind, givers in self._givers_of.get(targets[0].key.kind, ()):
            if (one := givers.known.get(givers.name_of(targets[0]))) is not None:
                given[kind] = one
        return tuple([inherit(target, given) for target in targets]) if given else targets

    def moved(self, key: ObjectKey, before: Resolved, after: Resolved) -> None:
        """Record of which objects the targets of another inherit now."""
        for _, givers in self._givers_of.get(key.kind, ()):
            was, now = givers.name_for(before), givers.name_for(after)
            if was == now:
                continue
            if was:
                givers.heirs[was].discard(key)
                givers.tidy(was)
            if now:
                givers.heirs.setdefault(now, set()).add(key)


def inherit(target: Target, given: Mapping[Kind, GivenMeta], *, is_kept: bool = False) -> Target:
    """Return a target with what its Namespace and Node give, as far as there is room: the Namespace's first.

    What `is_kept` comes from the target's record in Consul: the target still awaits what it is given.
    """
    if target.awaits == tuple(given) and not any(one.has_labels for one in given.values()):
        # The usual case: nothing was inherited yet, and there is only a zone, which sorts after every other key.
        node = None if target.has_own_zone else given.get(Kind.NODE)
        meta = target.meta if node is None else target.meta + node.pairs
        return replace(target, meta=meta, awaits=target.awaits if is_kept else ())
    own: list[tuple[str, str]] = []
    parts: dict[Kind, Meta] = {Kind.NAMESPACE: (), Kind.NODE: ()}
    for pair in target.meta:
        if not pair[0].startswith(_INHERITED_KEYS) or (target.has_own_zone and pair[0] == ZONE):
            own.append(pair)
        else:
            parts[_giver(pair[0])] += (pair,)
    labels: list[tuple[str, str]] = []
    zone: Meta = ()
    for kind, pairs in parts.items():
        for pair in given[kind].pairs if kind in given else pairs:
            if pair[0] != ZONE:
                labels.append(pair)
            elif not target.has_own_zone:
                zone = (pair,)
    notes = target.notes
    if labels or notes:
        room = max(0, MOST_META_PAIRS - sum(key not in _BESIDE_OTHERS for key, _ in own))
        is_cut = len(labels) > room or any(one.is_cut for one in given.values())
        notes = tuple([one for one in notes if one != Note.LABELS_DROPPED])
        notes = (*notes, Note.LABELS_DROPPED.value) if is_cut else notes
        own = sorted([*own, *labels[:room]])
    meta = (*own, *zone)
    awaits = target.awaits if is_kept else tuple([kind for kind in target.awaits if kind not in given])
    if (meta, awaits, notes) == (target.meta, target.awaits, target.notes):
        return target
    return replace(target, meta=meta, awaits=awaits, notes=notes)


def keep_inherited(target: Target, record: Inherited) -> Target:
    """Return a target with what its record in Consul has of a Namespace or Node that is not known yet.

    One that is not listed yet must not remove meta; a record of another Node tells nothing of this one.
    """
    given = {
        kind: GivenMeta(pairs)
        for kind in target.awaits
        if record.name(kind) == _NAME_OF[kind](target) and (pairs := record.of(kind))
    }
    return inherit(target, given, is_kept=True) if given else target


def _given_by(giver: Namespace | Node, labels: Sequence[LabelMeta]) -> GivenMeta:
    found = [(one.key, value) for one in labels if (value := giver.labels.get(one.label))]
    fitting = [shared_pair(pair) for pair in found if is_fit_for_meta(pair[1])]
    zone = own_zone(giver.labels) if isinstance(giver, Node) else ()
    return GivenMeta((*fitting, *zone), is_cut=len(fitting) < len(found))


def _giver(key: str) -> Kind:
    return Kind.NAMESPACE if key.startswith(NAMESPACE_LABEL_PREFIX) else Kind.NODE


def _value(meta: Meta, key: str) -> str:
    for name, value in meta:
        if name == key:
            return value
    return ""
