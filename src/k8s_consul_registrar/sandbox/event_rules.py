"""The rules by which an API server takes Events of events.k8s.io/v1.

Source: kubernetes `pkg/apis/core/validation/events.go`; the strict times are those of `metav1.MicroTime`.
"""

import re
from collections.abc import Mapping
from typing import Any

from k8s_consul_registrar.sandbox import api_errors

MOST_WORD, MOST_NOTE = 128, 1024  # bytes
_TYPES = ("Normal", "Warning")
_QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")
_UNSET = ("deprecatedFirstTimestamp", "deprecatedLastTimestamp", "deprecatedCount", "deprecatedSource")
_FIXED = (
    *("regarding", "reason", "note", "type", "eventTime", "action", "related"),
    *("reportingController", "reportingInstance", *_UNSET),
)


def validate_new_event(name: str, event: dict[str, Any]) -> None:
    """Raise ApiError for an Event that an API server would not create."""
    regarding, namespace = event.get("regarding") or {}, event["metadata"].get("namespace", "")
    is_at_home = bool(regarding.get("namespace")) or namespace in ("default", "kube-system")
    rules = {
        "metadata.name": len(name) <= 253 and _SUBDOMAIN.fullmatch(name),
        "involvedObject.namespace": is_at_home,
        "reportingController": _QUALIFIED.fullmatch(event.get("reportingController") or ""),
        **{
            word: 0 < _size(event.get(word)) <= MOST_WORD
            for word in ("reportingInstance", "action", "reason")
        },
        "message": _size(event.get("note")) <= MOST_NOTE,
        "type": event.get("type") in _TYPES,
        **{field: not event.get(field) for field in _UNSET},
    }
    _require(name, rules)
    _require_time(event.get("eventTime"))
    _validate_series(name, event)


def validate_event_update(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ApiError for another version of an Event that an API server would not take: only its series changes."""
    name = old["metadata"]["name"]
    _require(name, {field: old.get(field) == new.get(field) for field in _FIXED})
    if old.get("series") != new.get("series"):
        _validate_series(name, new)


def _validate_series(name: str, event: dict[str, Any]) -> None:
    if (series := event.get("series")) is not None:
        _require(name, {"series.count": series.get("count", 0) >= 2})
        _require_time(series.get("lastObservedTime"))


def _require(name: str, rules: Mapping[str, object]) -> None:
    for field, is_kept in rules.items():
        if not is_kept:
            raise api_errors.invalid(
                "Event", name=name, field=field, cause="FieldValueInvalid", problem="Invalid value"
            )


def _require_time(given: object) -> None:
    if not isinstance(given, str) or not _MICRO_TIME.fullmatch(given):
        raise api_errors.bad_request(
            f'Event in version "v1" cannot be handled as a Event: {given!r} is no time'
        )


def _size(text: str | None) -> int:
    return len((text or "").encode())
