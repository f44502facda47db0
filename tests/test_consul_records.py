"""Records cut out of lists that arrive in pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.consul.records import ARRAY, LONGEST_HEAD, NODE_SERVICES, Records
from k8s_consul_registrar.errors import ConsulRefused

NASTY = '"},{"ID":"x"}]}\\"Services":[{'
TEXT = st.text(st.sampled_from('{}[],:" \\aé\n')) | st.just(NASTY)
VALUE = st.recursive(
    TEXT | st.integers() | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
RECORD = st.dictionaries(TEXT, VALUE, max_size=4)


def cut(body: bytes, size: int, records: Records) -> list[bytes]:
    """Feed a body in pieces of a size and return what comes out."""
    found: list[bytes] = []
    for start in range(0, len(body), size):
        found.extend(records.feed(body[start : start + size]))
    found.extend(records.finish())
    return found


def node_services(services: list[dict[str, object]] | None, indent: int | None) -> bytes:
    """Return a body as Consul writes it, pretty with an indent."""
    node = {"ID": "", "Node": "k8s-lab", "Meta": {"external-node": "true", "x": NASTY}}
    separators = None if indent else (",", ":")
    value = {"Node": node, "Services": services}
    return json.dumps(value, indent=indent, separators=separators).encode() + b"\n"


@given(st.lists(RECORD, max_size=5), st.integers(1, 300), st.sampled_from([None, 4]))
def test_every_record_comes_out_whole(
    records: list[dict[str, object]], size: int, indent: int | None
) -> None:
    """Whatever is in the records, however the body is cut, and pretty or not."""
    reader = Records(NODE_SERVICES, b"}")
    found = cut(node_services(records, indent), size, reader)
    assert [json.loads(one) for one in found] == records
    assert json.loads(reader.head.rstrip().removesuffix(b",") + b"}")["Node"]["Node"] == "k8s-lab"
    separators = None if indent else (",", ":")
    array = json.dumps(records, indent=indent, separators=separators).encode()
    assert [json.loads(one) for one in cut(array, size, Records(ARRAY))] == records


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_null_is_an_empty_list(size: int) -> None:
    """Go writes a list that was never made as null; its node may be null as well."""
    assert cut(node_services(None, None), size, Records(NODE_SERVICES, b"}")) == []
    reader = Records(NODE_SERVICES, b"}")
    assert cut(b'{"Node":null,"Services":null}', size, reader) == []
    assert reader.head == b'{"Node":null,'
    assert cut(b"null\n", size, Records(ARRAY)) == []


@pytest.mark.parametrize("size", [1, 50, 1000])
def test_a_list_cut_short_is_an_error(size: int) -> None:
    """No beginning of a list passes for the list."""
    body = node_services([{"ID": "a", "Meta": {"x": "}"}}, {"ID": "b"}], None).rstrip()
    for end in range(len(body)):
        with pytest.raises(ConsulRefused):
            cut(body[:end], size, Records(NODE_SERVICES, b"}"))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"<html>", b'{"Services":{}}', b'{"Services":[1]}', b'{"Services":null,"x":1}']
)
def test_something_else_is_an_error(body: bytes) -> None:
    """What Consul would not send is no empty list."""
    with pytest.raises(ConsulRefused):
        cut(body, 10, Records(NODE_SERVICES, b"}"))


def test_what_never_becomes_a_list_is_not_gathered_for_ever() -> None:
    """A body without a list is given up before it is large."""
    records = Records(NODE_SERVICES, b"}")
    assert list(records.feed(b"x" * LONGEST_HEAD)) == []
    with pytest.raises(ConsulRefused):
        list(records.feed(b"x"))
