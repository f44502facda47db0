"""Places, queues and deadlines, without a socket."""

import math
import random
from collections.abc import Callable, Hashable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k8s_consul_registrar.proxy.limits import Admission, Concurrency, Limits, scrape_deadline


class Scrape:
    """A waiter that notes when it is let in."""

    def __init__(self, node: str, on_admitted: Callable[["Scrape"], None] = lambda scrape: None) -> None:
        self.node = node
        self.runs = False
        self._on_admitted = on_admitted

    def admitted(self) -> None:
        """Note it."""
        assert not self.runs
        self.runs = True
        self._on_admitted(self)

    def give_way(self) -> None:
        """End: not in these tests."""
        raise AssertionError


def enter(limits: Limits, scrape: Scrape) -> Admission:
    """Ask for a place and note a place had at once."""
    entry = limits.enter(scrape.node, scrape)
    if entry is Admission.RUN:
        scrape.runs = True
    return entry


def test_node_that_hangs_fills_its_own_queue_only() -> None:
    """Lets another node's scrapes run while one node's places and queue are full."""
    limits = Limits(Concurrency(per_node=2, overall=5, patience=2))
    entries = [enter(limits, Scrape("slow")) for _ in range(8)]
    assert entries == [Admission.RUN] * 2 + [Admission.WAIT] * 4 + [Admission.FULL] * 2
    assert [enter(limits, Scrape("other")) for _ in range(2)] == [Admission.RUN] * 2


def test_first_come_first_served() -> None:
    """Lets waiters in by the order they came, within the node and over all."""
    order: list[Scrape] = []
    limits = Limits(Concurrency(per_node=1, overall=2, patience=4))
    first, second = Scrape("a"), Scrape("b")
    waiting = [Scrape(node, order.append) for node in ("c", "a", "d", "a")]
    assert [enter(limits, scrape) for scrape in (first, second)] == [Admission.RUN] * 2
    assert [enter(limits, scrape) for scrape in waiting] == [Admission.WAIT] * 4
    limits.leave("a")
    limits.leave("b")
    assert order == [waiting[0], waiting[2]]
    limits.leave("c")
    assert order == [waiting[0], waiting[2], waiting[1]]
    limits.leave("d")
    assert len(order) == 3
    limits.leave("a")
    assert order[3:] == [waiting[3]]


def test_full_over_all() -> None:
    """Refuses at once where four times the overall limit wait already."""
    limits = Limits(Concurrency(per_node=100, overall=2))
    entries = [enter(limits, Scrape(f"node-{number}")) for number in range(12)]
    assert entries == [Admission.RUN] * 2 + [Admission.WAIT] * 8 + [Admission.FULL] * 2


def test_any_number_of_scrapes_may_end_as_they_are_admitted() -> None:
    """Gives every place back when thousands of waiters find their Nodes gone."""
    limits = Limits(Concurrency(per_node=1, overall=1, patience=3000))
    ended: list[Scrape] = []

    def end(scrape: Scrape) -> None:
        ended.append(scrape)
        limits.leave(scrape.node)

    assert enter(limits, Scrape("first")) is Admission.RUN
    waiting = [Scrape(f"gone-{number}", end) for number in range(3000)]
    assert {enter(limits, scrape) for scrape in waiting} == {Admission.WAIT}
    limits.leave("first")
    assert ended == waiting
    assert (limits.running, limits.waiting, limits._claimed) == (0, 0, {})


def test_any_number_of_stalled_scrapes_may_give_way() -> None:
    """Ends one stalled scrape after the other while those that wait take their places."""
    limits = Limits(Concurrency(per_node=3000, overall=3000, patience=1))

    class Stalled(Scrape):
        def give_way(self) -> None:
            """Give the place back."""
            limits.leave(self.node)

    for _ in range(3000):
        scrape = Stalled("a")
        assert enter(limits, scrape) is Admission.RUN
        limits.stall("a", scrape, 0.0)
    waiting = [Scrape("a") for _ in range(2999)]
    assert {limits.enter("a", scrape, 0.0) for scrape in waiting} == {Admission.WAIT}
    assert limits.enter("a", Scrape("a"), 60.0) is Admission.RUN
    assert all(scrape.runs for scrape in waiting)
    assert (limits.running, limits.waiting) == (3000, 0)


class Crowded(Scrape):
    """A waiter that leaves where it must make room for one of another group."""

    def __init__(self, limits: Limits, node: str, present: list[Scrape]) -> None:
        super().__init__(node)
        self.limits = limits
        self.present = present

    def give_way(self) -> None:
        """Wait no more."""
        assert not self.runs
        self.present.remove(self)
        self.limits.withdraw(self.node, self)


def by_letter(node: Hashable) -> str:
    """Return the group of a node, its first letter."""
    return str(node)[0]


def test_group_whose_nodes_hang_leaves_the_next_place_to_another() -> None:
    """Admits the group that has fewest places, however many of another wait before it."""
    limits = Limits(Concurrency(per_node=1, overall=4, patience=4), by_letter)
    hanging = [Scrape(f"a-{number}") for number in range(12)]
    assert [enter(limits, scrape) for scrape in hanging] == [Admission.RUN] * 4 + [Admission.WAIT] * 8
    others = [Scrape(node) for node in ("b-1", "b-2", "c-1")]
    assert {enter(limits, scrape) for scrape in others} == {Admission.WAIT}
    order = [others[0], others[2], hanging[4], others[1], hanging[5]]  # in turn where they have as many
    for node, following in zip(("a-0", "a-1", "a-2", "a-3", "a-4"), order, strict=True):
        assert not following.runs
        limits.leave(node)
        assert following.runs


def test_group_that_fills_the_queue_makes_room_for_another() -> None:
    """Ends the latest that waits of the largest group, and refuses only one of that group itself."""
    limits = Limits(Concurrency(per_node=1, overall=1, patience=4), by_letter)
    present: list[Scrape] = []

    def one(node: str) -> Crowded:
        present.append(Crowded(limits, node, present))
        return cast("Crowded", present[-1])

    hanging = [one(f"a-{number}") for number in range(5)]
    assert [enter(limits, scrape) for scrape in hanging] == [Admission.RUN] + [Admission.WAIT] * 4
    assert enter(limits, Scrape("a-5")) is Admission.FULL
    first, second = one("b-1"), one("b-2")
    assert enter(limits, first) is Admission.WAIT
    assert enter(limits, second) is Admission.WAIT
    assert present == [*hanging[:3], first, second]
    assert enter(limits, Scrape("b-3")) is Admission.FULL
    limits.leave("a-0")
    limits.leave("a-1")
    assert [scrape.runs for scrape in (hanging[1], first)] == [True, True]  # one after the other
    for scrape in (hanging[2], second):
        limits.withdraw(scrape.node, scrape)
    limits.leave("b-1")
    assert (limits.running, limits.waiting, limits._held, limits._waiters, limits._ready) == (
        0,
        0,
        {},
        {},
        {},
    )


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_never_beyond_the_limits_and_never_stuck(
    seed: int, per_node: int, overall: int, has_groups: bool
) -> None:
    """Keeps to both limits in any order of events, and lets everyone in who stays, in groups or not."""
    pick = random.Random(seed)
    allowed = Concurrency(per_node=per_node, overall=overall, patience=3)
    limits = Limits(allowed, (lambda node: node in ("a", "b")) if has_groups else None)
    present: list[Scrape] = []
    for _ in range(60):
        if present and pick.random() < 0.5:
            scrape = present.pop(pick.randrange(len(present)))
            if scrape.runs:
                limits.leave(scrape.node)
            else:
                limits.withdraw(scrape.node, scrape)
        else:
            scrape = Crowded(limits, pick.choice("abcd"), present)
            if enter(limits, scrape) is not Admission.FULL:
                present.append(scrape)
        running = [scrape.node for scrape in present if scrape.runs]
        assert len(running) == limits.running <= overall
        assert all(running.count(node) <= per_node for node in running)
        waiting = [scrape for scrape in present if not scrape.runs]
        assert len(waiting) == limits.waiting
        if len(running) < overall:
            assert all(running.count(scrape.node) == per_node for scrape in waiting)
    while present:
        scrape = next(scrape for scrape in present if scrape.runs)
        present.remove(scrape)
        limits.leave(scrape.node)
    assert (limits.running, limits.waiting, limits._claimed, limits._queues) == (0, 0, {}, {})
    assert (limits._held, limits._waiters, limits._ready) == ({}, {}, {})


@pytest.mark.parametrize(
    ("announced", "seconds"),
    [
        (b"10", 9.5),
        (b"10.000000", 9.5),
        (b"2", 1.8),
        (b"5", 4.5),
        (b"0.1", 0.09),
        (b"1e1", 9.5),
        (b"3600", 59.5),
        (b"1e400", 29.5),
        (None, 29.5),
        (b"", 29.5),
        (b"0", 29.5),
        (b"-5", 29.5),
        (b"nan", 29.5),
        (b"inf", 29.5),
        (b"ten", 29.5),
        (b"10, 10", 29.5),
        (b"\xff", 29.5),
    ],
)
def test_deadline(announced: bytes | None, seconds: float) -> None:
    """Stays slightly below what is announced, capped, and has its own where nothing sound is."""
    assert math.isclose(scrape_deadline(announced, 60.0), seconds)


@given(st.one_of(st.binary(max_size=20), st.floats().map(lambda value: str(value).encode())))
def test_deadline_of_anything(announced: bytes) -> None:
    """Is positive and within the cap whatever a caller sends."""
    assert 0 <= scrape_deadline(announced, 60.0) <= 60.0
