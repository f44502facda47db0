"""How many services are handed to a registry at once: as many as it takes in a second or two."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

# What was written is noted, and shown, batch by batch; but every batch costs a wait for its last write.
MOST, SECONDS = 8192, 2.0

T = TypeVar("T")


def batch_of(items: Iterator[T], clock: Callable[[], float] = time.monotonic) -> Iterator[T]:
    """Yield one batch while it is taken: at least one item, so many at most, and none once its time is over."""
    began = clock()
    for count, item in enumerate(items, start=1):
        yield item
        if count >= MOST or clock() - began >= SECONDS:
            return
