"""Turns one Pod or Node into its targets, or says why it is refused."""

from dataclasses import dataclass

from k8s_consul_registrar.model import Kind, Node, Pod, Rejection, Target, Undecodable
from k8s_consul_registrar.targets.addresses import node_address, parse_ip, url_host
from k8s_consul_registrar.targets.annotations import (
    DEFAULT_PATH,
    Refused,
    quoted,
    scrape_params,
    scrape_path,
    scrape_port,
    scrape_scheme,
)
from k8s_consul_registrar.targets.names import node_service_id, pod_service_id
from k8s_consul_registrar.targets.reasons import Reason

# Consul's limits on meta: agent/structs/structs.go, validateMetaPair and metaMaxKeyPairs. Of the 64 pairs,
# some are kept for what is added to each service (cluster, instance, shard and the like).
MOST_META_PAIRS = 56
LONGEST_META_VALUE = 512

Verdict = tuple[Target, ...] | Rejection

_SCRAPED_PHASES = frozenset({"Running", "Unknown"})


@dataclass(frozen=True, slots=True)
class TargetRules:
    """What the operator decides about targets: the annotations' prefix and the proxy's NodePort."""

    annotation_prefix: str = "prometheus.io/"
    proxy_node_port: int = 31112


def judge(item: Pod | Node | Undecodable, rules: TargetRules) -> Verdict | None:
    """Return an item's targets (none when it asks for none) or its rejection.

    None stands for an item that cannot even be named, about which nothing can be said.
    """
    match item:
        case Pod():
            return judge_pod(item, rules)
        case Node():
            return judge_node(item, rules)
    if item.key is None:
        return None
    own_id = pod_service_id(item.key.namespace, item.key.name) if item.kind is Kind.POD else ""
    return Rejection(item.key, Reason.UNDECODABLE, item.problem, own_id)


def judge_pod(pod: Pod, rules: TargetRules) -> Verdict:
    """Return the targets of a Pod: none unless it is annotated and in phase Running or Unknown.

    Succeeded and Failed Pods keep an IP that others may already use, so they are gone at once. A Pod that
    is being deleted is scraped until it leaves these phases.
    """
    prefix = rules.annotation_prefix
    if pod.annotations.get(f"{prefix}scrape") != "true" or pod.phase not in _SCRAPED_PHASES:
        return ()
    service_id = pod_service_id(pod.namespace, pod.name)
    try:
        path, query = scrape_path(pod.annotations.get(f"{prefix}path", DEFAULT_PATH))
        params = scrape_params(query, pod.annotations, prefix)
        meta = {
            "kind": "pod",
            "metrics_path": path,
            "namespace": pod.namespace,
            "node": pod.node,
            "pod": pod.name,
            "scheme": scrape_scheme(pod.annotations.get(f"{prefix}scheme", "")),
            **{f"param_{name}": value for name, value in params.items()},
        }
        target = Target(
            key=pod.key,
            id=service_id,
            name=service_id,
            address=_pod_address(pod),
            port=scrape_port(pod.annotations.get(f"{prefix}port"), pod.ports),
            meta=_checked_meta(meta),
            rank=(0, pod.created, pod.uid),
        )
    except Refused as refused:
        return Rejection(pod.key, refused.reason, refused.detail, service_id)
    return (target,)


def judge_node(node: Node, rules: TargetRules) -> Verdict:
    """Return the target of a Node, which is the proxy's NodePort at the Node's own address.

    Two Nodes may claim one address when one of them was replaced: the Ready one, then the older, is first.
    """
    address = node_address(node)
    if address is None:
        return Rejection(
            node.key, Reason.NO_ADDRESS, "the Node's status has no InternalIP or ExternalIP that is an IP"
        )
    service_id = node_service_id(address)
    meta = {
        "kind": "node",
        "metrics_path": f"/api/v1/nodes/{url_host(address)}:{node.kubelet_port}/metrics/cadvisor",
        "node": node.name,
        "scheme": "http",
    }
    try:
        target = Target(
            key=node.key,
            id=service_id,
            name=service_id,
            address=address,
            port=rules.proxy_node_port,
            meta=_checked_meta(meta),
            rank=(0 if node.ready else 1, node.created, node.uid),
        )
    except Refused as refused:
        return Rejection(node.key, refused.reason, refused.detail, service_id)
    return (target,)


def _pod_address(pod: Pod) -> str:
    if not pod.ip:
        raise Refused(Reason.NO_IP, "the Pod has no IP yet")
    address = parse_ip(pod.ip)
    if address is None or address.is_unspecified or address.is_multicast:
        raise Refused(Reason.INVALID_IP, f"the Pod's IP {quoted(pod.ip)} cannot be scraped")
    return str(address)


def _checked_meta(meta: dict[str, str]) -> tuple[tuple[str, str], ...]:
    pairs = tuple(sorted((key, value) for key, value in meta.items() if value))
    if len(pairs) > MOST_META_PAIRS:
        raise Refused(Reason.META_TOO_MANY, f"{len(pairs)} pairs of meta are more than {MOST_META_PAIRS}")
    for key, value in pairs:
        size = len(value.encode("utf-8", "replace"))
        if size > LONGEST_META_VALUE:
            raise Refused(Reason.META_TOO_LONG, f"{key} is {size} bytes, Consul takes {LONGEST_META_VALUE}")
    return pairs
