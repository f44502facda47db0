"""When scrapes run out of time: one look at a clock for many of them, since nearly all end long before."""

import asyncio
from typing import Protocol

# How late a scrape may be told, in seconds; a scrape that is short compared with it has a timer of its own.
GRAIN = 0.1
SHORT = 20 * GRAIN


class Bounded(Protocol):
    """Whoever has a deadline."""

    def expire(self) -> None:
        """End: the time is up."""


class Deadlines:
    """Tells each of many that its time is up, unless it has gone before.

    Prometheus announces the same timeout for a whole job, so those of one length stand in a queue in which the
    first is always the next to be told. A timer each would cost more than the rest of a scrape's bookkeeping.
    """

    __slots__ = ("_lanes", "_loop", "_ticking", "_timers")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lanes: dict[float, dict[Bounded, float]] = {}
        self._timers: dict[Bounded, asyncio.TimerHandle] = {}
        self._ticking: asyncio.TimerHandle | None = None

    def start(self, bounded: Bounded, seconds: float) -> None:
        """Tell it in so many seconds, at most `GRAIN` later; what is shorter than `SHORT` to the millisecond."""
        if seconds < SHORT:
            self._timers[bounded] = self._loop.call_later(seconds, self._tell, bounded)
            return
        lane = self._lanes.get(seconds)
        if lane is None:
            lane = self._lanes[seconds] = {}
        lane[bounded] = self._loop.time() + seconds
        if self._ticking is None:
            self._ticking = self._loop.call_later(GRAIN, self._tick)

    def stop(self, bounded: Bounded, seconds: float) -> None:
        """Tell it nothing any more; `seconds` is what it began with."""
        if seconds < SHORT:
            timer = self._timers.pop(bounded, None)
            if timer is not None:
                timer.cancel()
            return
        lane = self._lanes.get(seconds)
        if lane is not None:
            lane.pop(bounded, None)

    def close(self) -> None:
        """Tell nobody any more."""
        for timer in (*self._timers.values(), *((self._ticking,) if self._ticking is not None else ())):
            timer.cancel()
        self._timers.clear()
        self._lanes.clear()
        self._ticking = None

    def _tell(self, bounded: Bounded) -> None:
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
                # Lengths come from callers: those nobody has now must not gather.
                del self._lanes[seconds]
        for seconds, bounded in due:
            self.stop(bounded, seconds)
            bounded.expire()
        if self._lanes and self._ticking is None:
            self._ticking = self._loop.call_later(GRAIN, self._tick)
