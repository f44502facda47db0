"""Limits of scrapes that run at once and of their time, and of the open connections of clients."""

import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

DEFAULT_SCRAPE_TIMEOUT = 30.0
# A scrape whose client has read nothing for this long gives way to one that waits, in seconds.
STALLED_AFTER = 0.5

ConnectionT = TypeVar("ConnectionT")


@dataclass(frozen=True, slots=True)
class Concurrency:
    """Scrapes that may run, to one node and over all; `patience` times as many may wait."""

    per_node: int = 8
    overall: int = 512
    patience: int = 4


class Waiter(Protocol):
    """A scrape that may have to wait for a place."""

    def admitted(self) -> None:
        """Begin: a place came free."""

    def give_way(self) -> None:
        """End: the client of a running scrape reads nothing, or too many of its group wait."""


class Admission(Enum):
    """Result of asking for a place."""

    RUN = "run"
    WAIT = "wait"
    FULL = "full"


# On the path of every scrape: a global is found faster than the member of an enum.
RUN, WAIT, FULL = Admission


class Limits:
    """The places and their queues.

    A scrape first claims a place of its node, and only then joins the queue for a place over all. So a node
    that hangs fills only its own queue. A place over all goes to the group of nodes that has fewest, and within it
    first come first served: a group whose nodes all hang keeps only places that no other asks for. `group_of` is
    None where all nodes are of one group.
    """

    def __init__(self, allowed: Concurrency, group_of: Callable[[Hashable], Hashable] | None = None) -> None:
        self._allowed = allowed
        self._group_of = group_of
        # By node: scrapes that run or wait for a place over all; and the queue for one of the node's places.
        self._claimed: dict[Hashable, int] = {}
        self._queues: dict[Hashable, deque[Waiter]] = {}
        # By group: scrapes with a claim that wait for a place over all; all that wait, the latest last; and those that run.
        self._ready: dict[Hashable, deque[tuple[Hashable, Waiter]]] = {}
        self._waiters: dict[Hashable, dict[Waiter, None]] = {}
        self._held: dict[Hashable, int] = {}
        # Running scrapes whose clients read nothing, and since when, the longest first.
        self._stalled: dict[Waiter, tuple[Hashable, float]] = {}
        self._is_admitting = False
        self.running = 0
        self.waiting = 0

    def enter(self, node: Hashable, waiter: Waiter, now: float = 0.0) -> Admission:
        """Ask for a place; after RUN or a later `admitted()` it is held until `leave`."""
        allowed = self._allowed
        while True:
            claimed = self._claimed.get(node, 0)
            has_claim = claimed < allowed.per_node
            if has_claim and self.running < allowed.overall:
                self._claimed[node] = claimed + 1
                self.running += 1
                if self._group_of is not None:
                    self._hold(node, 1)
                return RUN
            if not (self._stalled and self._end_stalled(now, None if has_claim else node)):
                break
        if not has_claim and len(self._queues.get(node, ())) >= allowed.patience * allowed.per_node:
            return FULL
        if self.waiting >= allowed.patience * allowed.overall and not self._crowd_out(node):
            return FULL
        if has_claim:
            self._claimed[node] = claimed + 1
            self._get_ready(node, waiter)
        else:
            self._queues.setdefault(node, deque()).append(waiter)
        self.waiting += 1
        self._waiters.setdefault(self._group(node), {})[waiter] = None
        return WAIT

    def leave(self, node: Hashable) -> None:
        """Give a place back, and admit the next scrape."""
        self.running -= 1
        if self._group_of is not None:
            self._hold(node, -1)
        self._unclaim(node)
        if self._ready:
            self._admit()

    def withdraw(self, node: Hashable, waiter: Waiter) -> None:
        """Stop waiting."""
        self._wait_no_more(node, waiter)
        queue = self._queues.get(node)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._queues[node]
            return
        group = self._group(node)
        self._ready[group].remove((node, waiter))
        if not self._ready[group]:
            del self._ready[group]
        self._unclaim(node)
        self._admit()

    def stall(self, node: Hashable, scrape: Waiter, now: float) -> None:
        """Note that the client of a running scrape takes no more for now."""
        self._stalled[scrape] = (node, now)

    def go_on(self, scrape: Waiter) -> None:
        """Note that its client has taken everything, or that the scrape has ended."""
        self._stalled.pop(scrape, None)

    def relieve(self, now: float) -> None:
        """End stalled scrapes while others wait for their places."""
        while self._ready and self._end_stalled(now, None):
            pass
        for node in list(self._queues):
            while node in self._queues and self._end_stalled(now, node):
                pass

    def _end_stalled(self, now: float, node: Hashable | None) -> bool:
        """End the scrape that is stalled longest, of one node or of any; False if none is for long enough."""
        for scrape, (other, since) in self._stalled.items():
            if now - since < STALLED_AFTER:
                return False
            if node is None or node == other:
                del self._stalled[scrape]
                scrape.give_way()
                return True
        return False

    def _unclaim(self, node: Hashable) -> None:
        queue = self._queues.get(node) if self._queues else None
        if queue is not None:
            self._get_ready(node, queue.popleft())
            if not queue:
                del self._queues[node]
            return
        claimed = self._claimed[node] - 1
        if claimed:
            self._claimed[node] = claimed
        else:
            del self._claimed[node]

    def _admit(self) -> None:
        """Admit scrapes while there is room; one that ends as it begins leaves within this call."""
        if self._is_admitting:
            return
        self._is_admitting = True
        try:
            while self._ready and self.running < self._allowed.overall:
                group = min(self._ready, key=lambda group: self._held.get(group, 0))
                queue = self._ready.pop(group)
                node, waiter = queue.popleft()
                if queue:
                    self._ready[group] = queue  # behind the others that have as few places
                self._wait_no_more(node, waiter)
                self.running += 1
                if self._group_of is not None:
                    self._hold(node, 1)
                waiter.admitted()
        finally:
            self._is_admitting = False

    # Groups

    def _group(self, node: Hashable) -> Hashable:
        return None if self._group_of is None else self._group_of(node)

    def _get_ready(self, node: Hashable, waiter: Waiter) -> None:
        self._ready.setdefault(self._group(node), deque()).append((node, waiter))

    def _hold(self, node: Hashable, more: int) -> None:
        group = self._group(node)
        self._held[group] = self._held.get(group, 0) + more
        if not self._held[group]:
            del self._held[group]

    def _wait_no_more(self, node: Hashable, waiter: Waiter) -> None:
        self.waiting -= 1
        group = self._group(node)
        waiters = self._waiters[group]
        del waiters[waiter]
        if not waiters:
            del self._waiters[group]

    def _crowd_out(self, node: Hashable) -> bool:
        """End the latest scrape of the group of which most wait, to make room for one of `node`; False if that is its own group."""
        own = len(self._waiters.get(self._group(node), ()))
        most = max(self._waiters.values(), key=len, default={})
        if len(most) <= own + 1:
            return False
        next(reversed(most)).give_way()
        return True


class _Group(Generic[ConnectionT]):
    """The connections of one identity, the idle ones in the order in which they became so."""

    __slots__ = ("identity", "idle", "is_trusted", "size")

    def __init__(self, identity: Hashable, *, is_trusted: bool) -> None:
        self.identity = identity
        self.is_trusted = is_trusted
        self.idle: dict[ConnectionT, None] = {}
        self.size = 0


class ConnectionLimit(Generic[ConnectionT]):
    """The open connections, by the identity of their clients, and which one gives way to another.

    Where there are too many, idle connections give way, those of untrusted clients first; among these the
    longest idle one of the identity that has most. A connection that never asked is idle since it was opened.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[ConnectionT, _Group[ConnectionT]] = {}
        self._groups: dict[tuple[bool, Hashable], _Group[ConnectionT]] = {}
        # By trust, and by size: the groups of one size in a dictionary each.
        self._by_size: dict[bool, list[dict[_Group[ConnectionT], None]]] = {False: [{}], True: [{}]}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_full(self) -> bool:
        """True if another connection needs one to give way."""
        return len(self._open) >= self._most

    def enter(self, connection: ConnectionT, identity: Hashable) -> None:
        """Add an idle connection of an untrusted client."""
        self._join(connection, identity, is_trusted=False)
        self.end(connection)

    def leave(self, connection: ConnectionT) -> None:
        """Remove a connection; one that was removed before is none any more."""
        if connection in self._open:
            self._part(connection)

    def move(self, connection: ConnectionT, identity: Hashable, *, is_trusted: bool) -> None:
        """Give a connection another identity, or another trust; it stays idle or busy."""
        before = self._open.get(connection)
        if before is None or (before.identity, before.is_trusted) == (identity, is_trusted):
            return
        is_idle = connection in before.idle
        self._part(connection)
        self._join(connection, identity, is_trusted=is_trusted)
        if is_idle:
            self.end(connection)

    def begin(self, connection: ConnectionT) -> None:
        """Keep a connection from giving way: a scrape begins."""
        self._open[connection].idle.pop(connection, None)

    def end(self, connection: ConnectionT) -> None:
        """Let a connection give way again, after those that are idle for longer."""
        group = self._open.get(connection)
        if group is not None:
            group.idle[connection] = None

    def first_to_go(self) -> ConnectionT | None:
        """Return the connection that gives way to another, None if all have scrapes under way."""
        for is_trusted in (False, True):
            for groups in reversed(self._by_size[is_trusted]):
                for group in groups:
                    if group.idle:
                        return next(iter(group.idle))
        return None

    def _join(self, connection: ConnectionT, identity: Hashable, *, is_trusted: bool) -> None:
        key = (is_trusted, identity)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(identity, is_trusted=is_trusted)
        self._open[connection] = group
        self._resize(group, group.size + 1)

    def _part(self, connection: ConnectionT) -> None:
        group = self._open.pop(connection)
        group.idle.pop(connection, None)
        self._resize(group, group.size - 1)
        if not group.size:
            del self._groups[group.is_trusted, group.identity]

    def _resize(self, group: _Group[ConnectionT], size: int) -> None:
        by_size = self._by_size[group.is_trusted]
        by_size[group.size].pop(group, None)
        group.size = size
        if size:
            if size == len(by_size):
                by_size.append({})
            by_size[size][group] = None
        while len(by_size) > 1 and not by_size[-1]:
            by_size.pop()


@lru_cache(maxsize=64)
def scrape_deadline(announced: bytes | None, longest: float) -> float:
    """Return the seconds that a scrape may take, slightly fewer than Prometheus announces.

    `announced` is X-Prometheus-Scrape-Timeout-Seconds: 30 s if it is absent or no positive number, at most
    `longest`. A tenth is kept back, at most half a second, so that Prometheus reads our 504 before its own
    clock runs out.
    """
    timeout = DEFAULT_SCRAPE_TIMEOUT
    if announced is not None:
        try:
            value = float(announced)
        except ValueError:
            value = 0.0
        if value > 0 and math.isfinite(value):
            timeout = value
    timeout = min(timeout, longest)
    return max(0.9 * timeout, timeout - 0.5)
