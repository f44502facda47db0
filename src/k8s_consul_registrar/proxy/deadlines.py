"""Deadlines of scrapes: one look at the clock for many of them, since nearly all end long before."""

import asyncio
from typing import Protocol

# The most that a scrape may outlast its deadline, in seconds; a much shorter scrape has a timer of its own.
GRAIN = 0.1
SHORT = 20 * GRAIN


class Bounded(Protocol):
    """Anything with a deadline."""

    def expire(self) -> None:
        """End, because the time is up."""


class Deadlines:
    """Deadlines by length, the earliest first in each.

    Prometheus announces one timeout for a whole job, so scrapes with the same timeout form a queue whose first
    is always the next to expire. A timer each would cost more than the rest of a scrape's bookkeeping.
    """

    __slots__ = ("_lanes", "_loop", "_ticking", "_timers")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lanes: dict[float, dict[Bounded, float]] = {}
        self._timers: dict[Bounded, asyncio.TimerHandle] = {}
        self._ticking: asyncio.TimerHandle | None = None

    def start(self, bounded: Bounded, seconds: float) -> None:
        """Expire `bounded` in `seconds`, at most `GRAIN` later; to the millisecond where shorter than `SHORT`."""
        if seconds < SHORT:
            self._timers[bounded] = self._loop.call_later(seconds, self._expire, bounded)
            return
        lane = self._lanes.get(seconds)
        if lane is None:
            lane = self._lanes[seconds] = {}
        lane[bounded] = self._loop.time() + seconds
        if self._ticking is None:
            self._ticking = self._loop.call_later(GRAIN, self._tick)

    def stop(self, bounded: Bounded, seconds: float) -> None:
        """Forget a deadline; `seconds` is what it began with."""
        if seconds < SHORT:
            timer = self._timers.pop(bounded, None)
            if timer is not None:
                timer.cancel()
            return
        lane = self._lanes.get(seconds)
        if lane is not None:
            lane.pop(bounded, None)

    def close(self) -> None:
        """Forget all."""
        for timer in (*self._timers.values(), *((self._ticking,) if self._ticking is not None else ())):
            timer.cancel()
        self._timers.clear()
        self._lanes.clear()
        self._ticking = None

    def _expire(self, bounded: Bounded) -> None:
        self._timers.pop(bounded, None)
        bounded.expire()

    def _tick(self) -> None:
        self._ticking = None
        now = self._loop.time()
        due = []
        for seconds, lane in list(self._lanes.items()):
            for bounded, at in lane.items():
                if at > now:
                    break
                due.append((seconds, bounded))
            if not lane:
                # Clients choose the lengths, so unused ones must not gather.
                del self._lanes[seconds]
        for seconds, bounded in due:
            self.stop(bounded, seconds)
            bounded.expire()
        if self._lanes and self._ticking is None:
            self._ticking = self._loop.call_later(GRAIN, self._tick)
