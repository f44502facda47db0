"""Helpers for one event loop: long work in slices, tasks that end together."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_slices(items: Iterable[T], size: int) -> AsyncIterator[T]:
    """Yield the items, and let other tasks run after every `size` of them."""
    for count, item in enumerate(items, 1):
        yield item
        if count % size == 0:
            await asyncio.sleep(0)


async def end_tasks(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until all of them have ended; their results and errors are dropped."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
