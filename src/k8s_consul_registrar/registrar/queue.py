"""Work queue: service IDs to reconcile, each with its own due time and backoff. Pure.

The rules are client-go's (`util/workqueue`): an ID is queued once however often it is added, an ID in flight
is not taken a second time, and one added meanwhile is taken again afterwards.
"""

import heapq
import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from enum import IntEnum
from typing import NamedTuple

import msgspec

# Bulk work, removals and retries each get one batch in this many, however many changes wait.
BULK_SHARE = 4
# Bulk batches leave one slot in this many to changes.
SLOTS_FOR_CHANGES = 4
# Removals have one slot in this many, and small batches: Consul makes one write after the other,
# so a change waits for all that are ahead of it, while a removal has time. A single write beside 6,000 removals had a
# p99 of 133 ms with 8 batches of 64 in flight, 35 ms with one, and 19 ms with one of 32, which took hardly longer.
SLOTS_PER_REMOVAL = 8
REMOVAL_BATCH = 32
# Seconds from one batch of removals to the next, unless that is full: a transaction costs Consul, and this program, as
# much as twenty removals.
GATHER_REMOVALS = 0.02
# Seconds between two writes of one ID at least, so that an object that flaps does not starve the others.
MIN_INTERVAL = 0.2
# An ID that moves to another queue leaves its entry behind; beyond this many, stale entries are dropped.
MOST_LEFT_BEHIND = 1000


class Priority(IntEnum):
    """Order of work: changes that an event caused go before bulk work (first fill, repairs).

    Removals that events caused are in between, so that thousands of them delay no new object.
    """

    CHANGE = 0
    REMOVAL = 1
    BULK = 2


class Batch(NamedTuple):
    """IDs to reconcile together; with `is_retry` each of them failed before."""

    ids: tuple[str, ...]
    is_retry: bool = False
    priority: Priority = Priority.CHANGE


class _Item(msgspec.Struct, gc=False):
    """One ID that waits or is in flight.

    `failures` counts refusals in a row; `heard_at` is when the first event of the change arrived.
    """

    priority: Priority
    due: float = 0.0
    failures: int = 0
    heard_at: float | None = None
    is_ready: bool = False
    is_in_flight: bool = False
    is_added_again: bool = False

    @property
    def is_retry(self) -> bool:
        return self.failures > 0


class _Group(msgspec.Struct):
    """IDs that become due once every ID of `awaited` was tried."""

    awaited: set[str]
    ids: tuple[str, ...]
    priority: Priority
    heard_at: float | None


class WorkQueue:
    """Service IDs that await a decision; all times are seconds of one monotonic clock.

    Backoff doubles from `first` to `cap` with jitter and belongs to one ID: only Consul's refusal of that ID
    makes it grow.
    """

    def __init__(
        self,
        *,
        first: float = 0.5,
        cap: float = 600.0,
        min_interval: float = MIN_INTERVAL,
        pick: random.Random | None = None,
    ) -> None:
        self._first = first
        self._cap = max(cap, first)
        self._min_interval = min_interval
        self._pick = pick or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._items: dict[str, _Item] = {}
        self._changes: deque[str] = deque()
        self._removals: deque[str] = deque()
        self._bulk: deque[str] = deque()
        self._retries: deque[str] = deque()
        self._first_tries = (self._changes, self._removals, self._bulk)  # by priority
        self._later: list[tuple[float, str]] = []
        # IDs written recently, and the time before which each is not written again; in order of time. A plain dict
        # would be searched from its beginning for each one that goes.
        self._resting: OrderedDict[str, float] = OrderedDict()
        self._groups: dict[str, list[_Group]] = {}
        # Batches since the last one of bulk work, of removals and of retries.
        self._since = [0, 0, 0]
        # Until this moment removals wait for a batch of this size.
        self._gathers_until, self._gathered = -math.inf, 0
        self.in_flight = 0

    def __len__(self) -> int:
        """Return the number of IDs that wait or are in flight."""
        return len(self._items)

    def backs_off(self, service_id: str) -> bool:
        """Return True if an ID failed and waits for another try."""
        item = self._items.get(service_id)
        return item is not None and item.is_retry and not item.is_in_flight

    def is_pending(self, service_id: str) -> bool:
        """Return whether an ID is in flight, or waits for its first try."""
        item = self._items.get(service_id)
        return item is not None and (item.is_in_flight or not item.is_retry)

    def add(
        self, service_id: str, now: float, priority: Priority = Priority.CHANGE, heard_at: float | None = None
    ) -> None:
        """Queue an ID; a change overtakes bulk work and makes an ID that backs off due at once.

        Of several events the last one decides: a Pod is changed before it is deleted, and its removal must not
        take the place of a change.
        """
        item = self._items.get(service_id)
        if item is None:
            item = self._items[service_id] = _Item(priority, heard_at=heard_at)
            self._schedule(service_id, item, self._resting.get(service_id, now), now)
            return
        if priority is not item.priority and priority is not Priority.BULK:
            item.priority, item.is_ready = priority, False
        if heard_at is not None and item.heard_at is None:
            item.heard_at = heard_at
        if item.is_in_flight:
            item.is_added_again = True
        elif not item.is_ready and (priority is not Priority.BULK or not item.is_retry):
            self._schedule(service_id, item, max(now, self._resting.get(service_id, 0.0)), now)

    def add_after(
        self,
        ids: Iterable[str],
        awaited: Iterable[str],
        now: float,
        priority: Priority = Priority.CHANGE,
        heard_at: float | None = None,
    ) -> None:
        """Queue IDs once each of `awaited` was tried: removals follow the registrations they belong to."""
        ids = tuple(ids)
        waiting = {one for one in awaited if self.is_pending(one)} if ids else ()
        if not waiting:
            for service_id in ids:
                self.add(service_id, now, priority, heard_at)
            return
        group = _Group(set(waiting), ids, priority, heard_at)
        for service_id in waiting:
            self._groups.setdefault(service_id, []).append(group)

    @property
    def bulk_waiting(self) -> int:
        """About how many IDs of bulk work are due; some of them may have gone ahead meanwhile."""
        return len(self._bulk)

    @property
    def has_waiting(self) -> bool:
        """True if an ID waits, due or not; between two changes usually none does."""
        return len(self._items) > self.in_flight

    @property
    def is_drained(self) -> bool:
        """True if no ID is in flight or due; IDs that back off do not count."""
        return not self.in_flight and not (self._items and self._has_ready())

    def take(self, limit: int, now: float, *, without: Collection[Priority] = ()) -> Batch | None:
        """Return the next batch of at most `limit` IDs, fewer of removals; None if nothing is due.

        Work of the priorities in `without` is left out.
        """
        if not self.has_waiting:
            return None
        self._wake(now)
        others = (self._bulk, self._removals, self._retries)
        # Nothing may starve beside endless changes: once its turn has come, the ID that waits longest goes first.
        turns = sorted(
            (-since, number) for number, since in enumerate(self._since) if since >= BULK_SHARE - 1
        )
        order = [others[number] for _, number in turns]
        order += [self._changes, self._retries, self._removals, self._bulk]
        for ready in order:
            priority = self._priority_of(ready)
            most = min(limit, REMOVAL_BATCH) if priority is Priority.REMOVAL else limit
            if priority is Priority.REMOVAL and self._gathers(now):
                continue
            if priority in without or not (ids := self._take_from(ready, most)):
                continue
            if priority is Priority.REMOVAL:
                self._gathers_until, self._gathered = now + GATHER_REMOVALS, most
            for number, other in enumerate(others):
                self._since[number] = 0 if other is ready else self._since[number] + 1
            return Batch(tuple(ids), ready is self._retries, priority)
        return None

    def done(self, service_id: str, now: float, *, was_written: bool = False) -> float | None:
        """Note that an ID needs nothing more; return when the event of its change arrived, None without one."""
        item = self._items[service_id]
        heard_at = item.heard_at
        was_added_again = self._land(service_id, item, now)
        if was_written:
            self._rest(service_id, now)
        if was_added_again:
            item.failures = 0
            item.heard_at = None
            self._schedule(service_id, item, max(now, self._resting.get(service_id, 0.0)), now)
        else:
            del self._items[service_id]
        return heard_at

    def retry(self, service_id: str, now: float) -> None:
        """Try an ID again after its own backoff: Consul refused it."""
        item = self._items[service_id]
        was_added_again = self._land(service_id, item, now)
        item.failures += 1
        delay = min(self._first * 2.0 ** min(item.failures - 1, 40), self._cap)
        wait = 0.0 if was_added_again else self._pick.uniform(delay / 2, delay)
        self._rest(service_id, now)
        self._schedule(service_id, item, max(now + wait, self._resting.get(service_id, 0.0)), now)

    def release(self, ids: Iterable[str], now: float) -> None:
        """Put taken IDs back as they were: Consul was unavailable, which ages no ID."""
        for service_id in ids:
            item = self._items[service_id]
            self.in_flight -= 1
            item.is_in_flight = item.is_added_again = False
            self._schedule(service_id, item, now, now)

    def next_due(self, now: float, *, without: Collection[Priority] = ()) -> float:
        """Return when an ID is due next that `take` would return, infinity if none waits."""
        if not self.has_waiting:
            return math.inf
        self._wake(now)
        gathers = self._gathers(now)
        if self._has_ready((*without, Priority.REMOVAL) if gathers else without):
            return now
        while self._later and not self._is_current(*self._later[0]):
            heapq.heappop(self._later)
        due = self._later[0][0] if self._later else math.inf
        has_removals = Priority.REMOVAL not in without and self._first_of(self._removals) is not None
        return min(due, self._gathers_until) if gathers and has_removals else due

    def clear(self) -> None:
        """Forget every ID that waits; a resync finds again what differs."""
        self._items = {one: item for one, item in self._items.items() if item.is_in_flight}
        for item in self._items.values():
            item.is_added_again = False
        for ready in (self._changes, self._removals, self._bulk, self._retries):
            ready.clear()
        self._later.clear()
        self._groups.clear()

    def _land(self, service_id: str, item: _Item, now: float) -> bool:
        """Note that an ID in flight was tried; return whether it was added again meanwhile."""
        self.in_flight -= 1
        was_added_again, item.is_in_flight, item.is_added_again = item.is_added_again, False, False
        for group in self._groups.pop(service_id, ()):
            group.awaited.discard(service_id)
            if not group.awaited:
                for one in group.ids:
                    self.add(one, now, group.priority, group.heard_at)
        return was_added_again

    def _rest(self, service_id: str, now: float) -> None:
        """Begin the pause after a write, refused or not; the order of `_resting` is that of time."""
        if self._min_interval:
            self._resting.pop(service_id, None)
            self._resting[service_id] = now + self._min_interval

    def _schedule(self, service_id: str, item: _Item, due: float, now: float) -> None:
        item.due = due
        item.is_ready = due <= now
        if not item.is_ready:
            heapq.heappush(self._later, (due, service_id))
            return
        ready = self._ready_of(item)
        ready.append(service_id)
        if len(ready) > 2 * len(self._items) + MOST_LEFT_BEHIND:
            waiting = dict.fromkeys(one for one in ready if self._waits_in(ready, one) is not None)
            ready.clear()
            ready.extend(waiting)

    def _ready_of(self, item: _Item) -> deque[str]:
        return self._retries if item.failures else self._first_tries[item.priority]

    def _is_current(self, due: float, service_id: str) -> bool:
        item = self._items.get(service_id)
        return item is not None and not item.is_in_flight and not item.is_ready and item.due == due

    def _has_ready(self, without: Collection[Priority] = ()) -> bool:
        """Return whether an ID is due."""
        queues = (self._changes, self._removals, self._retries, self._bulk)
        return any(
            self._first_of(ready) is not None for ready in queues if self._priority_of(ready) not in without
        )

    def _gathers(self, now: float) -> bool:
        """Return True if removals wait for more of them to fill a batch."""
        return now < self._gathers_until and len(self._removals) < self._gathered

    def _priority_of(self, ready: deque[str]) -> Priority:
        if ready is self._removals:
            return Priority.REMOVAL
        return Priority.BULK if ready is self._bulk else Priority.CHANGE

    def _first_of(self, ready: deque[str]) -> _Item | None:
        """Return the first item of one queue, None if it is empty; entries of IDs that moved are dropped."""
        while ready:
            item = self._waits_in(ready, ready[0])
            if item is not None:
                return item
            ready.popleft()
        return None

    def _waits_in(self, ready: deque[str], service_id: str) -> _Item | None:
        item = self._items.get(service_id)
        return item if item is not None and item.is_ready and self._ready_of(item) is ready else None

    def _wake(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            due, service_id = heapq.heappop(self._later)
            if self._is_current(due, service_id):
                self._schedule(service_id, self._items[service_id], due, now)
        while self._resting:
            service_id = next(iter(self._resting))
            if self._resting[service_id] > now:
                break
            del self._resting[service_id]

    def _take_from(self, ready: deque[str], limit: int) -> list[str]:
        taken: list[str] = []
        most = limit
        while len(taken) < limit and (item := self._first_of(ready)) is not None:
            if item.is_retry:
                # The more often IDs failed, the fewer travel together, so that a bad one soon travels by itself.
                limit = min(limit, max(1, most >> min(item.failures, 30)))
                if len(taken) >= limit:
                    break
            item.is_ready, item.is_in_flight = False, True
            taken.append(ready.popleft())
        self.in_flight += len(taken)
        return taken


class Slots:
    """The batches in flight, and the priorities of which another one may join them.

    `most` returns how many batches there may be now.
    """

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._taken: Counter[Priority] = Counter()

    @property
    def is_free(self) -> bool:
        """True if a batch may start."""
        return self._taken.total() < self._most()

    def full(self, *, is_bulk_partial: bool) -> list[Priority]:
        """Return the priorities that have all their slots; bulk batches that are not full have one."""
        most = self._most()
        bulk = 1 if is_bulk_partial else max(1, most - most // SLOTS_FOR_CHANGES)
        limits = {Priority.REMOVAL: max(1, most // SLOTS_PER_REMOVAL), Priority.BULK: bulk}
        return [priority for priority, limit in limits.items() if self._taken[priority] >= limit]

    def begin(self, batch: Batch) -> None:
        """Count a batch that starts."""
        self._taken[batch.priority] += 1

    def end(self, batch: Batch) -> None:
        """Forget a batch that ended."""
        self._taken[batch.priority] -= 1
