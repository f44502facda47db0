"""Resolution of a Pod or Node into its targets, with their meta and zone, or a rejection."""

from collections.abc import Mapping
from functools import lru_cache

import msgspec
from msgspec.structs import replace

from k8s_consul_registrar.errors import Note, Reason, Rejected
from k8s_consul_registrar.model import Kind, Node, Pod, Rejection, Resolved, Target, Undecodable
from k8s_consul_registrar.targets.annotations import IntervalRules, ScrapeSet
from k8s_consul_registrar.targets.meta import (
    ZONE_LABEL,
    LabelMeta,
    Meta,
    TargetLabel,
    checked_meta,
    own_zone,
    with_room,
)
from k8s_consul_registrar.targets.scrape_config import (
    NODE_ADDRESS_TYPES,
    PRIMARY,
    TCP,
    ScrapeConfig,
    ScrapedPort,
    annotated_family,
    host_address,
    is_scraped,
    kubelet_address,
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
    node_path_id,
    node_service_id,
    pod_port_id,
    pod_service_id,
    service_name,
    service_tags,
)

# Kubernetes, "Well-Known Labels, Annotations and Taints".
OS_LABEL, WINDOWS = "kubernetes.io/os", "windows"
# Kubernetes, "Deployments": the label that tells the Pods of one template from others.
TEMPLATE_HASH = "pod-template-hash"


class NodePaths(msgspec.Struct, frozen=True):
    """The kubelet paths that are scraped of each Node, and of a Windows Node; `is_told` if their services say which."""

    linux: tuple[str, ...] = ("/metrics/cadvisor",)
    windows: tuple[str, ...] = ("/metrics/cadvisor",)
    is_told: bool = False


class TargetRules(msgspec.Struct, frozen=True):
    """The operator's settings for targets.

    `node_address_types` are those at which Prometheus reaches a Node, the preferred one first.
    `longest_shard` is in bytes. With `has_readiness` a target carries its object's readiness. With
    `pods_through_proxy` a Pod's target is the proxy on its Node, scraped with `proxy_scheme`, with `pods_at_host` its
    hostPort there.
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
    namespace_labels: tuple[LabelMeta, ...] = ()
    node_labels: tuple[LabelMeta, ...] = ()
    extra_meta: tuple[str, ...] = ()
    annotations: tuple[LabelMeta, ...] = ()
    target_labels: tuple[TargetLabel, ...] = ()
    node_address_types: tuple[str, ...] = NODE_ADDRESS_TYPES
    node_paths: NodePaths = NodePaths()
    longest_shard: int = 0
    has_readiness: bool = False
    intervals: IntervalRules = IntervalRules()
    pods_through_proxy: bool = False
    pods_at_host: bool = False
    pod_ip_family: str = PRIMARY
    node_ip_family: str = PRIMARY
    proxy_scheme: str = "http"

    @property
    def is_pod_elsewhere(self) -> bool:
        """True if a Pod's target is at its Node, so that endpoints of the Pod itself are not reached."""
        return self.pods_through_proxy or self.pods_at_host

    @property
    def given_labels(self) -> Mapping[Kind, tuple[LabelMeta, ...]]:
        """The labels that Namespaces and Nodes give to the meta of what is in them."""
        labels = {Kind.NAMESPACE: self.namespace_labels, Kind.NODE: self.node_labels}
        return {kind: some for kind, some in labels.items() if some}

    def awaited(self, *, has_zone: bool) -> tuple[Kind, ...]:
        """Return the kinds of object that a target, whose zone may be known, inherits from."""
        is_of_node = self.node_labels or not has_zone
        return (*([Kind.NAMESPACE] if self.namespace_labels else ()), *([Kind.NODE] if is_of_node else ()))


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
        scrape = pod_scrape(pod, rules.annotation_prefix, rules.intervals, rules.pod_ip_family)
        endpoints = _endpoints(pod, scrape, rules)
        if rules.extra_meta or rules.annotations:
            pairs = zip(endpoints, scrape.ports, strict=True)
            endpoints = [_with_extra(endpoint, pod, port, rules) for endpoint, port in pairs]
        subject = _pod_subject(pod, service_id, rules)
        name = service_name(rules.pod_name, subject, rules.longest_shard)
        tags = service_tags(rules.tags, subject, rules.longest_shard)
    except Rejected as rejected:
        return Rejection(pod.key, rejected.reason, rejected.detail, service_id)
    key, zone = pod.key, own_zone(pod.labels)
    awaits = rules.awaited(has_zone=bool(zone))
    return tuple(
        [
            Target(
                key=key,
                id=pod_port_id(service_id, port.suffix) if place else service_id,
                name=name,
                address=endpoint.address,
                port=endpoint.port,
                # `zone` sorts after every other key.
                meta=endpoint.meta + zone,
                rank=(0, pod.created, pod.uid),
                tags=tags,
                ready=pod.ready if rules.has_readiness else None,
                awaits=awaits,
                has_own_zone=bool(zone),
                has_own_address=not (pod.host_network or rules.is_pod_elsewhere),
                is_terminating=pod.deleted,
                notes=port.scrape.notes + endpoint.notes,
            )
            for place, (port, endpoint) in enumerate(zip(scrape.ports, endpoints, strict=True))
        ]
    )


def resolve_node(node: Node, rules: TargetRules) -> Resolved:
    """Return the targets of a Node, one for each path: the proxy's NodePort at an address that Prometheus reaches.

    Its ID contains its first address, whichever family is chosen, so that another choice replaces no service; its
    path contains the address at which the proxy reaches the kubelet. A Node and its replacement can claim the same
    ID: `rank` prefers the Ready one, then the older.
    """
    node_ip, kubelet_ip = node_address(node), kubelet_address(node, rules.node_ip_family)
    if node_ip is None or kubelet_ip is None:
        return Rejection(
            node.key, Reason.NO_ADDRESS, "the Node's status has no InternalIP or ExternalIP that is an IP"
        )
    service_id = node_service_id(node_ip, rules.id_prefix)
    try:
        subject = _node_subject(node, node_ip, service_id, rules)
        name = service_name(rules.node_name, subject, rules.longest_shard)
        tags = service_tags(rules.tags, subject, rules.longest_shard)
        address = _reached_address(node, rules)
        is_windows = node.labels.get(OS_LABEL) == WINDOWS
        paths = rules.node_paths.windows if is_windows else rules.node_paths.linux
        labels = [(one.key, node.labels.get(one.label, "")) for one in rules.node_labels]
        targets = []
        for place, path in enumerate(paths):
            meta = checked_meta(_node_meta(node, kubelet_ip, path, rules))
            meta, notes = with_room(meta, labels, Note.LABELS_DROPPED)
            targets.append(
                Target(
                    key=node.key,
                    id=node_path_id(service_id, path) if place else service_id,
                    name=name,
                    address=address,
                    port=rules.proxy_node_port,
                    meta=meta,
                    rank=(0 if node.ready else 1, node.created, node.uid),
                    tags=tags,
                    ready=node.ready if rules.has_readiness else None,
                    notes=notes,
                )
            )
        return tuple(targets)
    except Rejected as rejected:
        return Rejection(node.key, rejected.reason, rejected.detail, service_id)


class _Endpoint(msgspec.Struct, frozen=True, gc=False):
    """The address, port and meta at which Prometheus scrapes one port of a Pod."""

    address: str
    port: int
    meta: Meta
    notes: tuple[str, ...] = ()


def _own_endpoints(pod: Pod, config: ScrapeConfig, rules: TargetRules) -> list[_Endpoint]:
    base = _pod_meta(pod, rules)
    found: list[_Endpoint] = []
    scrape: ScrapeSet | None = None
    meta: Meta = ()
    for port in config.ports:
        if port.scrape is not scrape:
            scrape = port.scrape
            meta = checked_meta({**base, **scrape.meta})
        found.append(_Endpoint(config.address, port.number, meta))
    return found


def _proxy_endpoints(pod: Pod, config: ScrapeConfig, rules: TargetRules) -> list[_Endpoint]:
    """Return the proxy's NodePort on the Pod's Node; the proxy adds the Pod's path, parameters and scheme."""
    require_declared(pod, config.ports)
    host = host_address(pod, rules.node_ip_family)
    is_alone = len(config.ports) == 1
    base = _pod_meta(pod, rules) | {"scheme": rules.proxy_scheme}

    def meta_of(port: ScrapedPort) -> Meta:
        path = proxied_path(pod.namespace, pod.name, None if is_alone else port)
        return checked_meta({**base, "metrics_path": path, **port.scrape.timing.meta})

    return [_Endpoint(host, rules.proxy_node_port, meta_of(port)) for port in config.ports]


def _host_endpoints(pod: Pod, config: ScrapeConfig, rules: TargetRules) -> list[_Endpoint]:
    """Return the Node's address with the `hostPort` of each port."""
    host = host_address(
        pod, annotated_family(pod.annotations, rules.annotation_prefix) or rules.node_ip_family
    )
    declared = {one.number: one.host_port for one in pod.ports if one.protocol == TCP and one.host_port}
    found = []
    for endpoint in _own_endpoints(pod, config, rules):
        # On its Node's network a Pod has its ports there.
        port = declared.get(endpoint.port) or (endpoint.port if pod.host_network else 0)
        if not port:
            raise Rejected(
                Reason.NO_HOST_PORT, f"no container has a hostPort for the TCP port {endpoint.port}"
            )
        found.append(replace(endpoint, address=host, port=port))
    return found


def _endpoints(pod: Pod, config: ScrapeConfig, rules: TargetRules) -> list[_Endpoint]:
    """Return where each port of a Pod is scraped."""
    if rules.pods_through_proxy:
        return _proxy_endpoints(pod, config, rules)
    return _host_endpoints(pod, config, rules) if rules.pods_at_host else _own_endpoints(pod, config, rules)


def _with_extra(endpoint: _Endpoint, pod: Pod, port: ScrapedPort, rules: TargetRules) -> _Endpoint:
    """Return an endpoint with the meta that EXTRA_META and POD_ANNOTATIONS_AS_META add, as far as there is room."""
    declared = next((one for one in pod.ports if (one.number, one.protocol) == (port.number, TCP)), None)
    kind, workload = workload_of(pod)
    values = {
        "port_name": declared.name if declared else "",
        "container": declared.container if declared else "",
        "pod_uid": pod.uid,
        "workload": workload,
        "workload_kind": kind,
        "ready": str(pod.ready).lower(),
    }
    pairs = [(key, values[key]) for key in rules.extra_meta]
    pairs += [(one.key, pod.annotations.get(one.label, "")) for one in rules.annotations]
    meta, notes = with_room(endpoint.meta, pairs, Note.META_DROPPED)
    return replace(endpoint, meta=meta, notes=notes)


def workload_of(pod: Pod) -> tuple[str, str]:
    """Return kind and name of the workload that a Pod belongs to: of a Deployment's ReplicaSet, the Deployment.

    The Deployment adds the Pods' label `pod-template-hash` to its own name (kubernetes: deployment/sync.go).
    """
    ending = f"-{pod.labels.get(TEMPLATE_HASH, '')}"
    name = pod.owner.removesuffix(ending)
    if pod.owner_kind == "ReplicaSet" and ending != "-" and name not in ("", pod.owner):
        return "Deployment", name
    return pod.owner_kind, pod.owner


def _pod_meta(pod: Pod, rules: TargetRules) -> dict[str, str]:
    meta = {"kind": "pod", "namespace": pod.namespace, "node": pod.node, "pod": pod.name}
    for one in rules.target_labels:
        meta[one.key] = pod.annotations.get(f"{rules.annotation_prefix}{one.annotation}", "")
    return meta | {one.key: pod.labels.get(one.label, "") for one in rules.labels} if rules.labels else meta


def _node_meta(node: Node, kubelet_ip: str, path: str, rules: TargetRules) -> Mapping[str, str]:
    meta = {
        "kind": Kind.NODE.value,
        "metrics_path": f"/api/v1/nodes/{url_host(kubelet_ip)}:{node.kubelet_port}{path}",
        "node": node.name,
        "scheme": rules.proxy_scheme,
        "zone": node.labels.get(ZONE_LABEL, ""),
    }
    if "ready" in rules.extra_meta:
        meta["ready"] = str(node.ready).lower()
    if not rules.node_paths.is_told:
        return meta
    system = node.labels.get(OS_LABEL, "")
    return meta | {"node_path": path, "node_os": "" if system == "linux" else system}


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


def _reached_address(node: Node, rules: TargetRules) -> str:
    types, family = rules.node_address_types, rules.node_ip_family
    address = node_address(node, types, family)
    if address is None:
        what = "an IP" if family == PRIMARY else f"an {family} address"
        raise Rejected(Reason.NO_ADDRESS, f"the Node's status has no {' or '.join(types)} that is {what}")
    return address
