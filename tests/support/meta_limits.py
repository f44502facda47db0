"""Clusters whose services have as much meta as can be, and Consul's rules for it."""

import re

from k8s_consul_registrar.consul.codec import MetaKeys, parse_meta_keys
from k8s_consul_registrar.model import Namespace, Node, Pod, Service, SliceEndpoint, Source
from k8s_consul_registrar.registrar.observed import AsDesired
from k8s_consul_registrar.registrar.ownership import Identity
from k8s_consul_registrar.targets.meta import (
    ANNOTATION_PREFIX,
    EXTRA_KEYS,
    LABEL_PREFIX,
    NAMESPACE_LABEL_PREFIX,
    NODE_LABEL_PREFIX,
    parse_labels,
)
from k8s_consul_registrar.targets.resolve import TargetRules
from support.builders import make_kube_service, make_slice
from support.memory import NAMESPACES, NODES, PODS, SERVICES, SLICES, MemoryCluster

NAMES = [f"l{number:02}" for number in range(40)]
RULES = TargetRules(
    labels=parse_labels(NAMES[:3], LABEL_PREFIX),
    namespace_labels=parse_labels(NAMES, NAMESPACE_LABEL_PREFIX),
    node_labels=parse_labels(NAMES, NODE_LABEL_PREFIX),
    annotations=parse_labels(NAMES[:20], ANNOTATION_PREFIX),
    extra_meta=EXTRA_KEYS,
)
IDENTITY = Identity("c" * 50, "i" * 50)
KEYS = parse_meta_keys(["cluster=cluster_name"])
# Consul: agent/structs/structs.go, validateMetaPair and metaMaxKeyPairs.
_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")


def cluster_of(pod: Pod, *others: Namespace | Node) -> MemoryCluster:
    """Return a cluster of a Pod that is a Service's endpoint too, and of other objects."""
    sources: tuple[Source, ...] = (NAMESPACES, NODES, PODS, SERVICES, SLICES)
    cluster = MemoryCluster(sources, rules=RULES)
    cluster.put(make_kube_service())
    cluster.put(make_slice("web-1", SliceEndpoint("198.51.100.10", pod.name), SliceEndpoint("198.51.100.11")))
    for item in (pod, *others):
        cluster.put(item)
    return cluster


def services_of(cluster: MemoryCluster, keys: MetaKeys = KEYS) -> list[Service]:
    """Return the services of every target as they go to Consul."""
    targets = [target for claims in cluster.desired.claims.values() for target in claims]
    return [keys.encode(AsDesired(one, "s" * 512, "u" * 36).service(IDENTITY)) for one in targets]


def breaches(service: Service) -> list[str]:
    """Return the keys of meta that Consul would not take, and the number of pairs if there are too many."""
    odd = [
        key
        for key, value in service.meta
        if not _KEY.fullmatch(key) or len(value.encode("utf-8", "replace")) > 512 or not value
    ]
    return odd + ([str(len(service.meta))] if len(service.meta) > 64 else [])
