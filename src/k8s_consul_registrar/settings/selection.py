"""Which objects count: kinds, namespaces, labels, annotations and addresses."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from k8s_consul_registrar.model import Kind, Source
from k8s_consul_registrar.settings.reader import Reader
from k8s_consul_registrar.targets.scrape_config import NODE_ADDRESS_TYPES

_KINDS = {"pods": Kind.POD, "nodes": Kind.NODE}
# Kubernetes, "Object Names and IDs": the names of namespaces are RFC 1123 labels.
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
# The same: a key's prefix is a DNS subdomain, its labels as above, at most 253 characters in all.
_PREFIX = re.compile(r"(?=.{1,253}/)[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*/")


@dataclass(frozen=True, slots=True)
class SelectionSettings:
    """What of a cluster is looked at; the label selectors are for the API server to read."""

    kinds: frozenset[Kind]
    namespaces: tuple[str, ...]
    pod_label_selector: str
    node_label_selector: str
    annotation_prefix: str
    node_address_types: tuple[str, ...]

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is listed, each by itself."""
        nodes = [Source(Kind.NODE)] if Kind.NODE in self.kinds else []
        pods = [Source(Kind.POD, namespace) for namespace in self.namespaces or ("",)]
        return (*nodes, *(pods if Kind.POD in self.kinds else ()))

    @property
    def selectors(self) -> Mapping[Kind, str]:
        """The label selector of each kind that has one."""
        selectors = {Kind.POD: self.pod_label_selector, Kind.NODE: self.node_label_selector}
        return {kind: text for kind, text in selectors.items() if text}

    @property
    def is_whole_cluster(self) -> bool:
        """Whether what is not seen here is nowhere in the cluster."""
        return self.kinds == frozenset(Kind) and not self.namespaces and not self.selectors


def read_selection(reader: Reader) -> SelectionSettings:
    """Read what is looked at; warns of what would have no effect or one too many."""
    settings = SelectionSettings(
        kinds=_kinds(reader),
        namespaces=namespaces(reader),
        pod_label_selector=selector(reader, "POD_LABEL_SELECTOR"),
        node_label_selector=selector(reader, "NODE_LABEL_SELECTOR"),
        annotation_prefix=annotation_prefix(reader),
        node_address_types=_address_types(reader),
    )
    for name, kind in (
        ("POD_LABEL_SELECTOR", Kind.POD),
        ("NAMESPACES", Kind.POD),
        ("NODE_LABEL_SELECTOR", Kind.NODE),
    ):
        if reader.is_set(name) and kind not in settings.kinds:
            reader.warnings.append(f"{name} has no effect: DISCOVER leaves out {kind}s")
    if settings.selectors and not reader.is_set("INSTANCE"):
        reader.warnings.append(
            "a label selector without INSTANCE: services of what it does not match are removed, even those "
            "another registrar of this cluster wrote"
        )
    return settings


def _kinds(reader: Reader) -> frozenset[Kind]:
    names = reader.entries("DISCOVER")
    if not reader.is_set("DISCOVER"):
        names = ("pods",) if reader.is_set("NAMESPACES") else tuple(_KINDS)
    elif not names:
        reader.problem("DISCOVER", "names no kind")
    for name in names:
        if name not in _KINDS:
            reader.problem("DISCOVER", f"{name!r} is none of {', '.join(_KINDS)}")
    return frozenset(_KINDS[name] for name in names if name in _KINDS)


def namespaces(reader: Reader) -> tuple[str, ...]:
    """Read the namespaces whose Pods count; none means all."""
    names = reader.entries("NAMESPACES")
    if reader.is_set("NAMESPACES") and not names:
        reader.problem("NAMESPACES", "names no namespace")
    for name in names:
        if not _NAMESPACE.fullmatch(name):
            reader.problem(
                "NAMESPACES", f"{name!r} is no namespace: lower-case letters, digits and '-', at most 63"
            )
    return names


def selector(reader: Reader, name: str) -> str:
    """Read a label selector."""
    text = reader.text(name)
    if not text.isprintable():
        reader.problem(name, "is not printable")
    return text


def annotation_prefix(reader: Reader) -> str:
    """Read what our annotations begin with."""
    text = reader.text("ANNOTATION_PREFIX")
    if not _PREFIX.fullmatch(text):
        reader.problem("ANNOTATION_PREFIX", f"{text!r} is not a DNS name in lower case and a slash")
    return text


def _address_types(reader: Reader) -> tuple[str, ...]:
    types = reader.entries("NODE_ADDRESS_TYPES")
    if not types:
        reader.problem("NODE_ADDRESS_TYPES", f"names none of {', '.join(NODE_ADDRESS_TYPES)}")
    for name in types:
        if name not in NODE_ADDRESS_TYPES:
            reader.problem("NODE_ADDRESS_TYPES", f"{name!r} is none of {', '.join(NODE_ADDRESS_TYPES)}")
    return types
