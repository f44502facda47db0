"""The work queue holds each service ID once, with a due time and a backoff of its own."""

import math
import random
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from k8s_consul_registrar.registrar.queue import (
    GATHER_REMOVALS,
    REMOVAL_BATCH,
    Batch,
    Priority,
    Slots,
    WorkQueue,
)

MOST = 10
NO_BULK = (Priority.BULK,)


def new_queue(*, first: float = 1.0, cap: float = 600.0, min_interval: float = 0.0) -> WorkQueue:
    """Return a queue whose jitter is the same in every run."""
    return WorkQueue(first=first, cap=cap, min_interval=min_interval, pick=random.Random(1))


def take(queue: WorkQueue, now: float = 0.0, limit: int = MOST) -> tuple[str, ...]:
    """Return the IDs of the next batch."""
    batch = queue.take(limit, now)
    return () if batch is None else batch.ids


def fail(queue: WorkQueue, service_id: str, times: int, now: float = 0.0) -> float:
    """Have one ID refused again and again; return when it was refused last."""
    for _ in range(times):
        now = max(now, queue.next_due(now))
        assert service_id in take(queue, now)
        queue.retry(service_id, now)
    return now


def test_queue_id_added_often_is_taken_once() -> None:
    """Adding an ID that waits changes nothing."""
    queue = new_queue()
    for _ in range(3):
        queue.add("a", 0.0)
        queue.add("b", 0.0)
    assert (take(queue), take(queue), len(queue)) == (("a", "b"), (), 2)


def test_queue_batch_holds_at_most_the_limit() -> None:
    """The rest waits for the next batch, in the order in which it was added."""
    queue = new_queue()
    for service_id in "abc":
        queue.add(service_id, 0.0)
    assert (take(queue, limit=2), take(queue, limit=2), queue.in_flight) == (("a", "b"), ("c",), 3)


def test_queue_id_in_flight_is_not_taken_a_second_time() -> None:
    """It is taken again once it has an answer, if it was added meanwhile."""
    queue = new_queue()
    queue.add("a", 0.0)
    assert take(queue) == ("a",)
    queue.add("a", 0.0)
    queue.add("a", 0.0)
    assert take(queue) == ()
    queue.done("a", 0.0)
    assert take(queue) == ("a",)
    queue.done("a", 0.0)
    assert (take(queue), len(queue), queue.in_flight) == ((), 0, 0)


def test_queue_change_during_a_refused_write_is_tried_at_once() -> None:
    """The refused service is no longer the desired one, so its backoff does not count."""
    queue = new_queue(first=60.0)
    queue.add("a", 0.0)
    assert take(queue) == ("a",)
    queue.add("a", 0.0)
    queue.retry("a", 0.0)
    assert take(queue) == ("a",)


def test_queue_change_overtakes_bulk_work() -> None:
    """An ID that waits as bulk work moves ahead when an event tells of it, and is taken once."""
    queue = new_queue()
    for service_id in "abc":
        queue.add(service_id, 0.0, Priority.BULK)
    queue.add("c", 0.0)
    assert queue.take(MOST, 0.0) == Batch(("c",), priority=Priority.CHANGE)
    assert queue.take(MOST, 0.0) == Batch(("a", "b"), priority=Priority.BULK)
    queue.add("a", 0.0, Priority.BULK)
    queue.done("a", 0.0)
    assert take(queue) == ("a",)


def test_queue_removals_of_changed_ids_let_a_new_one_ahead() -> None:
    """A Pod changes before it is deleted: its removal takes a removal's turn, not that of the change."""
    queue = new_queue()
    for number in range(100):
        queue.add(f"gone-{number}", 0.0)
        queue.add(f"gone-{number}", 0.0, Priority.REMOVAL)
    queue.add("new", 0.0)
    assert "new" in take(queue) + take(queue)


def test_queue_removals_that_fill_no_batch_wait_a_moment_for_more() -> None:
    """The first one goes at once; the next ones go when a batch is full, or soon after. Changes wait for none of it."""
    queue = new_queue()
    queue.add("gone", 0.0, Priority.REMOVAL)
    assert take(queue) == ("gone",)
    for number in range(MOST - 1):
        queue.add(f"gone-{number}", 0.0, Priority.REMOVAL)
    assert (take(queue), queue.next_due(0.0), queue.is_drained) == ((), GATHER_REMOVALS, False)
    assert queue.next_due(0.0, without=(Priority.REMOVAL,)) == math.inf
    queue.add("new", 0.0)
    assert (queue.next_due(0.0), take(queue)) == (0.0, ("new",))
    queue.add("gone-too", 0.0, Priority.REMOVAL)
    assert (queue.next_due(0.0), len(take(queue))) == (0.0, MOST)
    queue.add("last", 0.0, Priority.REMOVAL)
    assert take(queue) == ()
    assert (queue.next_due(GATHER_REMOVALS), take(queue, GATHER_REMOVALS)) == (GATHER_REMOVALS, ("last",))


def test_queue_removals_of_one_at_a_time_wait_for_no_more() -> None:
    """An agent is sent one service after the other: nothing fills a batch."""
    queue = new_queue()
    for service_id in "abc":
        queue.add(service_id, 0.0, Priority.REMOVAL)
    assert [take(queue, limit=1) for _ in range(4)] == [("a",), ("b",), ("c",), ()]


def test_queue_change_of_an_id_that_was_to_be_removed_is_a_change() -> None:
    """An ID that comes back waits behind no removals."""
    queue = new_queue()
    for service_id in ("gone-1", "back", "gone-2"):
        queue.add(service_id, 0.0, Priority.REMOVAL)
    queue.add("back", 0.0)
    assert take(queue, limit=1) == ("back",)


def test_queue_removal_of_an_id_in_flight_takes_a_removals_turn() -> None:
    """An event during the write counts for the next turn."""
    queue = new_queue()
    queue.add("gone", 0.0)
    take(queue)
    queue.add("gone", 0.0, Priority.REMOVAL)
    queue.add("new", 0.0)
    queue.done("gone", 0.0)
    assert take(queue) == ("new",)


def test_queue_flapping_id_that_cannot_be_taken_takes_no_room() -> None:
    """While Consul is down nothing is taken; an object that comes and goes must not fill the memory."""
    queue = new_queue()
    tracemalloc.start()
    try:
        for _ in range(20_000):
            queue.add("flapping", 0.0)
            queue.add("flapping", 0.0, Priority.REMOVAL)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    assert (take(queue), take(queue), len(queue)) == (("flapping",), (), 1)


def test_queue_bulk_work_beside_endless_changes_gets_one_batch_in_four() -> None:
    """And no more than that, so that a change waits for one batch at most."""
    queue = new_queue()
    for number in range(100):
        queue.add(f"bulk-{number}", 0.0, Priority.BULK)
    order = ""
    for number in range(24):
        queue.add(f"change-{number}", 0.0)
        queue.add(f"change-again-{number}", 0.0)
        batch = queue.take(1, 0.0)
        assert batch is not None
        order += "b" if batch.priority is Priority.BULK else "c"
    assert order == "cccb" * 6


def test_queue_change_beside_bulk_work_is_taken_next() -> None:
    """Thousands of bulk IDs delay a change by no more than the batch under way."""
    queue = new_queue()
    for number in range(4000):
        queue.add(f"bulk-{number}", 0.0, Priority.BULK)
    for number in range(20):
        assert queue.take(64, 0.0) is not None
        queue.add(f"new-{number}", 0.0)
        assert take(queue) == (f"new-{number}",)


def test_queue_removals_go_in_small_batches() -> None:
    """A change that comes waits in Consul for no more than one of them."""
    queue = new_queue()
    for number in range(200):
        queue.add(f"gone-{number}", 0.0, Priority.REMOVAL)
    batches = [queue.take(128, 0.0), queue.take(8, 0.0)]
    assert [len(batch.ids) for batch in batches if batch is not None] == [REMOVAL_BATCH, 8]


@pytest.mark.parametrize(("most", "removals", "bulk"), [(1, 1, 1), (8, 1, 6), (32, 4, 24)])
def test_slots_leave_room_for_changes(most: int, removals: int, bulk: int) -> None:
    """Removals have an eighth of the slots and bulk work three quarters, one at least."""
    for priority, limit in ((Priority.REMOVAL, removals), (Priority.BULK, bulk)):
        slots = Slots(lambda: most)
        batch = Batch(("a",), priority=priority)
        for _ in range(limit):
            assert priority not in slots.full(is_bulk_partial=False)
            slots.begin(batch)
        assert slots.full(is_bulk_partial=False) == [priority]
        assert slots.is_free is (limit < most)
        slots.end(batch)
        assert slots.is_free
        assert slots.full(is_bulk_partial=False) == []


def test_slots_let_one_batch_of_bulk_work_be_partial() -> None:
    """The next one waits until it is full, or the only one."""
    slots = Slots(lambda: 8)
    slots.begin(Batch(("a",), priority=Priority.BULK))
    assert slots.full(is_bulk_partial=True) == [Priority.BULK]


def test_queue_bulk_work_can_be_left_out() -> None:
    """Changes alone are taken, and nothing if there are none."""
    queue = new_queue()
    queue.add("bulk", 0.0, Priority.BULK)
    assert queue.take(MOST, 0.0, without=NO_BULK) is None
    assert queue.next_due(0.0, without=NO_BULK) == math.inf
    queue.add("change", 0.0)
    assert queue.take(MOST, 0.0, without=NO_BULK) == Batch(("change",))
    assert take(queue) == ("bulk",)


def test_queue_retries_beside_endless_changes_are_taken() -> None:
    """An ID that failed once does not wait until the changes end."""
    queue = new_queue()
    queue.add("failed", 0.0)
    now = fail(queue, "failed", 1) + 10.0
    taken: list[str] = []
    for number in range(8):
        queue.add(f"change-{number}", now)
        queue.add(f"change-again-{number}", now)
        taken += take(queue, now, limit=1)
    assert "failed" in taken


def test_queue_refused_id_backs_off_alone() -> None:
    """One ID that Consul refuses for good delays the retry of no other."""
    queue = new_queue(first=1.0)
    queue.add("bad", 0.0)
    now = fail(queue, "bad", 12)
    queue.add("once", now)
    assert take(queue, now) == ("once",)
    queue.retry("once", now)
    assert queue.next_due(now) <= now + 1.0
    assert take(queue, now + 1.0) == ("once",)


def test_queue_backoff_doubles_up_to_the_cap() -> None:
    """Each wait is between half and the whole of the next power of two."""
    queue = new_queue(first=1.0, cap=8.0)
    queue.add("a", 0.0)
    now = 0.0
    for most in (1.0, 2.0, 4.0, 8.0, 8.0, 8.0):
        assert take(queue, now) == ("a",)
        queue.retry("a", now)
        wait = queue.next_due(now) - now
        assert most / 2 <= wait <= most
        assert take(queue, now + wait * 0.99) == ()
        now += wait


def test_queue_success_ends_the_backoff() -> None:
    """The next failure begins with the first wait again."""
    queue = new_queue(first=1.0)
    queue.add("a", 0.0)
    now = queue_due = fail(queue, "a", 8)
    now = queue.next_due(queue_due)
    assert take(queue, now) == ("a",)
    queue.done("a", now)
    queue.add("a", now)
    assert take(queue, now) == ("a",)
    queue.retry("a", now)
    assert queue.next_due(now) <= now + 1.0


def test_queue_change_makes_an_id_that_backs_off_due() -> None:
    """An event may be the cure; bulk work adds nothing to a wait."""
    queue = new_queue(first=60.0)
    queue.add("a", 0.0)
    fail(queue, "a", 1)
    queue.add("a", 0.0, Priority.BULK)
    assert take(queue) == ()
    queue.add("a", 0.0)
    assert queue.take(MOST, 0.0) == Batch(("a",), is_retry=True)


def test_queue_ids_that_failed_travel_apart() -> None:
    """They roll back none that never failed."""
    queue = new_queue()
    queue.add("bad", 0.0)
    now = queue.next_due(fail(queue, "bad", 1))
    queue.add("good", now)
    assert queue.take(MOST, now) == Batch(("good",))
    assert queue.take(MOST, now) == Batch(("bad",), is_retry=True)


def test_queue_retries_travel_in_batches_that_shrink() -> None:
    """One bad ID of 64 is alone after six failures, so the others get through."""
    queue = new_queue(first=0.0)
    ids = [f"id-{number}" for number in range(64)]
    for service_id in ids:
        queue.add(service_id, 0.0)
    sizes = []
    for _ in range(7):
        batches = [batch.ids for batch in iter(lambda: queue.take(64, 0.0), None)]
        assert sorted(one for batch in batches for one in batch) == sorted(ids)
        sizes.append(max(len(batch) for batch in batches))
        for service_id in ids:
            queue.retry(service_id, 0.0)
    assert sizes == [64, 32, 16, 8, 4, 2, 1]


def test_queue_release_ages_no_id() -> None:
    """IDs that met an outage are due at once: the health of Consul decides when, not a backoff of each."""
    queue = new_queue(first=60.0)
    for service_id in "ab":
        queue.add(service_id, 0.0, heard_at=5.0)
    for _ in range(20):
        taken: list[str] = []
        while ids := take(queue):
            taken += ids
        assert sorted(taken) == ["a", "b"]
        queue.release(taken, 0.0)
        assert (queue.in_flight, queue.next_due(0.0)) == (0, 0.0)
    assert queue.take(MOST, 0.0) == Batch(("a", "b"))


def test_queue_flapping_id_is_written_once_an_interval() -> None:
    """An object that flaps 50 times a second for 10 seconds starves no other, and its last state is written."""
    queue = new_queue(min_interval=0.2)
    writes, others = [], 0
    for step in range(500):
        now = step / 50
        queue.add("flapping", now)
        queue.add(f"other-{step}", now)
        while ids := take(queue, now, limit=1):
            writes += [now] * (ids == ("flapping",))
            others += ids != ("flapping",)
            queue.done(ids[0], now, was_written=True)
    assert others == 500
    assert 45 <= len(writes) <= 51
    assert min(later - earlier for earlier, later in pairwise(writes)) >= 0.199
    last = queue.next_due(10.0)
    assert last <= 10.2
    assert take(queue, last) == ("flapping",)


def test_queue_flapping_id_that_is_refused_is_tried_once_an_interval() -> None:
    """A change makes it due, but a refused write is a write too."""
    queue = new_queue(min_interval=0.2, first=0.5)
    tries = 0
    for step in range(500):
        now = step / 50
        queue.add("flapping", now)
        if take(queue, now):
            tries += 1
            queue.retry("flapping", now)
    assert tries <= 51


def test_queue_id_that_needed_no_write_does_not_rest() -> None:
    """Only writes are spread."""
    queue = new_queue(min_interval=0.2)
    queue.add("a", 0.0)
    take(queue)
    queue.done("a", 0.0, was_written=False)
    queue.add("a", 0.0)
    assert take(queue) == ("a",)


@pytest.mark.parametrize("outcome", ["done", "retry"])
def test_queue_removals_follow_the_first_try_of_registrations(outcome: str) -> None:
    """Whatever became of it: a registration that fails for good keeps no removal back."""
    queue = new_queue()
    queue.add("new-1", 0.0)
    queue.add("new-2", 0.0)
    queue.add_after(["old"], ["new-1", "new-2"], 0.0, heard_at=7.0)
    assert take(queue) == ("new-1", "new-2")
    queue.done("new-1", 0.0)
    assert take(queue) == ()
    match outcome:
        case "done":
            queue.done("new-2", 0.0)
        case "retry":
            queue.retry("new-2", 0.0)
    assert take(queue) == ("old",)
    assert queue.done("old", 0.0) == 7.0


def test_queue_removals_during_an_outage_go_on_waiting() -> None:
    """A registration that met an outage was not answered."""
    queue = new_queue()
    queue.add("new", 0.0)
    queue.add_after(["old"], ["new"], 0.0)
    queue.release(take(queue), 0.0)
    assert take(queue) == ("new",)
    assert take(queue) == ()
    queue.done("new", 0.0)
    assert take(queue) == ("old",)


def test_queue_removals_wait_for_none_that_failed_before_or_is_done() -> None:
    """An ID that backs off was tried; one that is not queued needs nothing."""
    queue = new_queue(first=60.0)
    queue.add("bad", 0.0)
    fail(queue, "bad", 1)
    queue.add_after(["old"], ["bad", "unheard-of"], 0.0, Priority.BULK)
    assert queue.take(MOST, 0.0) == Batch(("old",), priority=Priority.BULK)


def test_queue_removals_of_different_objects_are_independent() -> None:
    """Each group waits for its own registrations only."""
    queue = new_queue()
    queue.add("new-1", 0.0)
    queue.add("new-2", 0.0)
    queue.add_after(["old-1"], ["new-1"], 0.0)
    queue.add_after(["old-2"], ["new-2"], 0.0)
    take(queue)
    queue.done("new-2", 0.0)
    assert take(queue) == ("old-2",)


def test_queue_cleared_forgets_all_but_what_is_in_flight() -> None:
    """Waiting, backing off and awaited IDs go; an answer that arrives later is still taken."""
    queue = new_queue()
    for service_id in ("flying", "failed"):
        queue.add(service_id, 0.0)
    take(queue)
    queue.retry("failed", 0.0)
    queue.add("flying", 0.0)
    queue.add("waiting", 0.0, Priority.BULK)
    queue.add_after(["old"], ["flying"], 0.0)
    queue.clear()
    assert (len(queue), queue.in_flight, queue.next_due(0.0)) == (1, 1, math.inf)
    queue.done("flying", 0.0)
    assert (len(queue), take(queue, 1000.0)) == (0, ())
    queue.add("waiting", 0.0)
    assert take(queue) == ("waiting",)


def test_queue_next_due_is_the_earliest_wait() -> None:
    """Now for what is ready, infinity for nothing, and no time of an ID that was taken since."""
    queue = new_queue(min_interval=30.0)
    assert queue.next_due(0.0) == math.inf
    queue.add("a", 0.0)
    queue.add("b", 0.0)
    assert queue.next_due(3.0) == 3.0
    take(queue)
    assert queue.next_due(0.0) == math.inf
    queue.done("a", 10.0, was_written=True)
    queue.done("b", 0.0, was_written=True)
    queue.add("a", 0.0)
    queue.add("b", 0.0)
    assert queue.next_due(0.0) == 30.0
    take(queue, 30.0)
    assert queue.next_due(30.0) == 40.0


def test_queue_is_drained_without_ids_in_flight_or_due() -> None:
    """An ID that backs off does not count, so one that is refused for good holds nothing up."""
    queue = new_queue()
    seen = [queue.is_drained]
    queue.add("a", 0.0)
    seen.append(queue.is_drained)
    take(queue)
    seen.append(queue.is_drained)
    queue.retry("a", 0.0)
    seen.append(queue.is_drained)
    assert seen == [True, False, False, True]


def test_queue_tells_when_an_event_told_first() -> None:
    """The earliest event counts until the ID is done; one during the write begins a new count."""
    queue = new_queue()
    queue.add("a", 0.0, heard_at=1.0)
    queue.add("a", 0.0, heard_at=2.0)
    take(queue)
    queue.retry("a", 0.0)
    take(queue, 10.0)
    assert queue.done("a", 10.0) == 1.0
    queue.add("a", 10.0, Priority.BULK)
    take(queue, 10.0)
    assert queue.done("a", 10.0) is None


def test_queue_entry_that_overtook_bulk_work_leaves_nothing_due() -> None:
    """A queue without work says so: the daemon would look again and again."""
    queue = new_queue()
    queue.add("a", 0.0, Priority.BULK)
    queue.add("a", 0.0)
    take(queue)
    queue.done("a", 0.0)
    assert (queue.next_due(0.0), queue.is_drained) == (math.inf, True)


class QueueModel(RuleBasedStateMachine):
    """The queue beside a model: which IDs are owed a try, and which are in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WorkQueue(first=1.0, cap=16.0, min_interval=0.5, pick=random.Random(1))
        self.now = 0.0
        self.owed: set[str] = set()
        self.flying: set[str] = set()
        # Added while in flight: owed a try after the answer.
        self.again: set[str] = set()
        self.groups: list[tuple[set[str], str]] = []

    @rule(service_id=st.sampled_from("abcdef"), priority=st.sampled_from(Priority))
    def add(self, service_id: str, priority: Priority) -> None:
        """Add an ID."""
        self.queue.add(service_id, self.now, priority)
        self._owe(service_id)

    @rule(service_id=st.sampled_from("xyz"), awaited=st.sets(st.sampled_from("abcdef"), max_size=3))
    def add_after(self, service_id: str, awaited: set[str]) -> None:
        """Add an ID that follows others."""
        waiting = {one for one in awaited if self.queue.is_pending(one)}
        self.queue.add_after([service_id], awaited, self.now)
        if waiting:
            self.groups.append((waiting, service_id))
        else:
            self._owe(service_id)

    @rule(limit=st.integers(1, 4), without=st.sets(st.sampled_from(Priority)))
    def take(self, limit: int, without: set[Priority]) -> None:
        """Take a batch."""
        batch = self.queue.take(limit, self.now, without=without)
        if batch is None:
            return
        assert 1 <= len(batch.ids) <= limit
        self._taken(batch.ids)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), outcome=st.sampled_from(["done", "written", "retry", "release"]))
    def land(self, data: st.DataObject, outcome: str) -> None:
        """Answer for one ID in flight."""
        service_id = data.draw(st.sampled_from(sorted(self.flying)))
        self.flying.remove(service_id)
        if service_id in self.again or outcome in ("retry", "release"):
            self.owed.add(service_id)
        self.again.discard(service_id)
        if outcome == "release":
            self.queue.release([service_id], self.now)
            return
        for group in tuple(self.groups):
            group[0].discard(service_id)
            if not group[0]:
                self.groups.remove(group)
                self._owe(group[1])
        match outcome:
            case "done":
                self.queue.done(service_id, self.now)
            case "written":
                self.queue.done(service_id, self.now, was_written=True)
            case "retry":
                self.queue.retry(service_id, self.now)

    @rule(seconds=st.floats(0.0, 20.0))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    @rule()
    def clear(self) -> None:
        """Forget what waits."""
        self.queue.clear()
        self.owed.clear()
        self.again.clear()
        self.groups.clear()

    @invariant()
    def counts(self) -> None:
        """Each ID is held once, and those in flight are known."""
        assert len(self.queue) == len(self.owed | self.flying)
        assert self.queue.in_flight == len(self.flying)

    def teardown(self) -> None:
        """Answer everything: each ID that is owed a try gets one within the longest wait."""
        for _ in range(1000):
            for service_id in tuple(self.flying):
                self.flying.remove(service_id)
                if service_id in self.again:
                    self.again.remove(service_id)
                    self.owed.add(service_id)
                for group in tuple(self.groups):
                    group[0].discard(service_id)
                    if not group[0]:
                        self.groups.remove(group)
                        self._owe(group[1])
                self.queue.done(service_id, self.now)
            if not (self.owed or self.groups):
                break
            due = self.queue.next_due(self.now)
            batch = self.queue.take(4, self.now)
            assert (batch is not None) == (due <= self.now)
            if batch is None:
                assert due <= self.now + 16.0
                self.now = due
            else:
                self._taken(batch.ids)
        assert (self.owed, self.groups, len(self.queue), self.queue.next_due(self.now)) == (
            set(),
            [],
            0,
            math.inf,
        )

    def _owe(self, service_id: str) -> None:
        if service_id in self.flying:
            self.again.add(service_id)
        else:
            self.owed.add(service_id)

    def _taken(self, ids: tuple[str, ...]) -> None:
        assert len(set(ids)) == len(ids)
        assert set(ids) <= self.owed
        self.owed -= set(ids)
        self.flying |= set(ids)


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
