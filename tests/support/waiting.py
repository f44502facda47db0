"""Time in tests: `until` waits for a condition, with a bound that only a fault reaches, and a Clock is moved by hand."""

import asyncio
import inspect
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

# Seconds. A passing test never waits so long; a machine that is busy with something else may come close. On one that is
# slower still, PATIENCE_FACTOR=3 has every wait last three times as long.
PATIENCE_FACTOR = float(os.environ.get("PATIENCE_FACTOR", "1"))
PATIENCE = (60.0 if os.environ.get("CI") else 30.0) * PATIENCE_FACTOR
SLACK = PATIENCE / 2  # seconds that a busy machine may add to a time a test measures
STRETCHES = (1, 2, 4, 8)


async def until(
    condition: Callable[[], object],
    what: str = "",
    *,
    within: float = PATIENCE,
    every: float = 0.05,
    context: Callable[[], object] = str,
) -> None:
    """Wait until a condition, plain or async, holds; raise TimeoutError with `context()` when it does not.

    It is looked at soon again at first, then each time `every` seconds have passed.
    """
    pause = 0.002
    try:
        async with asyncio.timeout(within):
            while not await _value(condition):
                await asyncio.sleep(min(pause, every))
                pause *= 1.5
    except TimeoutError:
        raise TimeoutError(f"not within {within:g} s: {what or condition}\n{context()}") from None


async def _value(condition: Callable[[], object]) -> object:
    found = condition()
    return await found if inspect.isawaitable(found) else found


async def slept(seconds: float) -> float:
    """Sleep, and return how many times as long it took: what is bounded in that time is bounded in proportion."""
    began = time.monotonic()
    await asyncio.sleep(seconds)
    return (time.monotonic() - began) / seconds


class Lateness:
    """The most seconds by which the event loop ran a timer late, as on a machine that is busy with something else."""

    EVERY = 0.02  # seconds

    def __init__(self) -> None:
        self._most = 0.0
        self._due = time.monotonic()

    @property
    def most(self) -> float:
        """The most so far, with a timer that is late just now."""
        return max(self._most, time.monotonic() - self._due)

    async def watch(self) -> None:
        """Look until cancelled."""
        while True:
            self._due = time.monotonic() + self.EVERY
            await asyncio.sleep(self.EVERY)
            self._most = self.most


async def unless_late(attempt: Callable[[int], Awaitable[object]], *, by: float) -> None:
    """Run a test whose times are short, and again if it fails where the event loop was late `by` seconds or more.

    The attempt multiplies its times by the number that it gets, so that a slow machine has more. A failure without
    such a delay is one of the code.
    """
    for stretch in STRETCHES:
        lateness = Lateness()
        watching = asyncio.create_task(lateness.watch())
        try:
            await attempt(stretch)
        except (Exception, pytest.fail.Exception):
            if lateness.most < by or stretch == STRETCHES[-1]:
                raise
        else:
            return
        finally:
            watching.cancel()


async def most_between_turns(items: AsyncIterator[object]) -> int:
    """Read to the end; return how many items came, at most, while nothing else had its turn of the event loop."""
    count = most = 0

    async def take_turns() -> None:
        nonlocal count
        while True:
            count = 0
            await asyncio.sleep(0)

    turning = asyncio.create_task(take_turns())
    async for _ in items:
        count += 1
        most = max(most, count)
    turning.cancel()
    return most


class Clock:
    """A clock that a test moves: by itself it stands still, or it follows another one.

    `step` seconds pass by each look, for what wants moments in order.
    """

    def __init__(
        self, offset: float = 0.0, *, follows: Callable[[], float] = float, step: float = 0.0
    ) -> None:
        self.offset = offset
        self._follows = follows
        self._step = step

    def __call__(self) -> float:
        self.offset += self._step
        return self.now

    @property
    def now(self) -> float:
        """The time."""
        return self._follows() + self.offset

    @now.setter
    def now(self, moment: float) -> None:
        self.offset += moment - self.now

    def skip(self, seconds: float) -> None:
        """Move on, as if the process had been suspended."""
        self.offset += seconds
