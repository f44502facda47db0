"""Decoding and validation of records, with Consul's texts (`agent/structs/structs.go`, `agent/agent_endpoint.go`).

Functions here raise RefusedError.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from k8s_consul_registrar.sandbox.consul_model import Json, Service, Weights

MOST_META_PAIRS = 64
LONGEST_META_KEY = 128
LONGEST_META_VALUE = 512  # bytes
ANY_ADDRESSES = frozenset({"0.0.0.0", "::", "[::]"})

_META_KEY = re.compile(r"[A-Za-z0-9_-]+")
_GO_KINDS = {str: "string", int: "number", float: "number", bool: "bool", list: "array", dict: "object"}


class RefusedError(ValueError):
    """A record, or a request, that Consul refuses."""


class HttpError(Exception):
    """A refusal by HTTP: a status and a text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def decode_object(body: bytes) -> Json:
    """Return a request's JSON object."""
    if not body:
        raise RefusedError("EOF")
    try:
        value = msgspec.json.decode(body)
    except msgspec.MsgspecError as error:
        raise RefusedError(f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RefusedError(f"json: cannot unmarshal {_go_kind(value)} into Go value of type map")
    return value


def service_of(fields: Mapping[str, Any], *, name_field: str, has_ports: bool = False) -> Service:
    """Return the service in a request; its name is in the field `Name` for agents, else in `Service`.

    `Ports` counts if the release has several ports for a service; `Port` is then 0.
    """
    name = text_field(fields, name_field)
    tags = _typed(fields, "Tags", list, "[]string")
    ports = (_typed(fields, "Ports", list, "structs.ServicePorts") or ()) if has_ports else ()
    return Service(
        id=text_field(fields, "ID") or name,
        name=name,
        address=text_field(fields, "Address"),
        port=0 if ports else _typed(fields, "Port", int, "int") or 0,
        ports=tuple(ports),
        tags=None if tags is None else tuple(_text(tag, "Tags") for tag in tags),
        meta=string_map(fields, "Meta"),
        tagged_addresses=_typed(fields, "TaggedAddresses", dict, "map[string]structs.ServiceAddress") or None,
        weights=_weights(fields),
        enable_tag_override=_typed(fields, "EnableTagOverride", bool, "bool") or False,
        namespace=text_field(fields, "Namespace"),
    )


def text_field(fields: Mapping[str, Any], name: str) -> str:
    """Return a field that is a text, empty when it is absent."""
    return str(_typed(fields, name, str, "string") or "")


def string_map(fields: Mapping[str, Any], name: str) -> dict[str, str] | None:
    """Return a field that maps texts to texts, sorted as by Go's encoder, or None when it is absent."""
    given = _typed(fields, name, dict, "map[string]string")
    if given is None:
        return None
    return {key: _text(given[key], name) for key in sorted(given)}


def check_meta(meta: Mapping[str, str] | None) -> None:
    """Raise RefusedError if Consul does not accept this metadata."""
    if not meta:
        return
    if len(meta) > MOST_META_PAIRS:
        raise RefusedError(f"Node metadata cannot contain more than {MOST_META_PAIRS} key/value pairs")
    for key, value in meta.items():
        if problem := _meta_problem(key, value):
            raise RefusedError(f"Couldn't load metadata pair ('{key}', '{value}'): {problem}")


def _meta_problem(key: str, value: str) -> str:
    if not key:
        return "Key cannot be blank"
    if not _META_KEY.fullmatch(key):
        return "Key contains invalid characters"
    if len(key) > LONGEST_META_KEY:
        return f"Key is too long (limit: {LONGEST_META_KEY} characters)"
    if key.startswith("consul-"):
        return "Key prefix 'consul-' is reserved for internal use"
    if len(value.encode()) > LONGEST_META_VALUE:
        return f"Value is too long (limit: {LONGEST_META_VALUE} characters)"
    return ""


def _typed(fields: Mapping[str, Any], name: str, kind: type, go_type: str) -> Any:
    """Return a field, or None when absent or null; RefusedError with Go's text when its type is wrong."""
    value = fields.get(name)
    is_right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if value is not None and not is_right:
        raise RefusedError(
            f"json: cannot unmarshal {_go_kind(value)} into Go struct field .{name} of type {go_type}"
        )
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RefusedError(
            f"json: cannot unmarshal {_go_kind(value)} into Go struct field .{field} of type string"
        )
    return value


def _weights(fields: Mapping[str, Any]) -> Weights:
    given = _typed(fields, "Weights", dict, "structs.Weights") or {}
    weights = Weights(Passing=given.get("Passing", 1) or 1, Warning=given.get("Warning", 1))
    return weights if weights.Warning else Weights(weights.Passing)


def _go_kind(value: Any) -> str:
    return _GO_KINDS.get(type(value), "null")
