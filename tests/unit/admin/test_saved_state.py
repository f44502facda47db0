"""Targets saved for the next start: read back as they were, and refused where they cannot be believed."""

import json
import time
from collections.abc import Iterable

import pytest

from k8s_consul_registrar.admin.saved_state import (
    MAX_AGE,
    Origin,
    SavedState,
    UnusableState,
    decode_state,
    encode_end,
    encode_head,
    encode_target,
)
from k8s_consul_registrar.admin.target_groups import GroupEncoder
from k8s_consul_registrar.admin.view import TargetRow
from support.seen import many_targets, node_target, pod_target

ORIGIN = Origin("lab", "blue", "abc123")
NOW = 1_800_000_000.0


def encoded(
    targets: Iterable[TargetRow], *, at: float = NOW, uid: str = "uid-1", origin: Origin = ORIGIN
) -> bytes:
    """Return a whole file."""
    text = encode_head(origin, cluster_uid=uid, written_at=at, is_settled=True)
    for number, target in enumerate(targets):
        text += encode_target(target, is_first=number == 0)
    return text + encode_end()


def documents(targets: Iterable[TargetRow]) -> list[bytes]:
    """Return the group that a collector gets for each target."""
    return [GroupEncoder().encode(target).text for target in targets]


def test_targets_are_read_back_as_they_were() -> None:
    """Every label a collector gets is the same, for odd texts and many targets too."""
    targets = [
        pod_target("web-1", tags=("a", "b"), meta={"param_module": "http\n2xx", "x": '"},{"'}),
        pod_target("web-2", address="2001:db8::7", name="größe"),
        node_target(1),
        *many_targets(3000).values(),
    ]
    saved = decode_state(encoded(targets), ORIGIN, NOW)
    assert (saved.count, saved.since, saved.cluster_uid, saved.is_settled) == (3003, NOW, "uid-1", True)
    assert documents(saved.targets()) == documents(targets)
    assert [one.key for one in saved.targets()] == [one.key for one in targets]
    assert len(saved.packed) < len(encoded(targets)) / 5


def test_file_without_targets_is_a_complete_state() -> None:
    """Nothing to scrape is something to know, too."""
    assert list(decode_state(encoded([]), ORIGIN, NOW).targets()) == []


def test_file_is_one_json_document() -> None:
    """Any tool can read it."""
    read = json.loads(encoded([pod_target("a"), pod_target("b")]))
    assert [one["object"] for one in read["targets"]] == ["a", "b"]
    assert (read["format"], read["cluster_uid"], read["selection"]) == (1, "uid-1", "abc123")


@pytest.mark.parametrize(
    ("age", "is_used"), [(0, True), (MAX_AGE - 1, True), (MAX_AGE + 1, False), (-3, True), (-60, False)]
)
def test_targets_too_old_or_from_the_future_are_refused(age: float, is_used: bool) -> None:
    """Past 15 minutes targets have moved; a clock that was corrected by a little is no future."""
    content = encoded([pod_target("a")], at=NOW - age)
    if is_used:
        assert decode_state(content, ORIGIN, NOW).count == 1
    else:
        with pytest.raises(UnusableState, match=r"future|older than 15 minutes"):
            decode_state(content, ORIGIN, NOW)


@pytest.mark.parametrize(
    "origin", [Origin("other", "blue", "abc123"), Origin("lab", "", "abc123"), Origin("lab", "blue", "else")]
)
def test_targets_of_another_registrar_are_refused(origin: Origin) -> None:
    """Cluster, instance and selection are those of the reader."""
    with pytest.raises(UnusableState, match="written under another"):
        decode_state(encoded([pod_target("a")], origin=origin), ORIGIN, NOW)


GOOD = encoded([pod_target("a"), pod_target("b")])
HEAD, FIRST, SECOND, _ = GOOD.split(b"\n")[:4]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 4096, id="zeros"),
        pytest.param(b"\x1f\x8b\x08\x00" + b"x" * 99, id="binary"),
        pytest.param(b"{}", id="empty object"),
        pytest.param(b"[]\n", id="list"),
        pytest.param(b"null\n", id="null"),
        pytest.param(b"[" * 5_000_000, id="deep list"),
        pytest.param(b'{"a":' * 2_000_000, id="deep object"),
        pytest.param(HEAD.replace(b'"format":1', b'"format":2') + b"\n]}\n", id="another format"),
        pytest.param(HEAD.replace(b'"format":1', b'"format":"1"') + b"\n]}\n", id="format of another type"),
        pytest.param(HEAD.replace(b"1800000000.0", b"null") + b"\n]}\n", id="no time"),
        pytest.param(HEAD.replace(b"1800000000.0", b"1e999") + b"\n]}\n", id="endless time"),
        pytest.param(HEAD.replace(b"1800000000.0", b"NaN") + b"\n]}\n", id="no number"),
        pytest.param(HEAD, id="head only"),
        pytest.param(HEAD + b"\n", id="no end"),
        pytest.param(HEAD + b"\n" + FIRST, id="cut at a comma"),
        pytest.param(GOOD[: len(GOOD) // 2], id="cut in half"),
        pytest.param(HEAD + b"\n" + b"[" * 3_000_000 + b"\n]}\n", id="deep target"),
        pytest.param(HEAD + b"\n" + b'{"kind":' * 100_000 + b"\n]}\n", id="deep kind"),
        pytest.param(HEAD + b"\n1,\n1,\n1\n]}\n", id="numbers"),
        pytest.param(HEAD + b"\n" + SECOND.replace(b"9102", b"99999") + b"\n]}\n", id="odd port"),
        pytest.param(HEAD + b"\n" + SECOND.replace(b'"pod"', b'"job"', 1) + b"\n]}\n", id="odd kind"),
        pytest.param(HEAD + b"\n" + SECOND.replace(b'"pod--shop--b"', b'""') + b"\n]}\n", id="no ID"),
        pytest.param(HEAD + b"\n" + b"x" * 3_000_000 + b"\n]}\n", id="endless line"),
        pytest.param(HEAD + b"\n" + SECOND.replace(b"9102", b"\xff") + b"\n]}\n", id="not UTF-8"),
    ],
)
def test_hostile_content_is_refused(content: bytes) -> None:
    """Whatever a file holds, it is refused with a reason, in little time."""
    began = time.process_time()
    with pytest.raises(UnusableState):
        decode_state(content, ORIGIN, NOW)
    assert time.process_time() - began < 5


def test_saved_targets_age_while_they_are_served() -> None:
    """A state that is good at the start is not good forever."""
    saved = SavedState(NOW, "uid-1", is_settled=True, count=0, packed=b"")
    assert saved.obstacle(NOW + 10) == ""
    assert saved.obstacle(NOW + MAX_AGE + 1)
