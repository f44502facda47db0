"""Does many small requests with bounded concurrency."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import chain, islice
from typing import TypeVar

from k8s_consul_registrar.errors import ConsulBusy, ConsulError, ConsulForbidden, ConsulRefused
from k8s_consul_registrar.model import Service, WriteFailure

# So many faults of Consul's own in a row are Consul's trouble, not that of the services at hand.
MOST_FAULTS_IN_A_ROW = 10

T = TypeVar("T")


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Do the work for each item, at most so many at once; the first `ConsulError` ends it and is raised."""
    left: Iterator[T] = iter(items)
    opening = list(islice(left, 2))
    if len(opening) < 2:
        # The usual case of a single change does without tasks.
        for item in opening:
            await work(item)
        return
    left = chain(opening, left)

    faults: list[ConsulError] = []
    workers: list[asyncio.Task[None]] = []

    async def worker() -> None:
        try:
            for item in left:
                await work(item)
        except ConsulError as fault:
            faults.append(fault)
            for other in workers:
                if other is not asyncio.current_task():
                    other.cancel()

    # No worker raises a fault: a TaskGroup in which one does forgets that we are cancelled meanwhile
    # (CPython before 3.13, gh-116720), and who is to end would go on.
    async with asyncio.TaskGroup() as group:
        workers.extend(group.create_task(worker()) for _ in range(concurrency))
    if faults:
        raise faults[0]


class Batch:
    """Writes services one by one and keeps what came of each; what Consul refuses holds up no other."""

    def __init__(self, write: Callable[[Service], Awaitable[None]]) -> None:
        self._write = write
        self._faults_in_a_row = 0
        self.done = 0
        self.failures: list[WriteFailure] = []

    async def write(self, service: Service) -> None:
        """Write one service; raises a `ConsulError` when Consul itself is at fault."""
        try:
            await self._write(service)
        except (ConsulRefused, ConsulForbidden) as refused:
            self.failures.append(WriteFailure(service.id, str(refused)))
        except ConsulBusy as fault:
            self._faults_in_a_row += 1
            if self._faults_in_a_row > MOST_FAULTS_IN_A_ROW:
                raise
            self.failures.append(WriteFailure(service.id, str(fault)))
        else:
            self._faults_in_a_row = 0
            self.done += 1
