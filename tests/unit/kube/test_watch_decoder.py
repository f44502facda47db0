"""The `WatchDecoder` of `kube.objects`: recorded streams and hostile ones, whole, byte by byte and in odd pieces."""

import json
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k8s_consul_registrar.errors import ClusterAhead, ClusterBusy, ClusterExpired, ClusterRefused
from k8s_consul_registrar.kube.objects import Bookmark, Broken, Changed, Deleted, WatchDecoder, WatchEvent
from k8s_consul_registrar.model import Kind, ObjectKey, Pod, Undecodable
from support.files import recorded

STREAMS = [
    "k8s-pods-watch",
    "k8s-pods-watch-initial-events",
    "k8s-pods-watch-expired",
    "k8s-pods-watch-future",
]


def pieces(body: bytes, size: int) -> Iterator[bytes]:
    """Cut a body into pieces of `size` bytes."""
    return (body[start : start + size] for start in range(0, len(body), size))


def decode(body: bytes, size: int = 1 << 20) -> list[WatchEvent]:
    """Decode a whole stream, fed in pieces."""
    decoder = WatchDecoder(Kind.POD)
    return [event for piece in pieces(body, size) for event in decoder.feed(piece)]


def described(events: list[WatchEvent]) -> list[object]:
    """Return events in a form that compares errors by their text."""
    return [(type(e.error), str(e.error)) if isinstance(e, Broken) else e for e in events]


def event(kind: str, value: object) -> bytes:
    """Return one line of a stream."""
    return json.dumps({"type": kind, "object": value}).encode() + b"\n"


def test_life_of_a_pod_is_told_in_order() -> None:
    """Create, changes, graceful delete, and bookmarks that only move the version."""
    events = decode(recorded("k8s-pods-watch").body)
    assert [type(e) for e in events] == [Changed] * 5 + [Deleted] + [Bookmark] * 3
    assert [e.version for e in events if not isinstance(e, Broken)] == [
        "334", "335", "336", "337", "338", "339", "354", "354", "354",
    ]  # fmt: skip
    for e in events[:6]:
        assert isinstance(e, (Changed, Deleted))
        assert isinstance(e.item, Pod)
        assert e.item.key == ObjectKey(Kind.POD, "web", "new-1")
    assert [e.is_added for e in events if isinstance(e, Changed)] == [True, False, False, False, False]
    assert Bookmark("354") in events


def test_annotated_bookmark_is_a_bookmark() -> None:
    """The one that ends a streamed list moves the version like any other."""
    events = decode(recorded("k8s-pods-watch-initial-events").body)
    assert [type(e) for e in events] == [Changed] * 11 + [Bookmark]
    assert events[-1] == Bookmark("366")


@pytest.mark.parametrize("version", ["", 7, None, "9" * 300])
def test_bookmark_without_a_usable_version_breaks_the_watch(version: object) -> None:
    """Nothing can be resumed from it."""
    (only,) = decode(event("BOOKMARK", {"metadata": {"resourceVersion": version}}))
    assert isinstance(only, Broken)
    assert isinstance(only.error, ClusterRefused)


def test_event_with_an_absurd_version_keeps_the_version_before() -> None:
    """Its object counts, its version does not."""
    pod = {"metadata": {"name": "a", "namespace": "n", "resourceVersion": "9" * 300}}
    first, second = decode(event("ADDED", pod) + event("DELETED", pod))
    assert isinstance(first, Changed)
    assert isinstance(second, Deleted)
    assert (first.version, second.version) == ("", "")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"code": 410}, ClusterExpired),
        ({"reason": "Expired"}, ClusterExpired),
        ({"reason": "Gone", "code": 500}, ClusterExpired),
        ({"code": 504, "details": {"causes": [{"reason": "ResourceVersionTooLarge"}]}}, ClusterAhead),
        ({"code": 504, "message": "Too large resource version: 9, current: 4"}, ClusterAhead),
        ({"code": 429, "details": {"retryAfterSeconds": 10**400}}, ClusterBusy),
        ({"code": "410"}, ClusterRefused),
        ({}, ClusterRefused),
    ],
)
def test_error_event_in_each_form_has_its_meaning(status: dict[str, object], expected: type) -> None:
    """Codes, reasons, causes and messages: servers do not always send all of them."""
    (only,) = decode(event("ERROR", {"kind": "Status", **status}))
    assert isinstance(only, Broken)
    assert type(only.error) is expected


def test_expired_version_is_an_event_under_a_200() -> None:
    """The recorded ERROR event becomes the same error as an HTTP 410."""
    (only,) = decode(recorded("k8s-pods-watch-expired").body)
    assert isinstance(only, Broken)
    assert isinstance(only.error, ClusterExpired)
    assert "too old resource version: 2 (395)" in str(only.error)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_pieces_make_no_difference(name: str, size: int) -> None:
    """However the network cuts the stream, the same events come out."""
    body = recorded(name).body
    assert described(decode(body, size)) == described(decode(body))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 17_000), max_size=8))
def test_any_cuts_make_no_difference(cuts: list[int]) -> None:
    """Cuts anywhere, empty pieces included, change nothing."""
    body = recorded("k8s-pods-watch").body
    decoder = WatchDecoder(Kind.POD)
    places = [0, *sorted(cuts), len(body)]
    events = [e for a, b in pairwise(places) for e in decoder.feed(body[a:b])]
    assert events == decode(body)


def test_line_cut_by_the_end_is_no_event() -> None:
    """Half an event is dropped with its stream."""
    body = recorded("k8s-pods-watch").body
    assert decode(body[:-1]) == decode(body)[:-1]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"kind": "Status", "code": 429, "details": {"retryAfterSeconds": 2}}, ClusterBusy),
        ({"kind": "Status", "code": 500}, ClusterBusy),
        (
            {"kind": "Status", "code": 504, "details": {"causes": [{"reason": "ResourceVersionTooLarge"}]}},
            ClusterAhead,
        ),
        ({"kind": "Pod", "code": 410}, ClusterRefused),
        ({}, ClusterRefused),
        (None, ClusterRefused),
    ],
)
def test_errors_are_values_and_the_last_event(status: object, expected: type[Exception]) -> None:
    """Nothing after an ERROR is believed."""
    pod = {"metadata": {"name": "a", "namespace": "b", "resourceVersion": "1"}}
    decoder = WatchDecoder(Kind.POD)
    (only,) = decoder.feed(event("ERROR", status) + event("ADDED", pod))
    assert isinstance(only, Broken)
    assert type(only.error) is expected
    assert decoder.feed(event("ADDED", pod)) == []


@pytest.mark.parametrize(
    "line",
    [
        b"<html>\n",
        b"{}\n",
        b'{"type":"ADDED"}\n',
        event("SYNC", {}),
        event("BOOKMARK", {"metadata": {}}),
        event("BOOKMARK", {"metadata": {"resourceVersion": ""}}),
        event("BOOKMARK", None),
        b'{"type":"ADDED","object":' + b"[" * 100_000 + b"\n",
    ],
)
def test_line_that_is_no_event_breaks_the_watch(line: bytes) -> None:
    """A stream that stops making sense is ended, not skipped through."""
    (only,) = decode(line)
    assert isinstance(only, Broken)
    assert isinstance(only.error, ClusterRefused)


def test_odd_object_is_one_event_among_others() -> None:
    """An undecodable Pod keeps its key and version, and the watch goes on."""
    odd = {"metadata": {"name": "a", "namespace": "b", "resourceVersion": "5", "labels": 7}}
    first, second = decode(
        event("MODIFIED", odd) + b"\n" + event("BOOKMARK", {"metadata": {"resourceVersion": "6"}})
    )
    assert isinstance(first, Changed)
    assert isinstance(first.item, Undecodable)
    assert first.item.key == ObjectKey(Kind.POD, "b", "a")
    assert first.version == "5"
    assert second == Bookmark("6")


def test_line_without_an_end_is_bounded() -> None:
    """A server that never ends its line does not fill our memory."""
    decoder = WatchDecoder(Kind.POD, line_limit=1000)
    assert decoder.feed(b"x" * 1000) == []
    (only,) = decoder.feed(b"x")
    assert isinstance(only, Broken)
    assert "longer than 1000 bytes" in str(only.error)
    assert decoder.feed(b"x" * 1000) == []


def test_long_line_is_searched_once() -> None:
    """Eight megabytes in small pieces cost time in proportion, not its square."""
    notes = {"metadata": {"name": "a", "namespace": "b", "annotations": {"big": "y" * (8 << 20)}}}
    started = time.process_time()
    (only,) = decode(event("ADDED", notes), 64)
    assert isinstance(only, Changed)
    assert isinstance(only.item, Pod)
    assert time.process_time() - started < 2
