"""Service names and tags, made of templates: text with fields in braces, such as `{cluster}-pods`."""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.targets.reasons import Reason, Rejected, quoted

SHARD = "shard_path"
# The shard is chosen only when a service is made of a target; until then its field stands for itself.
SHARD_PLACEHOLDER = f"{{{SHARD}}}"

_EVERY_KIND = frozenset({"cluster", "node", "node_ip", "kind", SHARD})
FIELDS: Mapping[Kind, AbstractSet[str]] = {
    Kind.POD: _EVERY_KIND | {"namespace", "pod"},
    Kind.NODE: _EVERY_KIND,
}
ALL_FIELDS = FIELDS[Kind.POD] | FIELDS[Kind.NODE]

_PART = re.compile(r"\{([^{}]*)\}|([^{}]+)|(.)", re.DOTALL)
# Kubernetes, "Labels and Selectors": an optional DNS subdomain and a slash, then a name of at most 63.
_LABEL = re.compile(r"(?:(?=.{1,253}/)[a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")

# Consul sets no limit of its own to a name (over 63 bytes its DNS does not find it, which its agent only
# warns of: agent/agent.go, validateService). The default name reaches 323: 7 characters, a namespace of 63
# and a Pod of 253. 512 is what Consul allows a value of meta.
LONGEST_NAME = 512
LONGEST_TAG = 512
# Prometheus and others ask for `/v1/health/service/<name>` and do not escape it: the unreserved characters
# of a URL (RFC 3986, 2.3), and the colon of an IPv6 address.
_NAME = re.compile(r"[A-Za-z0-9._~:-]*")
# The name under which Consul's servers are found.
RESERVED_NAMES = frozenset({"consul"})

DEFAULT_POD_NAME = "pod--{namespace}--{pod}"
DEFAULT_NODE_NAME = "node--{node_ip}"


class Field(NamedTuple):
    """A place in a template; `label` is the key of an object's label where the name is `label`."""

    name: str
    label: str = ""

    def __str__(self) -> str:
        return f"{{{self.name}:{self.label}}}" if self.label else f"{{{self.name}}}"


class Subject(msgspec.Struct, frozen=True, gc=False):
    """What the fields of a template are filled with: the values of one object, and its labels."""

    values: Mapping[str, str]
    labels: Mapping[str, str] = {}

    def value(self, place: Field) -> str:
        """Return what a field stands for, empty when the object has no such thing."""
        if place.label:
            return self.labels.get(place.label, "")
        return SHARD_PLACEHOLDER if place.name == SHARD else self.values.get(place.name, "")


class EmptyField(Exception):
    """A field of a template has no value for this object."""

    def __init__(self, place: Field) -> None:
        super().__init__(f"{place} is empty")


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template: literal text and fields in turn."""

    parts: tuple[str | Field, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields in the order they are written."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def literal(self) -> str:
        """The text outside the fields."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def has_shard(self) -> bool:
        """Whether a shard path is part of it."""
        return any(place.name == SHARD for place in self.fields)

    def render(self, subject: Subject) -> str:
        """Fill in every field but the shard, which `with_shard` does; raises `EmptyField`."""
        texts = [part if isinstance(part, str) else subject.value(part) for part in self.parts]
        if "" in texts:
            raise EmptyField(next(place for place in self.fields if not subject.value(place)))
        return "".join(texts)


def parse_template(text: str, known: AbstractSet[str] = ALL_FIELDS) -> Template:
    """Read a template once; raises ValueError, fit for an operator, for a brace or a field that is wrong."""
    parts: list[str | Field] = []
    for match in _PART.finditer(text):
        inside, literal, stray = match.groups()
        if stray is not None:
            raise ValueError(f"{text!r} has a '{stray}' without its counterpart")
        parts.append(literal if inside is None else _field(inside, known))
    return Template(tuple(parts))


def is_label_key(text: str) -> bool:
    """Whether a text can be the key of a label in Kubernetes."""
    return _LABEL.fullmatch(text) is not None


def with_shard(text: str, shard: str) -> str:
    """Fill in the shard, the last field that is known."""
    return text.replace(SHARD_PLACEHOLDER, shard)


def _field(text: str, known: AbstractSet[str]) -> Field:
    name, colon, label = text.partition(":")
    if name == "label" and colon:
        if not is_label_key(label):
            raise ValueError(f"{{{text}}} does not name a label as Kubernetes has them")
        return Field(name, label)
    if text not in known:
        choices = ", ".join(f"{{{one}}}" for one in sorted(known))
        raise ValueError(f"{{{text}}} is none of {choices} and {{label:…}}")
    return Field(text)


def parse_name(text: str, kind: Kind) -> Template:
    """Read the template of a service name; raises ValueError, fit for an operator.

    It begins with text of its own or with the cluster: a name made only of what the objects are called
    would let whoever may create a Pod choose among all service names.
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
    """Read the template of a tag; raises ValueError, fit for an operator."""
    template = parse_template(text)
    if not template.literal.isprintable() or len(template.literal.encode()) > LONGEST_TAG:
        raise ValueError(f"{text[:40]!r} is over {LONGEST_TAG} bytes or not printable")
    return template


def is_fit_for_name(text: str) -> bool:
    """Whether a text may be part of a service name."""
    return _NAME.fullmatch(text) is not None


def service_name(template: Template, subject: Subject, longest_shard: int) -> str:
    """Return an object's service name, the shard still to be filled in (`sharded_name`).

    `longest_shard` is how many bytes the longest shard path has. Raises `Rejected` for a name that is
    empty in one of its fields, too long, or of characters that Consul's readers do not escape.
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
    """Return an object's tags, sorted, without repeats and without those that have nothing to say.

    A tag one of whose fields is empty (a namespace, for a Node) says nothing. Raises `Rejected` for one
    that is too long or not printable.
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
    """Return the name with its shard."""
    return with_shard(name, shard)


def sharded_tags(tags: Sequence[str], shard: str) -> tuple[str, ...]:
    """Return the tags with their shard, sorted and without repeats; without a shard those about it go."""
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
