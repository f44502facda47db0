"""Names and tags as the operator writes them: text with fields in braces, such as `{cluster}-pods`."""

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from k8s_consul_registrar.model import Kind

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
