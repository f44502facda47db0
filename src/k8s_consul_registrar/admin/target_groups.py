"""Targets as groups of Prometheus' service discovery: which ones a query asks for, and their labels. Pure."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import compress
from operator import ne
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.admin.view import Scope, TargetRow
from k8s_consul_registrar.consul.codec import MetaKeys
from k8s_consul_registrar.model import TARGET_KINDS, Kind, ObjectKey, Service
from k8s_consul_registrar.targets.meta import (
    ANNOTATION_PREFIX,
    LABEL_PREFIX,
    NAMESPACE_LABEL_PREFIX,
    NODE_LABEL_PREFIX,
    PARAM_PREFIX,
    TARGET_PREFIX,
)
from k8s_consul_registrar.targets.scrape_config import socket_address
from k8s_consul_registrar.targets.service_names import bucket_of

FILTERS = ("kind", "namespace", "shard_path")
PARAMETERS = (*FILTERS, "labels", "shard", "of", "wait")
# Every target is hashed once for each shard, so their number is bounded.
MOST_SHARDS = 64
# The longest time that a request may wait for a change, in seconds.
LONGEST_WAIT = 60.0
# The names Prometheus' own consul_sd gives, so that one set of relabelling rules serves both
# (discovery/consul/consul.go).
_META = "__meta_consul_service_metadata_"
# The names of kubernetes_sd (discovery/kubernetes/{pod,node,endpointslice}.go) for what is known of a target.
_KUBERNETES = "__meta_kubernetes_"
_OF_POD = {
    "namespace": "namespace",
    "pod": "pod_name",
    "node": "pod_node_name",
    "container": "pod_container_name",
    "port_name": "pod_container_port_name",
    "pod_uid": "pod_uid",
    "ready": "pod_ready",
}
# Labels and annotations, which come with a second label that says that they are there.
_PREFIXES = {
    LABEL_PREFIX: "pod_label",
    ANNOTATION_PREFIX: "pod_annotation",
    NAMESPACE_LABEL_PREFIX: "namespace_label",
    NODE_LABEL_PREFIX: "node_label",
}
_OF_ENDPOINT = {
    "namespace": "namespace",
    "service": "service_name",
    "pod": "pod_name",
    "pod_uid": "pod_uid",
    "node": "endpoint_node_name",
    "port_name": "endpoint_port_name",
    "ready": "endpoint_ready",
    "zone": "node_label_topology_kubernetes_io_zone",
}
_OF_NODE = {"node": "node_name", "zone": "node_label_topology_kubernetes_io_zone"}
# The labels that Prometheus itself reads.
_SCRAPE = {
    "metrics_path": "__metrics_path__",
    "scheme": "__scheme__",
    "scrape_interval": "__scrape_interval__",
    "scrape_timeout": "__scrape_timeout__",
}
# The annotations that lead to meta.
_ANNOTATIONS = {
    "metrics_path": "path",
    "scheme": "scheme",
    "scrape_interval": "scrape-interval",
    "scrape_timeout": "scrape-timeout",
}
# Keys whose labels are remembered; Pods choose some of them.
_MOST_KEYS = 4096
# Sets of names that are remembered, and formats of each.
_MOST_NAMES, _MOST_FORMATS = 256, 64
# Bytes that no group has as text, because JSON in UTF-8 never does: each marks a place between two values of a
# group. Another one separates the parts of a format.
_MARKS = tuple([bytes([one]) for one in (*range(1, 10), *range(11, 32), 0xC0, 0xC1, *range(0xF5, 0x100))])
# Values between marks, by the number of values.
_TEMPLATES = [b"%b".join(_MARKS[: count + 1]) for count in range(len(_MARKS))]
_SEPARATOR = b"\0"
_FORMAT = b'\n{"targets":[\0],"labels":%b}'
# Groups of one format that become text together.
_AT_ONCE = 128
_NOT_IN_A_LABEL = re.compile(r"[^a-zA-Z0-9_]")
_NUMBER = re.compile(r"[0-9]{1,4}")
_encoder = msgspec.json.Encoder()
_WAIT = re.compile(r"([0-9]{1,4}(?:\.[0-9]{1,3})?)s?")


class BadQuery(ValueError):
    """A query that makes no sense; the text is fit for the client."""


class LabelNames(StrEnum):
    """The discoveries whose names the labels of a target have."""

    CONSUL = "consul"
    KUBERNETES = "kubernetes"
    BOTH = "both"


class Part(NamedTuple):
    """One of several parts into which targets are divided by their IDs."""

    number: int
    of: int


class Group(msgspec.Struct, frozen=True, gc=False):
    """A target as a group of a document: a format that many groups share, and the values that only it has."""

    id: str
    key: ObjectKey
    shard_path: str
    shared: bytes
    own: bytes

    @property
    def text(self) -> bytes:
        """The group as JSON, on a line of its own."""
        return next(texts((self,)))


def texts(groups: Iterable[Group]) -> Iterator[bytes]:
    """Yield groups as JSON, many with commas between them at once; those of one format follow each other."""
    by_format: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for one in groups:
        by_format[one.shared].append(one.own)
    for shared, own in by_format.items():
        # The longest part last: until then there is less to search.
        parts = sorted(zip(_MARKS, shared.split(_SEPARATOR), strict=False), key=lambda one: len(one[1]))
        for start in range(0, len(own), _AT_ONCE):
            text = b",".join(own[start : start + _AT_ONCE])
            for mark, part in parts:
                text = text.replace(mark, part)
            yield text


class Formats:
    """Formats of groups: names of labels, and values that a group has in common with the first one of these names.

    A group is a kilobyte, four fifths of which its neighbours have as well.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[list[str], dict[bytes, bytes]]] = {}

    def divide(self, address: str, labels: Mapping[str, str]) -> tuple[bytes, bytes]:
        """Return the format of a group, and the values that only it has."""
        names = (*labels,)
        if (known := self._known.get(names)) is None:
            if len(self._known) >= _MOST_NAMES:
                self._known.clear()
            known = self._known[names] = [*labels.values()], {}
        first, formats = known
        is_own = bytes(map(ne, labels.values(), first))
        if is_own not in formats and len(formats) >= _MOST_FORMATS:
            is_own = b"\1" * len(first)
        if is_own.count(1) > len(_MARKS) - 2:  # all labels are one value
            return _FORMAT % _SEPARATOR, _marked(address, labels)
        shared = formats.get(is_own)
        if shared is None:
            pairs = [
                _json(name) + b":" + (_SEPARATOR if own else _json(value))
                for (name, value), own in zip(labels.items(), is_own, strict=True)
            ]
            shared = formats[is_own] = _FORMAT % (b"{" + b",".join(pairs) + b"}")
        return shared, _marked(address, *compress(labels.values(), is_own))


@dataclass(frozen=True, slots=True)
class SdQuery:
    """A query for targets; an empty filter lets everything pass, several values of one are alternatives."""

    kinds: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset()
    shard_paths: frozenset[str] = frozenset()
    names: LabelNames = LabelNames.CONSUL
    part: Part | None = None

    @property
    def scope(self) -> Scope:
        """The kinds and namespaces that the document is about; any of them may have any shard path."""
        return Scope(self.kinds, self.namespaces)

    def matches(self, target: Group) -> bool:
        """Return True if a target passes every filter."""
        return (
            (not self.kinds or target.key.kind in self.kinds)
            and (not self.namespaces or target.key.namespace in self.namespaces)
            and (not self.shard_paths or target.shard_path in self.shard_paths)
            and (self.part is None or bucket_of(target.id, self.part.of) == self.part.number)
        )


def parse_sd_query(pairs: Iterable[tuple[str, str]]) -> SdQuery:
    """Parse the pairs of a query string but for `wait`.

    Raises BadQuery for an unknown name or value: ignoring a slip would hand out every target.
    """
    given: dict[str, list[str]] = {name: [] for name in PARAMETERS}
    for name, value in pairs:
        if name not in given:
            raise BadQuery(f"the parameters are {', '.join(PARAMETERS)}")
        given[name].append(value)
    if not set(given["kind"]) <= set(TARGET_KINDS):
        raise BadQuery(f"kind is one of {', '.join(TARGET_KINDS)}")
    names = _only(given, "labels")
    if names is not None and names not in set(LabelNames):
        raise BadQuery(f"labels is one of {', '.join(LabelNames)}")
    kinds, namespaces, shard_paths = (frozenset(given[name]) for name in FILTERS)
    part = _part(_only(given, "shard"), _only(given, "of"))
    return SdQuery(kinds, namespaces, shard_paths, LabelNames(names or LabelNames.CONSUL), part)


def parse_wait(values: Iterable[str]) -> float:
    """Return the seconds of `wait`, 0 if it is not given; raises BadQuery."""
    text = _only({"wait": list(values)}, "wait")
    if text is None:
        return 0.0
    match = _WAIT.fullmatch(text)
    if match is None or float(match[1]) > LONGEST_WAIT:
        raise BadQuery(f"wait is a number of seconds such as 25s, at most {LONGEST_WAIT:g}")
    return float(match[1])


def _only(given: dict[str, list[str]], name: str) -> str | None:
    """Return the value of a parameter that may be given once, None if it is not given."""
    values = given[name]
    if len(values) > 1:
        raise BadQuery(f"{name} is given more than once")
    return values[0] if values else None


def _part(number: str | None, of: str | None) -> Part | None:
    if number is None and of is None:
        return None
    if number is None or of is None:
        raise BadQuery("shard and of need each other, such as shard=0&of=3")
    if not _NUMBER.fullmatch(of) or not 1 <= int(of) <= MOST_SHARDS:
        raise BadQuery(f"of is the number of shards, 1 to {MOST_SHARDS}")
    if not _NUMBER.fullmatch(number) or int(number) >= int(of):
        raise BadQuery("shard is a number from 0, less than of")
    return Part(int(number), int(of))


@dataclass(slots=True)
class GroupEncoder:
    """Encodes targets as groups of Prometheus' HTTP service discovery (docs/http_sd), one group a target.

    `target_labels` are the labels that a Pod's annotations may set. With `pods_elsewhere` the address and port
    of a Pod's target are not its own.
    """

    meta_keys: MetaKeys = field(default_factory=MetaKeys)
    annotation_prefix: str = "prometheus.io/"
    target_labels: frozenset[str] = frozenset()
    pods_elsewhere: bool = False
    _known: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _formats: Formats = field(default_factory=Formats)

    def encode(self, target: TargetRow, names: LabelNames = LabelNames.CONSUL) -> Group:
        """Encode one target."""
        service = target.service
        address = socket_address(service.address, service.port)
        shared, own = self._formats.divide(address, self.labels(target, names))
        return Group(service.id, target.key, service.value("shard_path"), shared, own)

    def labels(self, target: TargetRow, names: LabelNames = LabelNames.CONSUL) -> dict[str, str]:
        """Return the labels of one target."""
        service, known = target.service, self._known
        labels = {} if names is LabelNames.KUBERNETES else _of_service(service)
        first = 1 if names is LabelNames.KUBERNETES else 0
        for key, value in service.meta:
            for label in (known.get(key) or self._labels_of(key))[first:]:
                labels[label] = value
        if names is not LabelNames.CONSUL:
            labels.update(self._kubernetes(target))
        if names is LabelNames.KUBERNETES and target.key.kind is Kind.NODE:
            labels["instance"] = target.key.name
        return labels

    def _labels_of(self, key: str) -> tuple[str, ...]:
        """Return the label that consul_sd gives to a meta key, and the one that Prometheus itself reads."""
        labels = [_META + _as_label(self.meta_keys.wire(key))]
        if key in _SCRAPE:
            labels.append(_SCRAPE[key])
        elif key.startswith(PARAM_PREFIX):
            labels.append(f"__{_as_label(key)}")
        elif (
            key.startswith(TARGET_PREFIX) and (name := key.removeprefix(TARGET_PREFIX)) in self.target_labels
        ):
            labels.append(name)
        if len(self._known) >= _MOST_KEYS:
            self._known.clear()
        found = self._known[key] = tuple(labels)
        return found

    def _kubernetes(self, target: TargetRow) -> Iterator[tuple[str, str]]:
        """Yield the labels that kubernetes_sd would give with the role of the target's kind, as far as known."""
        meta, is_pod = dict(target.service.meta), target.key.kind is Kind.POD
        names = _OF_ENDPOINT if target.key.kind is Kind.ENDPOINT else _OF_NODE
        known = {name: meta[key] for key, name in names.items() if key in meta}
        if is_pod:
            known |= {name: meta[key] for key, name in _OF_POD.items() if key in meta}
            known["pod_phase"] = "Running"
            if self.pods_elsewhere:
                known["pod_host_ip"] = target.service.address
            else:
                known["pod_ip"] = target.service.address
                known["pod_container_port_number"] = str(target.service.port)
        if target.key.kind is not Kind.NODE:
            of = "pod" if is_pod else "service"
            for key, value in self._annotations(target, meta):
                name = _as_label(self.annotation_prefix + key)
                known |= {f"{of}_annotation_{name}": value, f"{of}_annotationpresent_{name}": "true"}
        for key, value in meta.items():
            for prefix, start in _PREFIXES.items():
                if key.startswith(prefix):
                    name = key.removeprefix(prefix)
                    known |= {f"{start}_{name}": value, f"{start}present_{name}": "true"}
        if target.service.ready is not None and is_pod:
            known["pod_ready"] = str(target.service.ready).lower()
        for name, value in known.items():
            yield _KUBERNETES + name, value

    def _annotations(self, target: TargetRow, meta: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Yield the annotations that lead to this scrape, by their names after the prefix."""
        yield "scrape", "true"
        yield "port", str(target.service.port)
        for key, name in _ANNOTATIONS.items():
            if key in meta:
                yield name, meta[key]
        for key, value in meta.items():
            if key.startswith(PARAM_PREFIX):
                yield f"param-{key.removeprefix(PARAM_PREFIX)}", value


def _of_service(service: Service) -> dict[str, str]:
    """Return the labels that consul_sd gives to a service without its meta."""
    labels = {
        "__meta_consul_service": service.name,
        "__meta_consul_service_id": service.id,
        "__meta_consul_service_address": service.address,
        "__meta_consul_service_port": str(service.port),
    }
    if service.tags:
        labels["__meta_consul_tags"] = f",{','.join(service.tags)},"
    return labels


def _as_label(text: str) -> str:
    """Replace what the name of a label cannot have, as Prometheus does: one bad name fails its whole refresh."""
    return _NOT_IN_A_LABEL.sub("_", text)


def _marked(*values: str | Mapping[str, str]) -> bytes:
    """Return values as JSON, each between two marks."""
    try:
        encoded = tuple(map(_encoder.encode, values))
    except UnicodeEncodeError:
        encoded = tuple(map(_json, values))
    return _TEMPLATES[len(encoded)] % encoded


def _json(value: str | Mapping[str, str]) -> bytes:
    try:
        return _encoder.encode(value)
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8; JSON can spell it
        return json.dumps(value).encode()
