"""Sorts much without standing in anybody's way: in slices, between which the loop gets its turn."""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

# So many are sorted at a time: a few ms.
SLICE = 1000
# So many items are looked at for each boundary between two slices, so that slices come out about even.
_SAMPLED = 8

T = TypeVar("T")


async def sorted_in_turns(items: Sequence[T], key: Callable[[T], Any]) -> list[T]:
    """Return the items in order; equal ones stay as they were.

    A sample gives boundaries, by which the items are dealt out into slices that follow one another; each
    is sorted by itself, so that there is nothing to merge.
    """
    count = len(items) // SLICE
    sample = sorted(key(item) for item in items[:: max(1, len(items) // (_SAMPLED * count or 1))])
    bounds = sample[_SAMPLED::_SAMPLED] if count else []
    slices: list[list[T]] = [[] for _ in range(len(bounds) + 1)]
    for start in range(0, len(items), SLICE):
        for item in items[start : start + SLICE]:
            slices[bisect_right(bounds, key(item))].append(item)
        await asyncio.sleep(0)
    ordered: list[T] = []
    for one in slices:
        ordered += sorted(one, key=key)
        await asyncio.sleep(0)
    return ordered
