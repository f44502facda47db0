"""Deadlines of many scrapes, on a real clock with short times."""

import asyncio
import gc

import pytest

from k8s_consul_registrar.proxy.relay import GRAIN, SHORT, Deadlines
from support.waiting import SLACK, until

pytestmark = pytest.mark.both_loops


class Bounded:
    """Notes when its time was up."""

    def __init__(self, deadlines: Deadlines, seconds: float) -> None:
        self.told: list[float] = []
        self._loop = asyncio.get_running_loop()
        self.seconds = seconds
        self.began = self._loop.time()
        deadlines.start(self, seconds)

    def expire(self) -> None:
        """Note it."""
        self.told.append(self._loop.time() - self.began)


async def test_each_is_told_once_and_in_time() -> None:
    """A short one to the moment, a long one at most a grain later (and what the machine takes)."""
    deadlines = Deadlines(asyncio.get_running_loop())
    bounded = [Bounded(deadlines, seconds) for seconds in (0.05, SHORT, 0.05, SHORT + 0.05, SHORT)]
    await until(lambda: all(each.told for each in bounded))
    for each in bounded:
        (told,) = each.told
        assert each.seconds - 0.005 <= told <= each.seconds + GRAIN + SLACK


async def test_deadline_of_an_ended_scrape_is_forgotten() -> None:
    """Forgets those who stop, whatever lengths they had, and stops looking at the clock."""
    deadlines = Deadlines(asyncio.get_running_loop())
    bounded = [Bounded(deadlines, seconds) for seconds in (0.05, SHORT, *(SHORT + n / 7 for n in range(20)))]
    for each in bounded:
        deadlines.stop(each, each.seconds)
    await asyncio.sleep(3 * GRAIN)
    await until(lambda: (deadlines._lanes, deadlines._timers, deadlines._ticking) == ({}, {}, None))
    assert not any(each.told for each in bounded)


async def test_later_one_is_told_after_a_pause() -> None:
    """Looks at the clock again for a newcomer after all had gone."""
    deadlines = Deadlines(asyncio.get_running_loop())
    first = Bounded(deadlines, SHORT)
    deadlines.stop(first, SHORT)
    await asyncio.sleep(3 * GRAIN)
    second = Bounded(deadlines, SHORT)
    await until(lambda: second.told)
    assert (len(first.told), len(second.told)) == (0, 1)


async def test_closing_reports_nothing() -> None:
    """Leaves no timer behind."""
    deadlines = Deadlines(asyncio.get_running_loop())
    bounded = [Bounded(deadlines, seconds) for seconds in (0.05, SHORT)]
    deadlines.close()
    gc.collect()
    await asyncio.sleep(0.1)
    assert not any(each.told for each in bounded)
    assert deadlines._ticking is None
