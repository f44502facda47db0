"""Service IDs, shard paths, and names and tags made of templates such as `{cluster}-pods`."""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple, Protocol

import msgspec

from k8s_consul_registrar.errors import Reason, Rejected, quoted
from k8s_consul_registrar.model import Kind, ObjectKey

# IDs have the format of the original program.
POD_PREFIX = "pod--"
NODE_PREFIX = "node--"
ENDPOINT_PREFIX = "svc--"

SHARD = "shard_path"
# The shard is chosen when a target becomes a service; until then its field stays in the text.
SHARD_PLACEHOLDER = f"{{{SHARD}}}"

_EVERY_KIND = frozenset({"cluster", "node", "kind", SHARD})
FIELDS: Mapping[Kind, AbstractSet[str]] = {
    Kind.POD: _EVERY_KIND | {"namespace", "node_ip", "pod"},
    Kind.NODE: _EVERY_KIND | {"node_ip"},
    Kind.ENDPOINT: _EVERY_KIND | {"namespace", "pod", "service"},
}
ALL_FIELDS = frozenset().union(*FIELDS.values())

_COUNT = re.compile(r"[0-9]{1,3}")
_PART = re.compile(r"\{([^{}]*)\}|([^{}]+)|(.)", re.DOTALL)
# Kubernetes, "Labels and Selectors": an optional DNS subdomain and a slash, then a name of at most 63.
_LABEL = re.compile(r"(?:(?=.{1,253}/)[a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")

# Consul does not limit the length of a name; over 63 bytes its DNS does not find the service and the agent
# logs a warning (agent/agent.go, validateService). The default name has up to 323 bytes: 7, plus 63 of a
# namespace and 253 of a Pod. 512 is Consul's limit for a meta value.
LONGEST_NAME = 512
LONGEST_TAG = 512
# Prometheus and others request `/v1/health/service/<name>` without escaping the name, so only the unreserved
# characters of a URL (RFC 3986, 2.3) and the colon of IPv6 addresses are allowed.
_NAME = re.compile(r"[A-Za-z0-9._~:-]*")
# Consul's own servers are registered under this name.
RESERVED_NAMES = frozenset({"consul"})

DEFAULT_POD_NAME = "pod--{namespace}--{pod}"
DEFAULT_NODE_NAME = "node--{node_ip}"
DEFAULT_ENDPOINT_NAME = "svc--{namespace}--{service}"


# Every object is hashed once for each bucket, so their number is bounded.
MOST_BUCKETS = 64


class Field(NamedTuple):
    """A field of a template; `label` is the label's key in `{label:key}`, `buckets` their number in `{bucket:8}`."""

    name: str
    label: str = ""
    buckets: int = 0

    def __str__(self) -> str:
        detail = self.label or (str(self.buckets) if self.buckets else "")
        return f"{{{self.name}:{detail}}}" if detail else f"{{{self.name}}}"


class Subject(msgspec.Struct, frozen=True, gc=False):
    """The values and labels of one object that fill in a template, and the ID that determines its bucket."""

    values: Mapping[str, str]
    labels: Mapping[str, str] = {}
    id: str = ""

    def value(self, place: Field) -> str:
        """Return the value of a field, empty if the object has none."""
        if place.label:
            return self.labels.get(place.label, "")
        if place.buckets:
            return str(bucket_of(self.id, place.buckets))
        return SHARD_PLACEHOLDER if place.name == SHARD else self.values.get(place.name, "")


class EmptyField(Exception):
    """A field of a template has no value for this object."""

    def __init__(self, place: Field) -> None:
        super().__init__(f"{place} is empty")


class Template(msgspec.Struct, frozen=True):
    """A parsed template: literal texts and fields, in order."""

    parts: tuple[str | Field, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields, in order."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def literal(self) -> str:
        """The text outside the fields."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def has_shard(self) -> bool:
        """True if the template has a shard path."""
        return any(place.name == SHARD for place in self.fields)

    def render(self, subject: Subject) -> str:
        """Fill in every field except the shard (see `with_shard`); raises `EmptyField`."""
        texts = [part if isinstance(part, str) else subject.value(part) for part in self.parts]
        if "" in texts:
            raise EmptyField(next(place for place in self.fields if not subject.value(place)))
        return "".join(texts)


def parse_template(text: str, known: AbstractSet[str] = ALL_FIELDS) -> Template:
    """Parse a template; raises ValueError, worded for an operator, for a stray brace or an unknown field."""
    parts: list[str | Field] = []
    for match in _PART.finditer(text):
        inside, literal, stray = match.groups()
        if stray is not None:
            raise ValueError(f"{text!r} has a '{stray}' without its counterpart")
        parts.append(literal if inside is None else _field(inside, known))
    return Template(tuple(parts))


def is_label_key(text: str) -> bool:
    """Return whether Kubernetes accepts a text as the key of a label."""
    return _LABEL.fullmatch(text) is not None


def with_shard(text: str, shard: str) -> str:
    """Fill in the shard."""
    return text.replace(SHARD_PLACEHOLDER, shard)


def _field(text: str, known: AbstractSet[str]) -> Field:
    name, colon, label = text.partition(":")
    if name == "label" and colon:
        if not is_label_key(label):
            raise ValueError(f"{{{text}}} does not name a label as Kubernetes has them")
        return Field(name, label)
    if name == "bucket" and colon:
        if not _COUNT.fullmatch(label) or not 1 <= int(label) <= MOST_BUCKETS:
            raise ValueError(f"{{{text}}} does not name a number of buckets, 1 to {MOST_BUCKETS}")
        return Field(name, buckets=int(label))
    if text not in known:
        choices = ", ".join(f"{{{one}}}" for one in sorted(known))
        raise ValueError(f"{{{text}}} is none of {choices}, {{bucket:…}} and {{label:…}}")
    return Field(text)


def parse_name(text: str, kind: Kind) -> Template:
    """Parse the template of a service name; raises ValueError, worded for an operator.

    A name must begin with literal text or the cluster. Otherwise a user who may create Pods could choose any
    service name.
    """
    template = parse_template(text, FIELDS[kind])
    if not template.parts or not (isinstance(first := template.parts[0], str) or first.name == "cluster"):
        raise ValueError(f"{text!r} must begin with text or {{cluster}}")
    if not is_fit_for_name(template.literal):
        raise ValueError(f"{text!r} has characters other than letters, digits, '.', '_', '~', ':' and '-'")
    if len(template.literal) > LONGEST_NAME:
        raise ValueError(f"is over {LONGEST_NAME} characters")
    return template


def parse_tag(text: str) -> Template:
    """Parse the template of a tag; raises ValueError, worded for an operator."""
    template = parse_template(text)
    if not template.literal.isprintable() or len(template.literal.encode()) > LONGEST_TAG:
        raise ValueError(f"{text[:40]!r} is over {LONGEST_TAG} bytes or not printable")
    return template


def is_fit_for_name(text: str) -> bool:
    """Return whether all characters of a text are allowed in a service name."""
    return _NAME.fullmatch(text) is not None


def service_name(template: Template, subject: Subject, longest_shard: int) -> str:
    """Return an object's service name, in which `sharded_name` has yet to fill in the shard.

    `longest_shard` is the length of the longest shard path in bytes. Raises `Rejected` if a field is empty or
    the name is too long, reserved, or has characters that Consul's clients do not escape.
    """
    try:
        name = template.render(subject)
    except EmptyField as empty:
        raise Rejected(Reason.EMPTY_NAME, f"the service name needs a value where {empty}") from None
    fixed = with_shard(name, "")
    if not is_fit_for_name(fixed) or name.lower() in RESERVED_NAMES:
        raise Rejected(
            Reason.INVALID_NAME, f"the service name {quoted(name)} is not one that can be looked up"
        )
    if _size(name, longest_shard) > LONGEST_NAME:
        raise Rejected(Reason.NAME_TOO_LONG, f"the service name {quoted(name)} is over {LONGEST_NAME} bytes")
    return name


def service_tags(templates: Sequence[Template], subject: Subject, longest_shard: int) -> tuple[str, ...]:
    """Return an object's tags, sorted and without repeats.

    A tag with an empty field is left out (a namespace, for a Node). Raises `Rejected` for a tag that is too
    long or not printable.
    """
    if not templates:
        return ()
    tags: set[str] = set()
    for template in templates:
        try:
            tag = template.render(subject)
        except EmptyField:
            continue
        if not tag.isprintable() or _size(tag, longest_shard) > LONGEST_TAG:
            raise Rejected(
                Reason.INVALID_TAG, f"the tag {quoted(tag)} is over {LONGEST_TAG} bytes or not printable"
            )
        tags.add(tag)
    return tuple(sorted(tags - {""}))


def sharded_name(name: str, shard: str) -> str:
    """Return a service name with its shard filled in."""
    return with_shard(name, shard)


def sharded_tags(tags: Sequence[str], shard: str) -> tuple[str, ...]:
    """Return the tags with their shard filled in; without a shard, tags that contain it are left out."""
    if not tags or not any(SHARD_PLACEHOLDER in tag for tag in tags):
        return tuple(tags)
    kept = (tag for tag in tags if shard or SHARD_PLACEHOLDER not in tag)
    return tuple(sorted({with_shard(tag, shard) for tag in kept}))


def _size(text: str, longest_shard: int) -> int:
    shards = text.count(SHARD_PLACEHOLDER)
    size = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    return size + shards * (longest_shard - len(SHARD_PLACEHOLDER))


POD_NAME = parse_name(DEFAULT_POD_NAME, Kind.POD)
NODE_NAME = parse_name(DEFAULT_NODE_NAME, Kind.NODE)
ENDPOINT_NAME = parse_name(DEFAULT_ENDPOINT_NAME, Kind.ENDPOINT)


def pod_service_id(namespace: str, name: str, prefix: str = "") -> str:
    """Return the service ID of a Pod, which two Pods can share: `a` with `b--c`, and `a--b` with `c`."""
    return f"{prefix}{POD_PREFIX}{namespace}--{name}"


def pod_port_id(service_id: str, port: str) -> str:
    """Return the service ID of another port of the Pod whose first port has `service_id`."""
    return f"{service_id}--{port}"


def node_service_id(address: str, prefix: str = "") -> str:
    """Return the service ID of the Node at this address."""
    return f"{prefix}{NODE_PREFIX}{address}"


# Paths that a kubelet's `nodes/metrics` permission covers (pkg/kubelet/server/auth.go), and their names in the IDs of
# further services of a Node.
KUBELET_PATHS = ("/metrics/cadvisor", "/metrics", "/metrics/resource", "/metrics/probes")
_PATH_NAMES = dict(zip(KUBELET_PATHS, ("cadvisor", "kubelet", "resource", "probes"), strict=True))


def node_path_id(service_id: str, path: str) -> str:
    """Return the service ID of a further path of the Node whose first path has `service_id`."""
    return f"{service_id}--{_PATH_NAMES[path]}"


def endpoint_service_id(key: ObjectKey, which: str, port: str, prefix: str = "") -> str:
    """Return the service ID of one port of an endpoint; `which` is its Pod's name, or its address."""
    return f"{prefix}{ENDPOINT_PREFIX}{key.namespace}--{key.name}--{which}--{port}"


def kind_of_id(service_id: str) -> Kind | None:
    """Return the kind that the prefix of an ID of the original program stands for, None if it has neither."""
    if service_id.startswith(POD_PREFIX):
        return Kind.POD
    if service_id.startswith(NODE_PREFIX):
        return Kind.NODE
    return None


def pod_of_id(service_id: str, namespace: str) -> ObjectKey | None:
    """Return the key of the Pod in a service ID; without the namespace an ID can be ambiguous."""
    prefix = f"{POD_PREFIX}{namespace}--"
    if namespace and service_id.startswith(prefix) and len(service_id) > len(prefix):
        return ObjectKey(Kind.POD, namespace, service_id[len(prefix) :])
    return None


class Shards(Protocol):
    """A strategy for choosing a service's shard path."""

    def choose(self, service_id: str, current: str) -> str:
        """Return the shard of a service whose shard is `current` now; empty if there are no shards."""


class RandomShards(msgspec.Struct, frozen=True):
    """Spreads new services evenly and lets each keep its shard as long as that path is configured.

    The choice depends only on the ID, not on chance: when a Consul agent restarts without its data, its
    services leave the catalog before their shards can be read, and they must return to the same shards.
    """

    paths: tuple[str, ...] = ()

    def choose(self, service_id: str, current: str) -> str:
        """Return `current` if it is still configured, otherwise one of the paths; empty if there are none."""
        return current if current in self.paths else HashShards(self.paths).choose(service_id, current)


class HashShards(msgspec.Struct, frozen=True):
    """Gives each service the shard that its ID determines, independent of the order of the paths.

    This is rendezvous hashing (Thaler and Ravishankar, 1998): every shard bids for the ID and the highest bid
    wins, so removing a shard moves only the services that were on it.
    """

    paths: tuple[str, ...] = ()

    def choose(self, service_id: str, current: str) -> str:  # noqa: ARG002 - only the ID decides
        """Return the path with the highest bid for this ID; empty if there are none."""
        if len(self.paths) < 2:
            return self.paths[0] if self.paths else ""
        return max(self.paths, key=lambda path: (_bid(path, service_id), path))


@lru_cache(maxsize=100_000)
def bucket_of(service_id: str, buckets: int) -> int:
    """Return the number of a service's bucket, below `buckets`: by rendezvous hashing, as of shard paths."""
    return int(HashShards(_numbers(buckets)).choose(service_id, ""))


@lru_cache(maxsize=64)
def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _bid(path: str, service_id: str) -> bytes:
    # Not hash(), which differs between processes. Neither text can contain NUL.
    return blake2b(f"{path}\0{service_id}".encode(), digest_size=8).digest()
