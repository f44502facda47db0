"""Records cut out of lists that arrive in pieces."""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k8s_consul_registrar.consul.records import (
    ARRAY,
    DEEPEST_RECORD,
    LONG_RECORD,
    LONGEST_HEAD,
    LONGEST_RECORD,
    NODE_SERVICES,
    Records,
)
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
def test_list_cut_short_is_an_error(size: int) -> None:
    """No beginning of a list passes for the list."""
    body = node_services([{"ID": "a", "Meta": {"x": "}"}}, {"ID": "b"}], None).rstrip()
    for end in range(len(body)):
        with pytest.raises(ConsulRefused):
            cut(body[:end], size, Records(NODE_SERVICES, b"}"))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"<html>", b'{"Services":{}}', b'{"Services":[1]}', b'{"Services":null,"x":1}']
)
def test_something_else_is_an_error(body: bytes) -> None:
    """An answer that Consul would not send is no empty list."""
    with pytest.raises(ConsulRefused):
        cut(body, 10, Records(NODE_SERVICES, b"}"))


def test_body_without_a_list_is_given_up_early() -> None:
    """A body without a list is given up before it is large."""
    records = Records(NODE_SERVICES, b"}")
    assert list(records.feed(b"x" * LONGEST_HEAD)) == []
    with pytest.raises(ConsulRefused):
        list(records.feed(b"x"))


HOSTILE = ("},{", "}", "{", '"', "\\", '\\"', '"},{"', "}]}", "\n", '},{"ID":"x"},{')


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("size", [997, 65536])
def test_hostile_tag_is_read_in_linear_time(unit: str, size: int) -> None:
    """A long tag full of what looks like JSON costs no more than its bytes, and is read as it was sent."""
    tag = unit * (2_000_000 // len(unit)) if size > 1000 else unit * (300_000 // len(unit))
    services: list[dict[str, object]] = [{"ID": "a", "Tags": [tag]}, {"ID": "b"}, {"ID": "c", "Tags": [tag]}]
    body = node_services(services, None)
    began = time.process_time()
    found = cut(body, size, Records(NODE_SERVICES, b"}"))
    assert time.process_time() - began < 5, "11 s for 300 KB before, and minutes for this"
    assert [json.loads(one) for one in found] == services


def test_many_hostile_records_are_read_in_linear_time() -> None:
    """Short ones too."""
    services: list[dict[str, object]] = [{"ID": str(n), "Tags": ["},{" * (n % 9)]} for n in range(20_000)]
    found = cut(node_services(services, None), 65536, Records(NODE_SERVICES, b"}"))
    assert [json.loads(one) for one in found] == services


TRICKY = st.lists(st.sampled_from(HOSTILE), max_size=12).map("".join)


@settings(deadline=None)
@given(st.lists(st.lists(TRICKY, max_size=3), max_size=6), st.integers(0, 2**32))
def test_tricky_records_come_out_whole_however_they_are_cut(tags: list[list[str]], seed: int) -> None:
    """Pieces of any size, down to single bytes."""
    services: list[dict[str, object]] = [{"ID": str(n), "Tags": one} for n, one in enumerate(tags)]
    pick = random.Random(seed)
    body = node_services(services, pick.choice([None, 2]))
    assert [json.loads(one) for one in cut(body, 1, Records(NODE_SERVICES, b"}"))] == services
    records, start = Records(NODE_SERVICES, b"}"), 0
    found: list[bytes] = []
    while start < len(body):
        end = start + pick.randint(0, 40)
        found += records.feed(body[start:end])
        start = end
    found += records.finish()
    assert [json.loads(one) for one in found] == services


@pytest.mark.parametrize("filler", ["x" * LONG_RECORD, "},{" * 10])
@pytest.mark.parametrize("size", [1000, 65536])
def test_list_of_hostile_records_cut_short_is_an_error(filler: str, size: int) -> None:
    """Wherever it ends, and whatever stands in place of the comma."""
    body = node_services([{"ID": "a", "T": filler}, {"ID": "b", "T": filler}], None).rstrip()
    middle = body.index(b'},{"ID":"b"') + 1
    for end in (middle, middle + 1, middle + 2, len(body) - 1, len(body) - 2, len(body) - 3):
        with pytest.raises(ConsulRefused):
            cut(body[:end], size, Records(NODE_SERVICES, b"}"))
    for junk in (b"", b";", b",,", b",1,", b"]"):
        with pytest.raises(ConsulRefused):
            cut(body[:middle] + junk + body[middle + 1 :], size, Records(NODE_SERVICES, b"}"))
    with pytest.raises(ConsulRefused):
        cut(body.replace(b"]}", b",]}"), size, Records(NODE_SERVICES, b"}"))


@pytest.mark.parametrize("brackets", ["[]", "{}", "[}"])
@pytest.mark.parametrize("depth", [DEEPEST_RECORD, 100_000])
def test_deep_nesting_is_an_error(brackets: str, depth: int) -> None:
    """It ends neither our stack nor the program."""
    opening = brackets[0] if brackets[0] == "[" else '{"a":'
    deep = opening * depth + "1" + brackets[1] * depth
    body = f'{{"Node":null,"Services":[{{"ID":"a","x":{deep},"T":"{"y" * LONG_RECORD}"}}]}}'.encode()
    for size in (4096, len(body)):
        with pytest.raises(ConsulRefused):
            cut(body, size, Records(NODE_SERVICES, b"}"))


@pytest.mark.parametrize("start", [b"[", b'[{"a":"', b"[{}", b"[{},", b"null", b"[1"])
def test_record_without_end_is_given_up(start: bytes) -> None:
    """The bytes gathered of one record, or after the list, have a bound."""
    with pytest.raises(ConsulRefused):
        cut(start + b" " * (LONGEST_RECORD + 65536), 65536, Records(ARRAY))
