"""Targets as groups of Prometheus' service discovery: which ones a query asks for, and their labels. Pure."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from k8s_consul_registrar.admin.view import Scope, TargetRow
from k8s_consul_registrar.consul.codec import MetaKeys
from k8s_consul_registrar.model import Kind

FILTERS = ("kind", "namespace", "shard_path")
# The names Prometheus' own consul_sd gives, so that one set of relabelling rules serves both
# (discovery/consul/consul.go).
_META = "__meta_consul_service_metadata_"
_NOT_IN_A_LABEL = re.compile(r"[^a-zA-Z0-9_]")


class BadQuery(ValueError):
    """A query that makes no sense; the text is fit for the client."""


@dataclass(frozen=True, slots=True)
class SdQuery:
    """The filters of a request; an empty filter lets everything pass, several values of one are alternatives."""

    kinds: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset()
    shard_paths: frozenset[str] = frozenset()

    @property
    def scope(self) -> Scope:
        """The kinds and namespaces that the document is about; any of them may have any shard path."""
        return Scope(self.kinds, self.namespaces)

    def matches(self, target: TargetRow) -> bool:
        """Return True if a target passes every filter."""
        return (
            (not self.kinds or target.key.kind in self.kinds)
            and (not self.namespaces or target.key.namespace in self.namespaces)
            and (not self.shard_paths or target.service.value("shard_path") in self.shard_paths)
        )


def parse_sd_query(pairs: Iterable[tuple[str, str]]) -> SdQuery:
    """Parse the pairs of a query string.

    Raises BadQuery for an unknown name or kind: ignoring a slip would hand out every target.
    """
    given: dict[str, set[str]] = {name: set() for name in FILTERS}
    for name, value in pairs:
        if name not in given:
            raise BadQuery(f"the filters are {', '.join(FILTERS)}")
        given[name].add(value)
    if not given["kind"] <= set(Kind):
        raise BadQuery(f"kind is one of {', '.join(Kind)}")
    return SdQuery(*(frozenset(given[name]) for name in FILTERS))


@dataclass(slots=True)
class GroupEncoder:
    """Encodes targets as groups of Prometheus' HTTP service discovery (docs/http_sd), one group a target."""

    meta_keys: MetaKeys = field(default_factory=MetaKeys)
    _labels: dict[str, str] = field(default_factory=dict)
    _json: msgspec.json.Encoder = field(default_factory=msgspec.json.Encoder)

    def append(self, target: TargetRow, to: bytearray) -> None:
        """Append one group and a comma."""
        group = {"targets": [socket_address(target)], "labels": self._labels_of(target)}
        try:
            to += self._json.encode(group)
        except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8; JSON can spell it
            to += json.dumps(group).encode()
        to += b","

    def _labels_of(self, target: TargetRow) -> dict[str, Any]:
        """Return the labels that consul_sd would give, and how to scrape as the labels Prometheus itself reads."""
        service = target.service
        labels = {
            "__meta_consul_service": service.name,
            "__meta_consul_service_id": service.id,
            "__meta_consul_service_address": service.address,
            "__meta_consul_service_port": str(service.port),
        }
        if service.tags:
            labels["__meta_consul_tags"] = f",{','.join(service.tags)},"
        for key, value in service.meta:
            labels[self._labels.get(key) or self._label(key)] = value
            if key == "metrics_path":
                labels["__metrics_path__"] = value
            elif key == "scheme":
                labels["__scheme__"] = value
            elif key.startswith("param_"):
                labels[f"__{_as_label(key)}"] = value
        return labels

    def _label(self, key: str) -> str:
        label = self._labels[key] = _META + _as_label(self.meta_keys.wire(key))
        return label


def socket_address(target: TargetRow) -> str:
    """Return `address:port`, with brackets around an IPv6 address."""
    address = target.service.address
    return f"[{address}]:{target.service.port}" if ":" in address else f"{address}:{target.service.port}"


def _as_label(text: str) -> str:
    """Replace what the name of a label cannot have, as Prometheus does: one bad name fails its whole refresh."""
    return _NOT_IN_A_LABEL.sub("_", text)
