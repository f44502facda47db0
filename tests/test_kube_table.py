"""A table follows what is heard of its sources: values told as they change, sight told as it is lost."""

from builders import make_pod
from k8s_consul_registrar.kube.objects import Item
from k8s_consul_registrar.kube.table import SLICE, Table
from k8s_consul_registrar.model import Kind, ObjectKey, Pod, Source, Undecodable

PODS = Source(Kind.POD)
NAMELESS = Undecodable(Kind.POD, None, "x")


class Told:
    """A table of the Pods' addresses, and what it told."""

    def __init__(self, *sources: Source) -> None:
        self.now = 100.0
        self.changes: list[tuple[str, str | None]] = []
        self.sights = 0
        self.table = Table(
            sources or (PODS,), self._ip, changed=self._changed, sighted=self._sighted, clock=lambda: self.now
        )

    @staticmethod
    def _ip(item: Item) -> str | None:
        return item.ip or None if isinstance(item, Pod) else None

    def _changed(self, key: ObjectKey, value: str | None) -> None:
        self.changes.append((key.name, value))

    def _sighted(self) -> None:
        self.sights += 1

    def sight(self) -> tuple[bool, float | None, str, int]:
        """Return whether all was listed, since when it is blind and why, and how often that was told."""
        return self.table.has_listed, self.table.blind_since, self.table.problem, self.sights

    def lists(self, *items: Item, source: Source = PODS) -> None:
        """Take in one complete list, and forget what was told before."""
        self.changes.clear()
        self.table.start_listing(source)
        for item in items:
            self.table.put(source, item)
        self.table.finish_listing(source, self.now)


def test_values_are_told_once() -> None:
    """New, changed and gone are told; the same again and what never had a value are not."""
    told = Told()
    told.lists(make_pod("a", ip="192.0.2.1"), make_pod("b", ip=""))
    assert told.changes == [("a", "192.0.2.1")]
    told.table.put(PODS, make_pod("a", ip="192.0.2.1", labels={"x": "y"}))
    told.table.remove(PODS, make_pod("b"))
    assert len(told.changes) == 1
    told.table.put(PODS, make_pod("a", ip="192.0.2.2"))
    told.table.put(PODS, make_pod("a", ip=""))
    told.table.remove(PODS, make_pod("a"))
    assert told.changes[1:] == [("a", "192.0.2.2"), ("a", None)]
    assert len(told.table) == 0


def test_absence_from_a_list() -> None:
    """What a complete list lacks is gone at its end, and not before."""
    told = Told()
    told.lists(make_pod("a"), make_pod("b"))
    told.changes.clear()
    told.table.start_listing(PODS)
    told.table.put(PODS, make_pod("a"))
    assert told.changes == []
    told.table.finish_listing(PODS, told.now)
    assert told.changes == [("b", None)]


def test_many_absences_come_in_slices() -> None:
    """Between slices others get their turn."""
    told = Told()
    told.lists(*(make_pod(f"p{number}") for number in range(2 * SLICE + 1)))
    told.changes.clear()
    told.table.start_listing(PODS)
    assert [told.table.infer_absences(PODS) for _ in range(3)] == [True, True, False]
    assert len(told.changes) == 2 * SLICE + 1


def test_what_cannot_be_read_stays() -> None:
    """An object that turned unreadable keeps its value, and a nameless one in a list forbids inferring absences."""
    told = Told()
    told.lists(make_pod("a"), make_pod("b"))
    told.changes.clear()
    told.table.put(PODS, Undecodable(Kind.POD, ObjectKey(Kind.POD, "shop", "a"), "x"))
    assert told.changes == []
    told.lists(NAMELESS)
    assert told.changes == []
    assert told.table.is_opaque(PODS)
    told.lists(make_pod("b"))
    assert told.changes == [("a", None)]
    assert not told.table.is_opaque(PODS)


def test_sight() -> None:
    """Blind from the start to the first list, and from a failure to a resumption; a new problem is told anew."""
    told = Told()
    told.table.resume(PODS)
    assert told.sight() == (False, 100.0, "", 0)
    told.lists()
    assert told.sight() == (True, None, "", 1)
    told.now = 200.0
    told.table.fail(PODS, "one")
    told.now = 300.0
    told.table.fail(PODS, "one")
    told.table.fail(PODS, "two")
    assert told.sight() == (True, 200.0, "two", 3)
    told.table.resume(PODS)
    assert told.sight() == (True, None, "", 4)


def test_several_sources() -> None:
    """All of them must be listed, and the one that was lost first counts."""
    one, two = Source(Kind.POD, "one"), Source(Kind.POD, "two")
    told = Told(one, two)
    told.lists(make_pod("a", "one"), source=one)
    assert told.sight()[:2] == (False, 100.0)
    told.lists(make_pod("a", "two"), source=two)
    assert told.sight()[:2] == (True, None)
    told.lists(source=one)
    assert told.changes == [("a", None)]
    assert len(told.table) == 1
    told.now = 150.0
    told.table.fail(two, "lost")
    assert told.sight()[1:3] == (150.0, "lost")
