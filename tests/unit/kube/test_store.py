"""A Store holds one value per object and reports each change, with how it became known."""

from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.source_state import CatchingUp, Failed, Listing, SourceStatus, Synced
from k8s_consul_registrar.kube.store import KEEP, SLICE, Evidence, Store, Unreadable
from k8s_consul_registrar.model import Kind, ObjectKey, Pod, Source, Undecodable
from support.builders import make_pod

PODS = Source(Kind.POD)
NAMELESS = Undecodable(Kind.POD, None, "x")
Change = tuple[str, str | None, str | None, Evidence, float | None]


class Told:
    """A Store of the Pods' addresses, and what it reported."""

    def __init__(self, *sources: Source) -> None:
        self.now = 100.0
        self.changes: list[Change] = []
        self.statuses: list[SourceStatus] = []
        self.store: Store[str] = Store(sources or (PODS,), _address, self, clock=lambda: self.now)

    def on_object(
        self,
        key: ObjectKey,
        before: str | None,
        after: str | None,
        evidence: Evidence,
        heard_at: float | None,
    ) -> None:
        """Record a change."""
        self.changes.append((key.name, before, after, evidence, heard_at))

    def on_source(self, source: Source, status: SourceStatus) -> None:
        """Record a status."""
        assert status == self.store.status(source)
        self.statuses.append(status)

    def lists(self, *items: Item, source: Source = PODS) -> None:
        """Write one complete list."""
        self.store.start_listing(source, self.now - 1.0)
        for item in items:
            self.store.put(source, item)
        self.store.finish_listing(source, self.now)

    def taken(self) -> list[Change]:
        """Return the changes so far, and begin again."""
        taken, self.changes = self.changes, []
        return taken

    def status(self) -> SourceStatus:
        """Return the status of the Pods."""
        return self.store.status(PODS)


def _address(item: Item) -> str | Unreadable | None:
    if isinstance(item, Undecodable):
        return KEEP if item.problem == "keep" else f"rejected: {item.problem}"
    return item.ip or None if isinstance(item, Pod) else None


def unreadable(name: str, problem: str = "keep") -> Undecodable:
    """Return a Pod that cannot be read."""
    return Undecodable(Kind.POD, ObjectKey(Kind.POD, "shop", name), problem)


def test_store_value_changes_are_reported_once() -> None:
    """New, changed and gone are reported; the same value again is not."""
    told = Told()
    told.lists(make_pod("a", ip="192.0.2.1"))
    assert told.taken() == [("a", None, "192.0.2.1", Evidence.LISTED, None)]
    told.store.put(PODS, make_pod("a", ip="192.0.2.1", labels={"x": "y"}))
    assert told.taken() == []
    told.store.put(PODS, make_pod("a", ip="192.0.2.2"))
    told.store.put(PODS, make_pod("a", ip=""))
    assert told.taken() == [
        ("a", "192.0.2.1", "192.0.2.2", Evidence.EVENT, 100.0),
        ("a", "192.0.2.2", None, Evidence.EVENT, 100.0),
    ]
    assert len(told.store) == 0


def test_store_object_seen_without_a_value_is_a_fact_each_time() -> None:
    """A listed Pod that asks for nothing, and one deleted that had nothing: what they asked for before is over."""
    told = Told()
    told.lists(make_pod("a", ip=""))
    assert told.taken() == [("a", None, None, Evidence.LISTED, None)]
    told.store.put(PODS, make_pod("a", ip=""))
    told.store.remove(PODS, make_pod("a"))
    assert told.taken() == [("a", None, None, Evidence.EVENT, 100.0)] * 2


def test_store_absence_is_an_inference_at_the_end_of_a_list() -> None:
    """An object that a complete list lacks is gone at its end and not before."""
    told = Told()
    told.lists(make_pod("a"), make_pod("b"))
    told.taken()
    told.store.start_listing(PODS, 100.0)
    told.store.put(PODS, make_pod("a"))
    assert told.taken() == []
    told.store.finish_listing(PODS, 101.0)
    assert told.taken() == [("b", make_pod("b").ip, None, Evidence.ABSENT, None)]


def test_store_list_that_breaks_off_takes_nothing_away() -> None:
    """Not even where another list follows."""
    told = Told()
    told.lists(make_pod("a"), make_pod("b"))
    told.store.start_listing(PODS, 100.0)
    told.store.fail(PODS, "broke off", "unreachable")
    assert not told.store.infer_absences(PODS)
    assert len(told.store) == 2
    told.taken()
    told.store.remove(PODS, make_pod("a"))
    assert told.taken()[0][3] is Evidence.EVENT


def test_store_many_absences_come_in_slices_and_the_source_proves_none_meanwhile() -> None:
    """Other work gets its turn between slices, and sees a part of the list."""
    told = Told()
    told.lists(*(make_pod(f"p{number}") for number in range(2 * SLICE + 1)))
    assert told.status().proves_absence
    told.taken()
    told.store.start_listing(PODS, 100.0)
    assert told.store.infer_absences(PODS)
    assert not told.status().proves_absence
    assert [told.store.infer_absences(PODS) for _ in range(2)] == [True, False]
    assert len(told.taken()) == 2 * SLICE + 1


def test_store_unreadable_object_keeps_its_value_where_resolve_says_so() -> None:
    """Otherwise it is resolved like any object that has a key."""
    told = Told()
    told.lists(make_pod("a"), make_pod("b"))
    told.taken()
    told.store.put(PODS, unreadable("a"))
    assert told.taken() == []
    told.lists(unreadable("a"), make_pod("b"))
    assert told.taken() == []
    assert told.store.get(ObjectKey(Kind.POD, "shop", "a")) == make_pod("a").ip
    told.store.put(PODS, unreadable("a", "odd"))
    assert [change[2] for change in told.taken()] == ["rejected: odd"]
    told.store.put(PODS, unreadable("c"))
    assert told.taken() == []


def test_store_nameless_object_forbids_inference_until_a_list_without_one() -> None:
    """Any missing object may be that one, in a list as in an event."""
    told = Told()
    told.lists(make_pod("a"), make_pod("b"))
    told.taken()
    told.lists(NAMELESS, make_pod("b"))
    assert told.taken() == []
    assert (told.status().has_nameless, told.status().proves_absence) == (True, False)
    told.lists(make_pod("b"))
    assert [change[:1] for change in told.taken()] == [("a",)]
    assert told.status().proves_absence
    told.statuses.clear()
    told.store.put(PODS, NAMELESS)
    told.store.remove(PODS, NAMELESS)
    assert [status.has_nameless for status in told.statuses] == [True]
    assert not told.status().proves_absence


def test_store_states_follow_listing_failing_resuming_and_catching_up() -> None:
    """A failure lasts until a list is complete or the watch was resumed; its moment is that of its beginning."""
    told = Told()
    assert told.status() == SourceStatus(Listing())
    told.store.resume(PODS, "7")
    told.store.caught_up(PODS)
    assert told.status().state == Listing()
    told.store.fail(PODS, "no", "forbidden")
    told.now = 200.0
    told.store.start_listing(PODS, 199.0)
    assert told.status().state == Failed(100.0, "no", "forbidden")
    told.store.finish_listing(PODS, 201.0)
    assert told.status() == SourceStatus(Synced(), 201.0, 199.0)
    told.store.fail(PODS, "gone", "unreachable")
    told.now = 300.0
    told.store.fail(PODS, "still gone", "busy")
    assert told.status().state == Failed(200.0, "still gone", "busy")
    told.store.resume(PODS, "9")
    assert told.status().state == CatchingUp("9")
    assert told.status().is_followed
    assert not told.status().proves_absence
    told.store.caught_up(PODS)
    assert told.status().proves_absence
    told.store.start_listing(PODS, 299.0)
    assert told.status().state == Listing()
    assert told.status().is_followed
    assert [type(one.state) for one in told.statuses] == [
        Failed, Synced, Failed, Failed, CatchingUp, Synced, Listing,
    ]  # fmt: skip


def test_store_alternating_error_texts_are_one_failure() -> None:
    """Each text is reported, for people; the failure began with the first."""
    told = Told()
    told.store.fail(PODS, "one", "busy")
    told.store.fail(PODS, "two", "busy")
    told.store.fail(PODS, "one", "busy")
    assert [one.problem for one in told.statuses] == ["one", "two", "one"]
    assert {one.state.since for one in told.statuses if isinstance(one.state, Failed)} == {100.0}


def test_store_counts_objects_of_the_last_list_and_events_since() -> None:
    """Those that have no value count as well; a first list that is arriving shows how far it is."""
    told = Told()
    told.store.start_listing(PODS, 100.0)
    told.store.put(PODS, make_pod("a"))
    assert told.status().objects == 1
    told.store.put(PODS, make_pod("b", ip=""))
    told.store.finish_listing(PODS, 101.0)
    told.store.put(PODS, make_pod("c"))
    told.store.put(PODS, make_pod("c", ip=""), is_added=False)
    told.store.remove(PODS, make_pod("a"))
    assert told.status().objects == 2
    told.store.start_listing(PODS, 102.0)
    assert told.status().objects == 2
    told.store.finish_listing(PODS, 103.0)
    assert told.status().objects == 0


def test_store_several_sources_are_apart() -> None:
    """A list of one takes nothing from another, and each object belongs to one of them."""
    one, two = Source(Kind.POD, "one"), Source(Kind.POD, "two")
    told = Told(one, two)
    told.lists(make_pod("a", "one"), source=one)
    told.lists(make_pod("a", "two"), source=two)
    told.taken()
    told.lists(source=one)
    assert [change[0] for change in told.taken()] == ["a"]
    assert [key.namespace for key, _ in told.store.items()] == ["two"]
    assert list(told.store.values()) == [make_pod("a").ip]
    assert told.store.source_of(ObjectKey(Kind.POD, "two", "x")) == two
    assert told.store.source_of(ObjectKey(Kind.POD, "three", "x")) is None
    assert told.store.source_of(ObjectKey(Kind.NODE, "", "x")) is None
    assert told.store.get(ObjectKey(Kind.NODE, "", "x")) is None
    told.store.fail(two, "lost", "busy")
    assert {source: status.is_followed for source, status in told.store.statuses().items()} == {
        one: True,
        two: False,
    }


def test_store_revised_value_is_not_reported() -> None:
    """An object without a value gets none this way."""
    told = Told()
    told.lists(make_pod("a"))
    told.taken()
    told.store.revise(ObjectKey(Kind.POD, "shop", "a"), "zoned")
    told.store.revise(ObjectKey(Kind.POD, "shop", "b"), "zoned")
    told.store.revise(ObjectKey(Kind.NODE, "", "b"), "zoned")
    assert told.taken() == []
    assert dict(told.store.items()) == {ObjectKey(Kind.POD, "shop", "a"): "zoned"}
