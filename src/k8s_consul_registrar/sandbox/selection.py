"""Label and field selectors (apimachinery `pkg/labels` and `pkg/fields`)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from k8s_consul_registrar.sandbox.api_errors import ApiError, bad_request
from k8s_consul_registrar.sandbox.resources import PODS, Resource
from k8s_consul_registrar.sandbox.store import Stored

Requirement = Callable[[Mapping[str, str]], bool]

_KEY = r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"
_EQUALITY = re.compile(rf"\s*({_KEY})\s*(==|=|!=)\s*({_VALUE})\s*")
_SET = re.compile(rf"\s*({_KEY})\s+(in|notin)\s*\(([^()]*)\)\s*")
_EXISTENCE = re.compile(rf"\s*(!?)\s*({_KEY})\s*")
_POD_FIELDS = frozenset({"metadata.name", "metadata.namespace", "status.phase", "spec.nodeName"})
_COMMON_FIELDS = frozenset({"metadata.name", "metadata.namespace"})


@dataclass(frozen=True, slots=True)
class Selection:
    """The objects of a resource that a request selects."""

    namespace: str = ""
    labels: tuple[Requirement, ...] = ()
    fields: tuple[Requirement, ...] = ()

    @property
    def is_everything(self) -> bool:
        """True if it leaves out no object."""
        return not (self.namespace or self.labels or self.fields)

    def matches(self, stored: Stored) -> bool:
        """Return True if the object is selected."""
        if self.namespace and stored.namespace != self.namespace:
            return False
        return all(holds(stored.labels) for holds in self.labels) and all(
            holds(stored.fields) for holds in self.fields
        )


def parse_labels(text: str) -> tuple[Requirement, ...]:
    """Return the requirements of a label selector; ApiError 400 if it cannot be parsed."""
    return tuple(_label_requirement(part, text) for part in _split(text)) if text.strip() else ()


def parse_fields(text: str, resource: Resource) -> tuple[Requirement, ...]:
    """Return the requirements of a field selector; ApiError 400 for a field that cannot be selected."""
    return tuple(_field_requirement(part, resource) for part in text.split(",") if part)


def _split(text: str) -> list[str]:
    """Split at the commas outside parentheses."""
    return re.split(r",(?![^(]*\))", text)


def _label_requirement(part: str, whole: str) -> Requirement:
    if match := _EQUALITY.fullmatch(part):
        return _equality(*match.groups())
    if match := _SET.fullmatch(part):
        key, operator, values = match.groups()
        chosen = frozenset(value.strip() for value in values.split(","))
        if operator == "in":
            return lambda labels: key in labels and labels[key] in chosen
        return lambda labels: labels.get(key) not in chosen
    if match := _EXISTENCE.fullmatch(part):
        is_absent, key = bool(match[1]), match[2]
        return lambda labels: (key in labels) is not is_absent
    raise _unparsable(whole)


def _equality(key: str, operator: str, value: str) -> Requirement:
    if operator == "!=":
        return lambda labels: labels.get(key) != value
    return lambda labels: labels.get(key) == value


def _field_requirement(part: str, resource: Resource) -> Requirement:
    match = re.fullmatch(r"([^=!]+)(==|=|!=)(.*)", part)
    if match is None:
        raise bad_request(f"invalid selector: '{part}'; can't understand '{part}'")
    key = match[1]
    if key not in (_POD_FIELDS if resource is PODS else _COMMON_FIELDS):
        raise bad_request(f"field label not supported: {key}")
    return _equality(key, match[2], match[3])


def _unparsable(text: str) -> ApiError:
    return bad_request(f"unable to parse requirement: cannot parse the label selector {text!r}")
