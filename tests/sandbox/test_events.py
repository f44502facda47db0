"""Events of the sandbox's API server: it takes and refuses what a real one does."""

import copy
from typing import Any

import pytest

from k8s_consul_registrar.sandbox.api_errors import ApiError
from k8s_consul_registrar.sandbox.event_rules import validate_event_update, validate_new_event

EVENT: dict[str, Any] = {
    "metadata": {"name": "web-1.17f0a", "namespace": "shop"},
    "eventTime": "2026-11-28T12:00:00.000000Z",
    "reportingController": "example.com/registrar",
    "reportingInstance": "registrar-0",
    "action": "Resolve",
    "reason": "ScrapeRejected",
    "regarding": {"kind": "Pod", "namespace": "shop", "name": "web-1"},
    "note": "x" * 1024,
    "type": "Warning",
}
SERIES = {"count": 2, "lastObservedTime": "2026-11-28T12:00:01.000000Z"}


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the Event with another value at a path."""
    event = copy.deepcopy(EVENT)
    *parents, last = path.split(".")
    inner = event
    for part in parents:
        inner = inner[part]
    inner[last] = value
    return event


def test_event_that_follows_the_rules_is_taken() -> None:
    """As it is, with a series, and about a Node in the namespace default."""
    node = changed("regarding", {"kind": "Node", "name": "node-a"})
    node["metadata"]["namespace"] = "default"
    for event in (EVENT, changed("series", SERIES), node):
        validate_new_event(event["metadata"]["name"], event)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "Web-1"),
        ("metadata.name", "w" * 254),
        ("eventTime", None),
        ("eventTime", "2026-11-28T12:00:00Z"),
        ("eventTime", "2026-11-28T12:00:00.000Z"),
        ("reportingController", ""),
        ("reportingController", "not qualified"),
        ("reportingInstance", ""),
        ("reportingInstance", "i" * 129),
        ("action", ""),
        ("reason", ""),
        ("reason", "r" * 129),
        ("note", "é" * 513),
        ("type", "Error"),
        ("regarding", {"kind": "Node", "name": "node-a"}),
        ("deprecatedCount", 1),
        ("series", {**SERIES, "count": 1}),
        ("series", {**SERIES, "lastObservedTime": "2026-11-28T12:00:01Z"}),
    ],
)
def test_event_that_breaks_a_rule_is_refused(path: str, value: Any) -> None:
    """Each field has its rule, lengths count bytes, and times have microseconds."""
    event = changed(path, value)
    with pytest.raises(ApiError) as caught:
        validate_new_event(event["metadata"]["name"], event)
    assert caught.value.code in (400, 422)


@pytest.mark.parametrize(
    "field", ["note", "reason", "action", "type", "eventTime", "regarding", "reportingInstance"]
)
def test_event_changes_in_nothing_but_its_series(field: str) -> None:
    """An update of anything else is refused."""
    validate_event_update(EVENT, {**EVENT, "series": SERIES})
    with pytest.raises(ApiError, match=field):
        validate_event_update(EVENT, {**EVENT, field: "another"})
