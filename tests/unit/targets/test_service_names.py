"""Templates of names and tags are read once, with a clear word for what is wrong, and filled in."""

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.errors import Reason, Rejected
from k8s_consul_registrar.model import Kind
from k8s_consul_registrar.targets.service_names import (
    ALL_FIELDS,
    LONGEST_NAME,
    LONGEST_TAG,
    NODE_NAME,
    POD_NAME,
    EmptyField,
    Subject,
    parse_name,
    parse_tag,
    parse_template,
    service_name,
    service_tags,
    sharded_name,
    sharded_tags,
    with_shard,
)

SUBJECT = Subject(
    {
        "cluster": "lab",
        "kind": "pod",
        "namespace": "shop",
        "pod": "web-1",
        "node": "node-a",
        "node_ip": "192.0.2.10",
    },
    {"app": "web", "app.kubernetes.io/part-of": "shop", "empty": ""},
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pod--{namespace}--{pod}", "pod--shop--web-1"),
        ("{cluster}-pods", "lab-pods"),
        ("pods", "pods"),
        ("{cluster}{kind}.{node}:{node_ip}", "labpod.node-a:192.0.2.10"),
        ("x-{label:app}~{label:app.kubernetes.io/part-of}", "x-web~shop"),
        ("pods-{shard_path}", "pods-s1"),
    ],
)
def test_pod_names(text: str, name: str) -> None:
    """Every field is filled in, the shard last."""
    assert sharded_name(service_name(parse_name(text, Kind.POD), SUBJECT, 2), "s1") == name


def test_default_names() -> None:
    """The default templates are the names of the original program."""
    assert service_name(POD_NAME, SUBJECT, 0) == "pod--shop--web-1"
    assert service_name(NODE_NAME, SUBJECT, 0) == "node--192.0.2.10"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x{nope}", "{nope} is none of {cluster}"),
        ("x{}", "{} is none of"),
        ("x{Pod}", "{Pod} is none of"),
        ("x{label:}", "does not name a label"),
        ("x{label:a b}", "does not name a label"),
        ("x{label:-a}", "does not name a label"),
        ("x{label:a/b/c}", "does not name a label"),
        ("x{label}", "{label} is none of"),
        ("x{pod", "'{' without its counterpart"),
        ("x}pod", "'}' without its counterpart"),
        ("x{{pod}}", "without its counterpart"),
        ("{pod}", "must begin with text or {cluster}"),
        ("{label:app}-pods", "must begin with text or {cluster}"),
        ("{shard_path}-pods", "must begin with text or {cluster}"),
        ("", "must begin with text or {cluster}"),
        ("a b", "characters other than"),
        ("a/{pod}", "characters other than"),
        ("a?{pod}", "characters other than"),
        ("ä", "characters other than"),
        ("a\n", "characters other than"),
        ("a" * (LONGEST_NAME + 1), "is over 512 characters"),
    ],
)
def test_wrong_name_templates(text: str, problem: str) -> None:
    """A template that cannot name anything is refused with its fault."""
    with pytest.raises(ValueError, match=re.escape(problem)):
        parse_name(text, Kind.POD)


def test_nodes_name_has_no_pod() -> None:
    """A property that Nodes lack is no field of their name; in a tag, which both share, it is one."""
    for text in ("node-{pod}", "node-{namespace}"):
        with pytest.raises(ValueError, match="is none of"):
            parse_name(text, Kind.NODE)
        assert parse_tag(text).fields


@pytest.mark.parametrize(
    ("values", "text", "reason"),
    [
        ({}, "x-{label:none}", Reason.EMPTY_NAME),
        ({}, "x-{label:empty}", Reason.EMPTY_NAME),
        ({"node": ""}, "x-{node}", Reason.EMPTY_NAME),
        ({"pod": "a/b"}, "x-{pod}", Reason.INVALID_NAME),
        ({"pod": "a\x00b"}, "x-{pod}", Reason.INVALID_NAME),
        ({"pod": "é"}, "x-{pod}", Reason.INVALID_NAME),
        ({"cluster": "consul"}, "{cluster}", Reason.INVALID_NAME),
        ({"cluster": "Consul"}, "{cluster}", Reason.INVALID_NAME),
        ({"pod": "p" * 511}, "x-{pod}", Reason.NAME_TOO_LONG),
        ({"pod": "p" * 508}, "x-{pod}{shard_path}", Reason.NAME_TOO_LONG),
    ],
)
def test_refused_names(values: dict[str, str], text: str, reason: Reason) -> None:
    """An empty field, a character no URL takes and too many of them are refused by reason."""
    subject = Subject({**SUBJECT.values, **values}, SUBJECT.labels)
    with pytest.raises(Rejected) as raised:
        service_name(parse_name(text, Kind.POD), subject, longest_shard=3)
    assert raised.value.reason is reason
    assert raised.value.detail.isprintable()


def test_longest_name_there_is() -> None:
    """The longest Pod in the longest namespace has its default name, and a name may be just long enough."""
    subject = Subject({"namespace": "n" * 63, "pod": "p" * 253})
    assert len(service_name(POD_NAME, subject, 0)) == 323
    longest = Subject({"pod": "p" * 507})
    assert (
        len(sharded_name(service_name(parse_name("x-{pod}{shard_path}", Kind.POD), longest, 3), "abc")) == 512
    )


def tags(*texts: str, subject: Subject = SUBJECT, shard: str = "s1") -> tuple[str, ...]:
    """Return the finished tags of these templates."""
    return sharded_tags(service_tags([parse_tag(text) for text in texts], subject, 2), shard)


def test_tags_are_sorted_and_single() -> None:
    """Tags come out sorted and once each, the shard's among them where it belongs."""
    assert tags("shard_path={shard_path}", "z", "cluster={cluster}", "z", "{shard_path}", "s1") == (
        "cluster=lab",
        "s1",
        "shard_path=s1",
        "z",
    )
    assert tags("{shard_path}", "b", shard="a") == ("a", "b")


def test_tags_with_nothing_to_say_are_left_out() -> None:
    """A field without a value takes its tag with it, and so does the shard where there are no shards."""
    assert tags("a={label:none}", "b", subject=Subject({})) == ("b",)
    assert tags("shard_path={shard_path}", "b", shard="") == ("b",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{oops}", "{oops} is none of"),
        ("a{", "without its counterpart"),
        ("a" * (LONGEST_TAG + 1), "is over 512 bytes"),
        ("a\x07", "not printable"),
        ("\udc80", "not printable"),
    ],
)
def test_wrong_tag_templates(text: str, problem: str) -> None:
    """A tag's template is held to the same grammar, to a length and to printable text."""
    with pytest.raises(ValueError, match=re.escape(problem)):
        parse_tag(text)


@pytest.mark.parametrize("value", ["x" * 513, "a\nb", "\ud800"])
def test_refused_tags(value: str) -> None:
    """A value that no tag can hold rejects its object by reason."""
    with pytest.raises(Rejected) as raised:
        service_tags([parse_tag("{label:app}")], Subject({}, {"app": value}), 0)
    assert raised.value.reason is Reason.INVALID_TAG


@given(st.text(max_size=40) | st.text("{}:abcdelp_ot", max_size=20))
def test_any_text_is_a_template_or_refused(text: str) -> None:
    """Whatever is written, it is refused or comes back out of its parts as it was."""
    with contextlib.suppress(ValueError):
        template = parse_template(text)
        assert "".join(str(part) for part in template.parts) == text


@given(
    st.lists(st.sampled_from(sorted(ALL_FIELDS)).map("{{{}}}".format) | st.text("ab-", max_size=3)),
    st.dictionaries(st.sampled_from(sorted(ALL_FIELDS)), st.text("xyz", max_size=3)),
    st.text("12", max_size=2),
)
def test_rendering_is_replacing(parts: list[str], values: dict[str, str], shard: str) -> None:
    """A filled-in template is its text with each field replaced, or it names the first empty field."""
    template = parse_template("".join(parts))
    empty = [place for place in template.fields if place.name != "shard_path" and not values.get(place.name)]
    if empty:
        with pytest.raises(EmptyField, match=re.escape(str(empty[0]))):
            template.render(Subject(values))
        return
    rendered = template.render(Subject(values))
    expected = "".join(parts)
    for name in ALL_FIELDS - {"shard_path"}:
        expected = expected.replace(f"{{{name}}}", values.get(name, ""))
    assert with_shard(rendered, shard) == expected.replace("{shard_path}", shard)
