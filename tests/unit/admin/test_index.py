"""The index of rows: sorted as at once, counted, kept until they change, and other tasks run meanwhile."""

import asyncio
import random
from collections import Counter

import pytest

from k8s_consul_registrar.admin.index import SLICE, Search, sorted_in_slices
from k8s_consul_registrar.admin.status_api import rejection_index
from support.seen import Registrar, pod_rejection


@pytest.mark.parametrize("count", [0, 1, SLICE - 1, SLICE, SLICE + 1, 10 * SLICE + 7])
@pytest.mark.parametrize("spread", [1, 5, 10**9], ids=["all alike", "much alike", "hardly alike"])
async def test_order_is_that_of_sorting_at_once(count: int, spread: int) -> None:
    """Whatever there is of it, in whichever order it comes, equal ones stay as they were."""
    pick = random.Random(count)
    for items in (
        [(pick.randrange(spread), number) for number in range(count)],
        [(number % spread, number) for number in range(count)],
        [((count - number) % spread, number) for number in range(count)],
    ):
        assert await sorted_in_slices(items, lambda item: item[0]) == sorted(items, key=lambda item: item[0])


async def test_others_get_their_turn_many_times() -> None:
    """While 80,000 are put in order the loop turns nearly twice a slice: no step has them all."""
    items = list(range(80_000))
    random.Random(1).shuffle(items)
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    ticking = asyncio.create_task(tick())
    assert await sorted_in_slices(items, int) == list(range(80_000))
    ticking.cancel()
    assert turns > 1.5 * 80_000 / SLICE


async def test_rejections_are_found_counted_and_kept_until_they_change() -> None:
    """One snapshot serves until there are others, or for some seconds; a search narrows it."""
    registrar, now = Registrar(), [0.0]
    registrar.rejected = [
        pod_rejection(f"web-{number}", reason, "why", "shop" if number % 2 else "bank")
        for number, reason in enumerate(["no_ip", "no_port"] * 1500)
    ]
    index = rejection_index(registrar, lambda: now[0])
    first = await index.snapshot()
    assert first.rows == sorted(registrar.rejected, key=lambda one: one.key)
    assert first.counts["reason"] == Counter(no_ip=1500, no_port=1500)
    found = await first.find(
        Search(("web-7",), (("namespace", frozenset({"shop"})), ("reason", frozenset({"no_port"}))))
    )
    assert found
    assert all(one.key.name.startswith("web-7") and one.key.namespace == "shop" for one in found)
    assert await index.snapshot() is first
    now[0] = 11.0
    again = await index.snapshot()
    assert again is not first
    registrar.rejected = registrar.rejected[1:]
    assert len((await index.snapshot()).rows) == 2999
