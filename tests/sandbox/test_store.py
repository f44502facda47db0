"""The sandbox's versioned store, its pages and its watch events."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.sandbox import ApiError, objects
from k8s_consul_registrar.sandbox.listing import list_page
from k8s_consul_registrar.sandbox.resources import NODES, PODS
from k8s_consul_registrar.sandbox.selection import Selection, parse_fields, parse_labels
from k8s_consul_registrar.sandbox.store import HistoryExpiredError, Store, encode
from k8s_consul_registrar.sandbox.watching import bookmark, change_events, parse_options

EVERYTHING = Selection()


def put(store: Store, name: str, *, namespace: str = "shop", **fields: Any) -> None:
    """Write a Pod."""
    store.put(PODS, f"{namespace}/{name}", objects.pod(name, namespace=namespace, **fields))


def names(store: Store, **query: str) -> list[str]:
    """Return the names one page of all Pods holds."""
    return [stored.name for stored in list_page(store, PODS, EVERYTHING, query).items]


def events(store: Store, since: int, selection: Selection = EVERYTHING) -> list[tuple[str, str, str]]:
    """Return the types, names and versions of the events after a version."""
    lines = change_events(PODS, store.changes(PODS, since=since), selection)
    decoded = [json.loads(line) for line in lines]
    return [
        (event["type"], event["object"]["metadata"]["name"], event["object"]["metadata"]["resourceVersion"])
        for event in decoded
    ]


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["", "10.0.0.1", "10.0.0.2"])), max_size=30)
)
def test_past_revisions_are_seen_as_they_were(steps: list[tuple[str, str]]) -> None:
    """Every revision in the history can be listed again; replaying its changes leads to the present."""
    store = Store()
    seen = {store.revision: store.select(PODS)}
    for name, ip in steps:
        if ip:
            put(store, name, ip=ip)
        elif store.get(PODS, f"shop/{name}"):
            store.delete(PODS, f"shop/{name}")
        seen[store.revision] = store.select(PODS)
    for revision, state in seen.items():
        assert store.select(PODS, at=revision) == state
        replayed = {stored.key: stored for stored in state}
        for change in store.changes(PODS, since=revision):
            if change.after:
                replayed[change.after.key] = change.after
            elif change.before:
                del replayed[change.before.key]
        assert [replayed[key] for key in sorted(replayed)] == store.select(PODS)


def test_equal_write_changes_nothing() -> None:
    """Writing what is there already moves no revision and makes no event."""
    store = Store()
    put(store, "a", ip="10.0.0.1")
    revision = store.revision
    put(store, "a", ip="10.0.0.1")
    assert store.revision == revision
    assert events(store, revision) == []


def test_history_is_limited_and_can_be_compacted() -> None:
    """Changes beyond the limit, and all after a compaction, are forgotten with an error that says so."""
    store = Store(history=2)
    for number in range(6):
        put(store, f"p{number}")
    with pytest.raises(HistoryExpiredError) as expired:
        store.changes(PODS, since=1)
    assert store.changes(PODS, since=expired.value.oldest)
    store.compact()
    with pytest.raises(HistoryExpiredError):
        store.changes(PODS, since=store.revision - 1)
    assert store.changes(PODS, since=store.revision) == []


def test_restore_goes_back_in_content_and_revision() -> None:
    """A restored store has the backup's objects, revision and no history, and a new epoch."""
    store = Store()
    put(store, "a")
    backup = store.backup()
    put(store, "b")
    told: list[int] = []
    store.subscribe(lambda: told.append(store.revision))
    store.restore(backup)
    assert names(store) == ["a"]
    assert (store.revision, store.epoch, told) == (backup.revision, 1, [backup.revision])
    with pytest.raises(HistoryExpiredError):
        store.changes(PODS, since=backup.revision - 1)


def test_pages_hold_one_snapshot() -> None:
    """Pages show the list as it was when the first was read, whatever changes meanwhile."""
    store = Store()
    for name in "bdf":
        put(store, name)
    first = list_page(store, PODS, EVERYTHING, {"limit": "1"})
    assert first.metadata["remainingItemCount"] == 2
    store.delete(PODS, "shop/d")
    put(store, "c")
    put(store, "f", ip="10.0.0.9")
    second = list_page(store, PODS, EVERYTHING, {"limit": "5", "continue": first.metadata["continue"]})
    assert [stored.name for stored in second.items] == ["d", "f"]
    assert b"10.0.0.9" not in second.items[1].body
    assert second.metadata == {"resourceVersion": first.metadata["resourceVersion"]}


def test_pages_hold_every_object_once() -> None:
    """Every size of page gives the whole list in order, with what is left counted, and no page is empty."""
    store = Store()
    everything = list("abcdefg")
    for name in everything:
        put(store, name)
    for limit in range(1, 9):
        found: list[str] = []
        query = {"limit": str(limit)}
        while True:
            page = list_page(store, PODS, EVERYTHING, query)
            assert 0 < len(page.items) <= limit
            found += [stored.name for stored in page.items]
            assert page.metadata.get("remainingItemCount", 0) == len(everything) - len(found)
            if "continue" not in page.metadata:
                break
            query["continue"] = page.metadata["continue"]
        assert found == everything


def test_page_after_compaction_is_expired_but_can_go_on() -> None:
    """An old continue token gets 410 with one that continues on the list as it is now."""
    store = Store()
    for name in "abc":
        put(store, name)
    token = list_page(store, PODS, EVERYTHING, {"limit": "1"}).metadata["continue"]
    put(store, "d")
    store.compact()
    with pytest.raises(ApiError) as refusal:
        list_page(store, PODS, EVERYTHING, {"limit": "1", "continue": token})
    assert (refusal.value.code, refusal.value.reason) == (410, "Expired")
    fresh = refusal.value.metadata["continue"]
    assert names(store, **{"continue": fresh}) == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"resourceVersion": "x"}, 400),
        ({"continue": "!!"}, 400),
        ({"resourceVersion": "999"}, 504),
        ({"resourceVersion": "1", "resourceVersionMatch": "Exact"}, 410),
        ({"resourceVersionMatch": "NotOlderThan"}, 422),
        ({"resourceVersion": "0", "resourceVersionMatch": "Exact"}, 422),
        ({"resourceVersion": "1", "resourceVersionMatch": "Newest"}, 422),
        ({"sendInitialEvents": "true"}, 422),
    ],
)
def test_lists_that_are_refused(query: dict[str, str], code: int) -> None:
    """Wrong, contradictory and unserveable list options get the API server's statuses."""
    store = Store(history=1, revision=1)
    for name in "abcd":
        put(store, name)
    with pytest.raises(ApiError) as refusal:
        list_page(store, PODS, EVERYTHING, query)
    assert refusal.value.code == code


def test_versions_of_lists() -> None:
    """Exact lists the past, NotOlderThan and 0 the present, and 0 knows no limit."""
    store = Store()
    put(store, "a")
    past = str(store.revision)
    put(store, "b")
    assert names(store, resourceVersion=past, resourceVersionMatch="Exact") == ["a"]
    assert names(store, resourceVersion=past, resourceVersionMatch="NotOlderThan") == ["a", "b"]
    assert names(store, resourceVersion="0", limit="1") == ["a", "b"]
    assert names(store, resourceVersion=past, limit="1") == ["a"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("", ["a", "b", "c"]),
        ("app=x", ["a"]),
        ("app==x,tier=web", ["a"]),
        ("app!=x", ["b", "c"]),
        ("app in (x, y)", ["a", "b"]),
        ("app notin (x)", ["b", "c"]),
        ("app", ["a", "b"]),
        ("!app", ["c"]),
        ("tier,app in (x,y),app!=y", ["a"]),
    ],
)
def test_label_selectors(selector: str, expected: list[str]) -> None:
    """Each operator selects as Kubernetes documents it."""
    store = Store()
    put(store, "a", labels={"app": "x", "tier": "web"})
    put(store, "b", labels={"app": "y"})
    put(store, "c")
    page = list_page(store, PODS, Selection(labels=parse_labels(selector)), {})
    assert [stored.name for stored in page.items] == expected


def test_field_selectors() -> None:
    """Pods are selected by name, phase and node; other fields are refused."""
    pod = encode("shop/a", objects.pod("a", namespace="shop", node_name="n1"), 7)
    for text, is_match in (
        ("metadata.name=a", True),
        ("status.phase!=Failed,spec.nodeName=n1", True),
        ("spec.nodeName=n2", False),
        ("status.phase==Pending", False),
    ):
        assert Selection(fields=parse_fields(text, PODS)).matches(pod) is is_match
    for text, resource in (("spec.nodeName=x", NODES), ("status.podIP=x", PODS), ("nonsense", PODS)):
        with pytest.raises(ApiError):
            parse_fields(text, resource)


@pytest.mark.parametrize("selector", ["a b", "app in", "app in (x", "=x", "app=x=y", ",", "app=-"])
def test_bad_label_selectors_are_refused(selector: str) -> None:
    """A text that is no selector is a 400."""
    with pytest.raises(ApiError) as refusal:
        parse_labels(selector)
    assert refusal.value.code == 400


def test_selected_watch_sees_objects_come_and_go() -> None:
    """An object that begins to match is ADDED, one that ceases to is DELETED with the change's version."""
    store = Store()
    since = store.revision
    put(store, "a", labels={"app": "y"})
    put(store, "a", labels={"app": "x"})
    put(store, "a", labels={"app": "x"}, ip="10.0.0.1")
    put(store, "a", labels={"app": "z"})
    put(store, "b", namespace="other", labels={"app": "x"})
    store.delete(PODS, "shop/a")
    chosen = Selection(namespace="shop", labels=parse_labels("app=x"))
    assert events(store, since, chosen) == [
        ("ADDED", "a", str(since + 2)),
        ("MODIFIED", "a", str(since + 3)),
        ("DELETED", "a", str(since + 4)),
    ]
    assert events(store, since)[-1] == ("DELETED", "a", str(since + 6))


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"resourceVersionMatch": "NotOlderThan"}, "resourceVersionMatch"),
        ({"sendInitialEvents": "true"}, "resourceVersionMatch"),
    ],
)
def test_watch_options_that_are_refused(query: dict[str, str], field: str) -> None:
    """Contradictory watch options are a 422 that names the option."""
    with pytest.raises(ApiError) as refusal:
        parse_options(query, can_stream_lists=True)
    assert refusal.value.code == 422
    assert (refusal.value.details or {})["causes"][0]["field"] == field


def test_servers_without_watch_list_refuse_it() -> None:
    """With the feature gate off, sendInitialEvents is forbidden, as clients expect before they fall back."""
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
    assert parse_options(query, can_stream_lists=True).starts_with_state
    with pytest.raises(ApiError, match="WatchList feature gate"):
        parse_options(query, can_stream_lists=False)


def test_bookmarks_carry_the_kind() -> None:
    """A bookmark is an empty object of its kind with a version."""
    event = json.loads(bookmark(NODES, 12))
    assert event["object"]["kind"] == "Node"
    assert event["object"]["metadata"] == {"resourceVersion": "12"}
