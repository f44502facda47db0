"""Resolution of a Pod or Node into its targets, with their meta and zone, or a rejection."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.model import Kind, Node, ObjectKey, Pod, Rejection, Target, Undecodable
from k8s_consul_registrar.targets.reasons import Reason, Rejected, has_control
from k8s_consul_registrar.targets.scrape_config import (
    NODE_ADDRESS_TYPES,
    ScrapeConfig,
    is_scraped,
    node_address,
    parse_ip,
    pod_scrape,
    proxied_path,
    require_declared,
    url_host,
)
from k8s_consul_registrar.targets.service_names import (
    ENDPOINT_NAME,
    NODE_NAME,
    POD_NAME,
    Subject,
    Template,
    is_label_key,
    node_service_id,
    pod_port_id,
    pod_service_id,
    service_name,
    service_tags,
)
from k8s_consul_registrar.targets.target_labels import TargetLabel

# Consul's limits on meta: agent/structs/structs.go, validateMetaPair and metaMaxKeyPairs. 8 of the 64 pairs
# are reserved for what the registrar adds to each service (cluster, instance, shard and the like).
MOST_META_PAIRS = 56
LONGEST_META_KEY = 128
LONGEST_META_VALUE = 512

# Every key the registrar writes, except those that begin with one of the two prefixes below.
OWN_KEYS = frozenset({
    "cluster", "cluster_uid", "instance", "kind", "managed_by", "metrics_path", "namespace", "node", "pod",
    "scheme", "service", "shard_path", "zone",
})  # fmt: skip
PARAM_PREFIX = "param_"
LABEL_PREFIX = "label_"

# Meta keys that tell where a Pod runs.
ZONE, NODE = "zone", "node"
# Kubernetes, "Well-Known Labels, Annotations and Taints".
ZONE_LABEL = "topology.kubernetes.io/zone"

_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_]")


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


def checked_meta(meta: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return meta sorted and without empty values; raises `Rejected` for meta over Consul's limits."""
    text = "".join(meta.values())
    # Nearly always all values together are shorter than the limit for one.
    is_plain = len(text) <= LONGEST_META_VALUE and text.isascii() and text.isprintable()
    if not is_plain or len(meta) > MOST_META_PAIRS:
        _check({key: value for key, value in meta.items() if value}, text)
    return tuple([shared_pair((key, meta[key])) for key in sorted(meta) if meta[key]])


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


Resolved = tuple[Target, ...] | Rejection


class TargetRules(msgspec.Struct, frozen=True):
    """The operator's settings for targets.

    `node_address_types` are those at which Prometheus reaches a Node, the preferred one first.
    `longest_shard` is in bytes. With `has_readiness` a target carries its object's readiness. With
    `pods_through_proxy` a Pod's target is the proxy on its Node, scraped with `proxy_scheme`.
    """

    annotation_prefix: str = "prometheus.io/"
    proxy_node_port: int = 31112
    cluster: str = ""
    id_prefix: str = ""
    pod_name: Template = POD_NAME
    node_name: Template = NODE_NAME
    endpoint_name: Template = ENDPOINT_NAME
    tags: tuple[Template, ...] = ()
    labels: tuple[LabelMeta, ...] = ()
    target_labels: tuple[TargetLabel, ...] = ()
    node_address_types: tuple[str, ...] = NODE_ADDRESS_TYPES
    longest_shard: int = 0
    has_readiness: bool = False
    pods_through_proxy: bool = False
    proxy_scheme: str = "http"


def resolve(item: Pod | Node | Undecodable, rules: TargetRules) -> Resolved | None:
    """Return an item's targets (`()` if it asks for none) or its rejection; None if the item has no name."""
    match item:
        case Pod():
            return resolve_pod(item, rules)
        case Node():
            return resolve_node(item, rules)
    if (key := item.key) is None:
        return None
    own_id = pod_service_id(key.namespace, key.name, rules.id_prefix) if item.kind is Kind.POD else ""
    return Rejection(key, Reason.UNDECODABLE, item.problem, own_id)


def resolve_pod(pod: Pod, rules: TargetRules) -> Resolved:
    """Return a Pod's targets, one for each port; the ID of the first one has no port in it."""
    if not is_scraped(pod, rules.annotation_prefix):
        return ()
    service_id = pod_service_id(pod.namespace, pod.name, rules.id_prefix)
    try:
        scrape = pod_scrape(pod, rules.annotation_prefix)
        find_endpoints = _proxy_endpoints if rules.pods_through_proxy else _endpoints
        endpoints = find_endpoints(pod, scrape, rules)
        subject = _pod_subject(pod, service_id, rules)
        name = service_name(rules.pod_name, subject, rules.longest_shard)
        tags = service_tags(rules.tags, subject, rules.longest_shard)
    except Rejected as rejected:
        return Rejection(pod.key, rejected.reason, rejected.detail, service_id)
    key = pod.key
    return tuple(
        [
            Target(
                key=key,
                id=pod_port_id(service_id, port) if place else service_id,
                name=name,
                address=endpoint.address,
                port=endpoint.port,
                meta=endpoint.meta,
                rank=(0, pod.created, pod.uid),
                tags=tags,
                ready=pod.ready if rules.has_readiness else None,
                is_zone_known=False,
                has_own_address=not (pod.host_network or rules.pods_through_proxy),
                is_terminating=pod.deleted,
            )
            for place, (port, endpoint) in enumerate(zip(scrape.ports, endpoints, strict=True))
        ]
    )


def resolve_node(node: Node, rules: TargetRules) -> Resolved:
    """Return the target of a Node: the proxy's NodePort at an address that Prometheus reaches.

    Its ID and path contain the address at which the proxy reaches the kubelet. A Node and its replacement
    can claim the same one: `rank` prefers the Ready one, then the older.
    """
    node_ip = node_address(node)
    if node_ip is None:
        return Rejection(
            node.key, Reason.NO_ADDRESS, "the Node's status has no InternalIP or ExternalIP that is an IP"
        )
    service_id = node_service_id(node_ip, rules.id_prefix)
    try:
        subject = _node_subject(node, node_ip, service_id, rules)
        target = Target(
            key=node.key,
            id=service_id,
            name=service_name(rules.node_name, subject, rules.longest_shard),
            address=_reached_address(node, rules.node_address_types),
            port=rules.proxy_node_port,
            meta=checked_meta(_node_meta(node, node_ip, rules.proxy_scheme)),
            rank=(0 if node.ready else 1, node.created, node.uid),
            tags=service_tags(rules.tags, subject, rules.longest_shard),
            ready=node.ready if rules.has_readiness else None,
        )
    except Rejected as rejected:
        return Rejection(node.key, rejected.reason, rejected.detail, service_id)
    return (target,)


class _Endpoint(msgspec.Struct, frozen=True, gc=False):
    """The address, port and meta at which Prometheus scrapes one port of a Pod."""

    address: str
    port: int
    meta: tuple[tuple[str, str], ...]


def _endpoints(pod: Pod, scrape: ScrapeConfig, rules: TargetRules) -> list[_Endpoint]:
    named = {f"{PARAM_PREFIX}{name}": value for name, value in scrape.params.items()}
    named |= {"metrics_path": scrape.path, "scheme": scrape.scheme}
    meta = checked_meta(_pod_meta(pod, rules) | named)
    return [_Endpoint(scrape.address, port, meta) for port in scrape.ports]


def _proxy_endpoints(pod: Pod, scrape: ScrapeConfig, rules: TargetRules) -> list[_Endpoint]:
    """Return the proxy's NodePort on the Pod's Node; the proxy adds the Pod's path, parameters and scheme."""
    require_declared(pod, scrape.ports)
    host = parse_ip(pod.host_ip)
    if host is None or host.is_unspecified or host.is_multicast:
        raise Rejected(Reason.NO_HOST_IP, "the Pod's status names no address of its node")
    is_alone = len(scrape.ports) == 1
    base = _pod_meta(pod, rules) | {"scheme": rules.proxy_scheme}
    paths = [proxied_path(pod.namespace, pod.name, None if is_alone else port) for port in scrape.ports]
    return [
        _Endpoint(str(host), rules.proxy_node_port, checked_meta({**base, "metrics_path": path}))
        for path in paths
    ]


def _pod_meta(pod: Pod, rules: TargetRules) -> dict[str, str]:
    meta = {"kind": "pod", "namespace": pod.namespace, "node": pod.node, "pod": pod.name}
    for one in rules.target_labels:
        meta[one.key] = pod.annotations.get(f"{rules.annotation_prefix}{one.annotation}", "")
    return meta | {one.key: pod.labels.get(one.label, "") for one in rules.labels} if rules.labels else meta


def _node_meta(node: Node, node_ip: str, scheme: str) -> Mapping[str, str]:
    return {
        "kind": Kind.NODE.value,
        "metrics_path": f"/api/v1/nodes/{url_host(node_ip)}:{node.kubelet_port}/metrics/cadvisor",
        "node": node.name,
        "scheme": scheme,
        "zone": node.labels.get(ZONE_LABEL, ""),
    }


def _pod_subject(pod: Pod, service_id: str, rules: TargetRules) -> Subject:
    values = {
        "cluster": rules.cluster,
        "kind": Kind.POD.value,
        "namespace": pod.namespace,
        "pod": pod.name,
        "node": pod.node,
        "node_ip": _canonical_ip(pod.host_ip),
    }
    return Subject(values, pod.labels, service_id)


def _node_subject(node: Node, node_ip: str, service_id: str, rules: TargetRules) -> Subject:
    values = {"cluster": rules.cluster, "kind": Kind.NODE.value, "node": node.name, "node_ip": node_ip}
    return Subject(values, node.labels, service_id)


@lru_cache(maxsize=1024)
def _canonical_ip(text: str) -> str:
    """Return the canonical spelling of a Node's IP, empty for other text; many Pods share each."""
    address = parse_ip(text)
    return "" if address is None else str(address)


def _reached_address(node: Node, types: tuple[str, ...]) -> str:
    address = node_address(node, types)
    if address is None:
        raise Rejected(Reason.NO_ADDRESS, f"the Node's status has no {' or '.join(types)} that is an IP")
    return address


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
        """Return the targets of one Pod with their Node's zone; unchanged if that is unknown."""
        if not targets or targets[0].key.kind is not Kind.POD:
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
    try:
        pairs = checked_meta({ZONE: node.labels.get(ZONE_LABEL, "")})
    except Rejected:
        return ""
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
