"""Limits of scrapes that run at once, for each node and over all, and the queues for a place."""

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Protocol

DEFAULT_SCRAPE_TIMEOUT = 30.0


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


class Admission(Enum):
    """Result of asking for a place."""

    RUN = "run"
    WAIT = "wait"
    FULL = "full"


class Limits:
    """The places and their queues, first come first served.

    A scrape first claims a place of its node, and only then joins the queue for a place over all. So a node
    that hangs fills only its own queue.
    """

    def __init__(self, allowed: Concurrency) -> None:
        self._allowed = allowed
        # By node: scrapes that run or wait for a place over all; and the queue for one of the node's places.
        self._claimed: dict[Hashable, int] = {}
        self._queues: dict[Hashable, deque[Waiter]] = {}
        self._ready: deque[tuple[Hashable, Waiter]] = deque()
        self.running = 0
        self.waiting = 0

    def enter(self, node: Hashable, waiter: Waiter) -> Admission:
        """Ask for a place; after RUN or a later `admitted()` it is held until `leave`."""
        allowed, claimed = self._allowed, self._claimed.get(node, 0)
        has_claim = claimed < allowed.per_node
        if has_claim and self.running < allowed.overall:
            self._claimed[node] = claimed + 1
            self.running += 1
            return Admission.RUN
        if self.waiting >= allowed.patience * allowed.overall:
            return Admission.FULL
        if has_claim:
            self._claimed[node] = claimed + 1
            self._ready.append((node, waiter))
        else:
            queue = self._queues.setdefault(node, deque())
            if len(queue) >= allowed.patience * allowed.per_node:
                return Admission.FULL
            queue.append(waiter)
        self.waiting += 1
        return Admission.WAIT

    def leave(self, node: Hashable) -> None:
        """Give a place back, and admit the next scrape."""
        self.running -= 1
        self._unclaim(node)
        if self._ready:
            self._admit()

    def withdraw(self, node: Hashable, waiter: Waiter) -> None:
        """Stop waiting."""
        self.waiting -= 1
        queue = self._queues.get(node)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._queues[node]
            return
        self._ready.remove((node, waiter))
        self._unclaim(node)
        self._admit()

    def _unclaim(self, node: Hashable) -> None:
        queue = self._queues.get(node)
        if queue is not None:
            self._ready.append((node, queue.popleft()))
            if not queue:
                del self._queues[node]
            return
        claimed = self._claimed[node] - 1
        if claimed:
            self._claimed[node] = claimed
        else:
            del self._claimed[node]

    def _admit(self) -> None:
        while self._ready and self.running < self._allowed.overall:
            _, waiter = self._ready.popleft()
            self.running += 1
            self.waiting -= 1
            waiter.admitted()


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
