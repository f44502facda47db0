"""What passes over changes did, told once a second."""

import asyncio
import math
from collections.abc import Iterable, Mapping
from typing import Any

import structlog

from builders import make_pod
from k8s_consul_registrar.registrar.gathering import EVERY, Gathered, Gathering
from k8s_consul_registrar.registrar.status import PassReport
from memory import PODS
from reconciler_lab import Lab

NAMES = [f"p{number}" for number in range(10)]


def told(lines: Iterable[Mapping[str, Any]]) -> list[tuple[int, int, int]]:
    """Return how many passes, registered and deregistered each line about changes tells of."""
    about = [line for line in lines if line["event"] == "changes" and line["log_level"] == "info"]
    return [(line["passes"], line["registered"], line["deregistered"]) for line in about]


def test_the_first_is_told_at_once_and_the_next_with_those_after_it() -> None:
    """Nothing is told twice, or left out."""
    gathering = Gathering()
    assert gathering.due == math.inf
    gathering.add(PassReport(registered=1, seconds=0.5))
    assert gathering.take(100.0) == Gathered(1, PassReport(registered=1, seconds=0.5))
    for _ in range(3):
        gathering.add(PassReport(updated=2, deregistered=1, refused=1, unchanged=4, rejected=1, seconds=0.5))
        assert gathering.take(100.0 + 0.9 * EVERY) is None
    assert gathering.due == 100.0 + EVERY
    assert gathering.take(gathering.due) == Gathered(
        3, PassReport(updated=6, deregistered=3, refused=3, unchanged=12, rejected=3, seconds=1.5)
    )
    assert gathering.take(1000.0) is None
    assert gathering.rest() is None


def test_what_is_not_due_can_be_told_all_the_same() -> None:
    """For the end, and before something that would be out of order otherwise."""
    gathering = Gathering()
    gathering.add(PassReport(registered=1))
    gathering.take(100.0)
    gathering.add(PassReport(registered=2))
    assert gathering.rest() == Gathered(1, PassReport(registered=2))
    assert gathering.due == math.inf


async def test_a_burst_of_changes_is_two_lines() -> None:
    """One at once, and one with the rest when its second is over, though nothing else happens then."""
    lab = Lab()
    with structlog.testing.capture_logs() as lines:
        async with lab.running():
            await lab.synced()
            lines.clear()
            for count, name in enumerate(NAMES, 1):
                lab.cluster.mirror.put(PODS, make_pod(name))
                await lab.until(NAMES[:count])
            async with asyncio.timeout(10 * EVERY):
                while len(told(lines)) < 2:
                    await asyncio.sleep(0.01)
            lab.cluster.mirror.remove(PODS, make_pod(NAMES[0]))
            await lab.until(NAMES[1:])
    assert told(lines)[:2] == [(1, 1, 0), (len(NAMES) - 1, len(NAMES) - 1, 0)]
    assert told(lines)[2:] == [(1, 0, 1)], "what was not due is told at the end"
