"""Settings of targets: which objects become targets, and how their services are named, tagged and sharded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k8s_consul_registrar.consul.codec import MetaKeys, parse_meta_keys
from k8s_consul_registrar.model import EVERY_OBJECT, Kind, Selector, Source
from k8s_consul_registrar.settings import parsers as parse
from k8s_consul_registrar.settings.common import PodSelection
from k8s_consul_registrar.settings.field import Reader, Section, Setting
from k8s_consul_registrar.settings.parsers import TEXT, TEXTS, Parser
from k8s_consul_registrar.targets.annotations import Duration, IntervalRules
from k8s_consul_registrar.targets.meta import (
    ANNOTATION_PREFIX,
    EXTRA_KEYS,
    LONGEST_META_VALUE,
    NAMESPACE_LABEL_PREFIX,
    NODE_LABEL_PREFIX,
    LabelMeta,
    TargetLabel,
    parse_labels,
    parse_target_label,
)
from k8s_consul_registrar.targets.resolve import NodePaths
from k8s_consul_registrar.targets.scrape_config import NODE_ADDRESS_TYPES
from k8s_consul_registrar.targets.service_names import (
    DEFAULT_ENDPOINT_NAME,
    DEFAULT_NODE_NAME,
    DEFAULT_POD_NAME,
    ENDPOINT_NAME,
    FIELDS,
    KUBELET_PATHS,
    NODE_NAME,
    POD_NAME,
    Template,
    is_fit_for_name,
    kind_of_id,
    parse_name,
    parse_tag,
)

DISCOVERY = "Discovery"
RANDOM = "random"
HASH = "hash"
_KINDS = {"pods": Kind.POD, "nodes": Kind.NODE, "services": Kind.ENDPOINT}
_DEFAULT_KINDS = frozenset({Kind.POD, Kind.NODE})
_KIND_NAMES = parse.choices(*_KINDS, empty="names no kind")


_KUBELET_PATHS = parse.choices(*KUBELET_PATHS, empty=f"names none of {', '.join(KUBELET_PATHS)}")


@dataclass(frozen=True, slots=True)
class SelectionSettings(PodSelection, group=DISCOVERY):
    """The objects of a cluster that become targets."""

    kinds: frozenset[Kind] = Setting(
        "DISCOVER",
        Parser(lambda given: frozenset(_KINDS[one] for one in _KIND_NAMES.parse(given)), _KIND_NAMES.schema),
        complete=lambda kinds, reader: (
            kinds or (frozenset({Kind.POD}) if reader.is_set("NAMESPACES") else _DEFAULT_KINDS)
        ),
    ).means(
        "Comma-separated kinds to discover: `pods`, `nodes`, `services` (the endpoints of annotated Services). "
        "Unset: Pods and Nodes, or only Pods if `NAMESPACES` is set"
    )
    service_label_selector: str = Setting("SERVICE_LABEL_SELECTOR", parse.selector).means(
        "Kubernetes label selector for Services"
    )
    namespace_label_selector: str = Setting("NAMESPACE_LABEL_SELECTOR", parse.selector).means(
        "Kubernetes label selector for namespaces: only objects in those that it matches are discovered. Needs the overlay "
        "`namespace-labels`"
    )
    node_label_selector: str = Setting("NODE_LABEL_SELECTOR", parse.selector).means(
        "Kubernetes label selector for Nodes"
    )
    node_address_types: tuple[str, ...] = Setting(
        "NODE_ADDRESS_TYPES",
        parse.choices(*NODE_ADDRESS_TYPES, empty=f"names none of {', '.join(NODE_ADDRESS_TYPES)}"),
        ",".join(NODE_ADDRESS_TYPES),
    ).means(
        "Comma-separated types of Node addresses that Prometheus can reach. The first type that a Node has an "
        "address of gives its service's address"
    )
    given_paths: tuple[str, ...] = Setting("NODE_PATHS", _KUBELET_PATHS).means(
        "Comma-separated kubelet paths to scrape of each Node, each a service: `/metrics/cadvisor`, `/metrics`, "
        "`/metrics/resource`, `/metrics/probes`. The proxy must relay them (`PROXY_PATHS`). Unset: `/metrics/cadvisor`"
    )
    windows_paths: tuple[str, ...] = Setting("NODE_PATHS_WINDOWS", _KUBELET_PATHS).means(
        "The same for Windows Nodes. Unset: `NODE_PATHS` with `/metrics/resource` in place of `/metrics/cadvisor`, "
        "which is empty there; `/metrics/cadvisor` if neither is set"
    )

    @property
    def node_paths(self) -> NodePaths:
        """The kubelet paths that are scraped."""
        if not (self.given_paths or self.windows_paths):
            return NodePaths()
        linux = self.given_paths or NodePaths().linux
        useful = dict.fromkeys("/metrics/resource" if path == "/metrics/cadvisor" else path for path in linux)
        return NodePaths(linux, self.windows_paths or tuple(useful), is_told=True)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that are listed separately."""
        nodes = [Source(Kind.NODE)] if Kind.NODE in self.kinds else []
        pods = [Source(Kind.POD, namespace) for namespace in self.namespaces or ("",)]
        services = [one for part in pods for one in Source(Kind.ENDPOINT, part.namespace).needed]
        return (
            *nodes,
            *(pods if Kind.POD in self.kinds else ()),
            *(services if Kind.ENDPOINT in self.kinds else ()),
        )

    @property
    def selectors(self) -> Mapping[Kind, Selector]:
        """The selector of each kind that has one."""
        selectors = {
            Kind.POD: self.pod_selector,
            Kind.NODE: Selector(self.node_label_selector),
            Kind.NAMESPACE: Selector(self.namespace_label_selector),
            Kind.SERVICE: self.outside_excluded(self.service_label_selector),
            Kind.ENDPOINT: self.outside_excluded(),
        }
        return {kind: given for kind, given in selectors.items() if given != EVERY_OBJECT}

    @property
    def is_whole_cluster(self) -> bool:
        """True if every Pod and Node of the cluster is seen."""
        return self.kinds >= _DEFAULT_KINDS and not self.namespaces and not self.selectors

    def check(self, reader: Reader) -> None:
        """Warn of settings without effect, and of a selector that may remove another registrar's services."""
        PodSelection.check(self, reader)
        kinds = {
            "POD_LABEL_SELECTOR": "pods",
            "NAMESPACES": "pods",
            "EXCLUDE_NAMESPACES": "pods",
            "NAMESPACE_LABEL_SELECTOR": "pods",
            "NODE_LABEL_SELECTOR": "nodes",
            "NODE_LABELS_AS_META": "nodes",
            "SERVICE_LABEL_SELECTOR": "services",
        }
        for one, kind in kinds.items():
            is_of_services = "NAMESPACE" in one and Kind.ENDPOINT in self.kinds
            is_used = _KINDS[kind] in self.kinds or is_of_services
            if reader.is_set(one) and not is_used:
                reader.warnings.append(f"{one} has no effect: DISCOVER leaves out {kind}")
        if any(one.labels for one in self.selectors.values()) and not reader.is_set("INSTANCE"):
            reader.warnings.append(
                "a label selector without INSTANCE: services of objects that it does not match are removed, "
                "even those that another registrar of this cluster wrote"
            )


@dataclass(frozen=True, slots=True)
class IntervalSettings(Section, group=DISCOVERY):
    """Bounds and defaults of annotated intervals."""

    least: Duration | None = Setting(
        "SCRAPE_INTERVAL_MIN", parse.duration(is_zero_allowed=True), "10s"
    ).means(
        "Least `scrape-interval` of an annotation, as `10s` or `1m30s`; a lower one is raised to it. `0`: no bound"
    )
    default: Duration | None = Setting("SCRAPE_INTERVAL_DEFAULT", parse.duration()).means(
        "The `scrape_interval` of the collector's job, against which a `scrape-timeout` without a `scrape-interval` "
        "is checked. Unset: such a timeout is rejected"
    )
    slow: Duration | None = Setting("SLOW_INTERVAL", parse.duration(), "5m").means(
        'Interval of a target with the annotation `scrape-slow: "true"`'
    )
    slow_timeout: Duration | None = Setting("SLOW_TIMEOUT", parse.duration(), "30s").means(
        "Timeout of such a target, not longer than `SLOW_INTERVAL`"
    )

    @property
    def rules(self) -> IntervalRules:
        """The settings as the annotations are read with them."""
        assert self.least
        assert self.slow
        assert self.slow_timeout
        return IntervalRules(self.least, self.default, self.slow, self.slow_timeout)

    def check(self, reader: Reader) -> None:
        """Report a timeout that is longer than its interval: Prometheus drops such a target."""
        if self.rules.slow_timeout.milliseconds > self.rules.slow.milliseconds:
            reader.problem("SLOW_TIMEOUT", "is longer than SLOW_INTERVAL")


def _fields_of(kind: Kind) -> str:
    return ", ".join(f"`{{{one}}}`" for one in sorted(FIELDS[kind]))


def _id_prefix(given: str) -> str:
    prefix = parse.name.parse(given)
    if kind_of_id(prefix) is not None:
        raise ValueError(f"{prefix!r} begins as an ID without a prefix does")
    return prefix


def _shard_path(given: str) -> str:
    if not given.isprintable() or len(given.encode()) > LONGEST_META_VALUE:
        raise ValueError(f"{given[:40]!a} is over {LONGEST_META_VALUE} bytes or not printable")
    return given


def _target_labels(given: str) -> tuple[TargetLabel, ...]:
    labels = parse.entries(parse_target_label).parse(given)
    by_annotation = {one.annotation: one.name for one in labels}
    for one in labels:
        if (other := by_annotation[one.annotation]) != one.name:
            raise ValueError(f"{one.name!r} and {other!r} would both be set by {one.annotation}")
    return labels


@dataclass(frozen=True, slots=True)
class NamingSettings(Section, group="Names, tags, labels and shards"):
    """The names, tags, labels and shards of services; templates are parsed once."""

    pod_name: Template = Setting(
        "POD_SERVICE_NAME", Parser(lambda given: parse_name(given, Kind.POD), TEXT), DEFAULT_POD_NAME
    ).means(
        f"Template of a Pod's service name. Fields: {_fields_of(Kind.POD)}, `{{bucket:<number>}}` and `{{label:<key>}}`. "
        "`{cluster}-pods` puts all Pods under one name"
    )
    node_name: Template = Setting(
        "NODE_SERVICE_NAME", Parser(lambda given: parse_name(given, Kind.NODE), TEXT), DEFAULT_NODE_NAME
    ).means(
        f"Template of a Node's service name. Fields: {_fields_of(Kind.NODE)}, `{{bucket:<number>}}` and `{{label:<key>}}`"
    )
    endpoint_name: Template = Setting(
        "ENDPOINT_SERVICE_NAME",
        Parser(lambda given: parse_name(given, Kind.ENDPOINT), TEXT),
        DEFAULT_ENDPOINT_NAME,
    ).means(
        "Template of the service name of a Service's endpoints. Fields: "
        f"{_fields_of(Kind.ENDPOINT)}, `{{bucket:<number>}}` and `{{label:<key>}}` of the Service"
    )
    id_prefix: str = Setting("SERVICE_ID_PREFIX", Parser(_id_prefix, parse.name.schema)).means(
        "Prefix of every service ID, for registrars that share an agent: letters, digits, `.`, `_`, `-`, at "
        "most 50"
    )
    tags: tuple[Template, ...] = Setting("SERVICE_TAGS", parse.entries(parse_tag)).means(
        "Comma-separated templates of tags, such as `cluster={cluster},shard_path={shard_path}`. A tag with an "
        "empty field is left out"
    )
    labels: tuple[LabelMeta, ...] = Setting(
        "POD_LABELS_AS_META", Parser(lambda given: parse_labels(parse.split(given)), TEXTS)
    ).means(
        "Comma-separated Pod labels to write as meta `label_<name>`, with `_` for characters other than letters "
        "and digits"
    )
    namespace_labels: tuple[LabelMeta, ...] = Setting(
        "NAMESPACE_LABELS_AS_META",
        Parser(lambda given: parse_labels(parse.split(given), NAMESPACE_LABEL_PREFIX), TEXTS),
    ).means(
        "Comma-separated labels of Namespaces to write as meta `namespace_label_<name>` of the targets in them. "
        "Namespaces are followed then, for which the account needs list and watch on `namespaces`"
    )
    node_labels: tuple[LabelMeta, ...] = Setting(
        "NODE_LABELS_AS_META",
        Parser(lambda given: parse_labels(parse.split(given), NODE_LABEL_PREFIX), TEXTS),
    ).means(
        "Comma-separated labels of Nodes to write as meta `node_label_<name>` of the Nodes and of the targets on "
        "them. `DISCOVER` must have `nodes`"
    )
    annotations: tuple[LabelMeta, ...] = Setting(
        "POD_ANNOTATIONS_AS_META",
        Parser(lambda given: parse_labels(parse.split(given), ANNOTATION_PREFIX), TEXTS),
    ).means(
        "Comma-separated Pod annotations to write as meta `annotation_<name>`, such as `example.com/owner`"
    )
    extra_meta: tuple[str, ...] = Setting("EXTRA_META", parse.choices(*EXTRA_KEYS)).means(
        "Comma-separated further meta of Pods: `port_name`, `container`, `pod_uid`, `workload` and `workload_kind` (of a "
        "ReplicaSet its Deployment), `ready`; of endpoints `port_name`, `pod_uid` and `ready`, of Nodes `ready`"
    )
    target_labels: tuple[TargetLabel, ...] = Setting("TARGET_LABELS", Parser(_target_labels, TEXTS)).means(
        "Comma-separated labels, such as `__sample_limit__`, that a Pod's annotations may set for its targets: "
        "`prometheus.io/label-sample_limit`. They are meta `target_<label>`, and labels in HTTP and file service "
        "discovery"
    )
    meta_keys: MetaKeys = Setting(
        "META_KEYS",
        Parser(
            lambda given: parse_meta_keys(parse.split(given)),
            {"type": "object", "additionalProperties": TEXT},
        ),
    ).means(
        "Comma-separated other names in Consul for the registrar's meta keys, such as "
        "`cluster=cluster_name,metrics_path=path`"
    )
    shard_paths: tuple[str, ...] = Setting("SHARD_PATHS", parse.entries(_shard_path)).means(
        "Comma-separated shard paths. Each service gets one of them as `shard_path`"
    )
    shard_strategy: str = Setting("SHARD_STRATEGY", parse.choice(RANDOM, HASH), RANDOM).means(
        "`random`: a new service gets any shard path and keeps it. `hash`: its ID determines the path"
    )

    @property
    def kinds_with_template(self) -> frozenset[Kind]:
        """The kinds whose service names are not the default, which contains the object's own name."""
        templates = {
            Kind.POD: self.pod_name != POD_NAME,
            Kind.NODE: self.node_name != NODE_NAME,
            Kind.ENDPOINT: self.endpoint_name != ENDPOINT_NAME,
        }
        return frozenset(kind for kind, is_template in templates.items() if is_template)

    @property
    def longest_shard(self) -> int:
        """The length of the longest shard path in bytes."""
        return max((len(path.encode()) for path in self.shard_paths), default=0)

    def check(self, reader: Reader) -> None:
        """Report names with a shard path that there is none for, or that fits no name, and keys that collide."""
        renamed = {theirs for _, theirs in self.meta_keys.renamed}
        used: Mapping[str, Sequence[LabelMeta | TargetLabel]] = {
            "TARGET_LABELS": self.target_labels,
            "NAMESPACE_LABELS_AS_META": self.namespace_labels,
            "NODE_LABELS_AS_META": self.node_labels,
            "POD_ANNOTATIONS_AS_META": self.annotations,
            "EXTRA_META": [LabelMeta(key, key) for key in self.extra_meta],
        }
        for setting, labels in used.items():
            for key in sorted(renamed & {one.key for one in labels}):
                reader.problem("META_KEYS", f"cannot use {key}, which {setting} uses")
        templates = {
            "POD_SERVICE_NAME": self.pod_name,
            "NODE_SERVICE_NAME": self.node_name,
            "ENDPOINT_SERVICE_NAME": self.endpoint_name,
        }
        for one in (one for one, template in templates.items() if template.has_shard):
            if not self.shard_paths:
                reader.problem(one, "has {shard_path}, and SHARD_PATHS names none")
            for path in (path for path in self.shard_paths if not is_fit_for_name(path)):
                problem = "has characters other than letters, digits, '.', '_', '~', ':' and '-'"
                reader.problem(one, f"has {{shard_path}}, and {path!r} of SHARD_PATHS {problem}")
