"""The sandbox's subset of Consul's filter expressions."""

from typing import Any

import pytest

from k8s_consul_registrar.sandbox.filters import FilterError, parse

FIELDS = frozenset(("ID", "Service", "Tags", "Meta", "Port"))
RECORD: dict[str, Any] = {
    "ID": "pod--a--b",
    "Service": "web",
    "Tags": ["cluster=lab", "x"],
    "Meta": {"cluster": "lab", "kind": "pod", "empty": ""},
    "Port": 9102,
}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('Meta.cluster == "lab"', True),
        ('Meta["cluster"] == "lab"', True),
        ("Meta.cluster == `lab`", True),
        ("Meta.cluster == lab", True),
        ('Meta.cluster != "lab"', False),
        ('Meta.absent == "lab"', False),
        ('Meta.absent != "lab"', True),
        ("Port == 9102", True),
        ('"x" in Tags', True),
        ('"y" not in Tags', True),
        ('Tags contains "cluster=lab"', True),
        ('Tags not contains "x"', False),
        ('"cluster" in Meta', True),
        ("Meta.empty is empty", True),
        ("Tags is not empty", True),
        ('ID matches "^pod--"', True),
        ('ID not matches "^pod--"', False),
        ('Service == "web" and Meta.kind == "node"', False),
        ('Service == "api" or Meta.kind == "pod"', True),
        ('not Service == "api"', True),
        ('not (Service == "web" or "x" in Tags)', False),
        ('Service == "api" and Service == "api" or Meta.kind == "pod"', True),
        ('Service == "api" and (Service == "api" or Meta.kind == "pod")', False),
        (r'ID != "a\"b"', True),
    ],
)
def test_expressions(expression: str, expected: bool) -> None:
    """Each operator decides as Consul's documentation says, with `and` binding closer than `or`."""
    assert parse(expression, FIELDS)(RECORD) is expected


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "Meta.cluster",
        "Meta.cluster ==",
        '(ID == "a"',
        'ID == "a" and',
        'Nope == "a"',
        "ID == (",
        "ID % 3",
    ],
)
def test_bad_expressions_are_refused(expression: str) -> None:
    """A text that is no expression, or names no field, is an error."""
    with pytest.raises(FilterError):
        parse(expression, FIELDS)
