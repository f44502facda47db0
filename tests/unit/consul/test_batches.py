"""Many small requests at once: bounded, ended by the first fault, and never deaf to a cancellation."""

import asyncio
import contextlib

import pytest

from k8s_consul_registrar.consul.batches import for_each
from k8s_consul_registrar.errors import ConsulUnreachable


@pytest.mark.parametrize("count", [0, 1, 2, 20])
async def test_each_is_done_once_and_few_at_once(count: int) -> None:
    """Whatever their number."""
    done: list[int] = []
    under_way = most = 0

    async def work(item: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        done.append(item)

    await for_each(range(count), work, 4)
    assert sorted(done) == list(range(count))
    assert most == min(count, 4)


class Failing:
    """Work of which one item fails once the others are under way; they take a while to end."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.are_ending = asyncio.Event()
        self.may_end = asyncio.Event()

    async def __call__(self, item: int) -> None:
        """Do it."""
        self.begun.append(item)
        if item == 1:
            await asyncio.sleep(0)
            raise ConsulUnreachable("Consul is gone")
        try:
            await asyncio.Event().wait()
        finally:
            self.are_ending.set()
            # A connection that closes takes its time as well, even if the task is cancelled meanwhile.
            with contextlib.suppress(asyncio.CancelledError):
                await self.may_end.wait()


async def test_first_fault_ends_it() -> None:
    """Batches under way are broken off, the rest not begun, and the task does not count as cancelled."""
    work = Failing()
    work.may_end.set()
    with pytest.raises(ConsulUnreachable):
        await for_each(range(20), work, 4)
    assert sorted(work.begun) == [0, 1, 2, 3]
    this = asyncio.current_task()
    assert this is not None
    assert this.cancelling() == 0


async def test_fault_does_not_hide_a_cancellation() -> None:
    """A task that is cancelled while it handles a fault ends, and does not try again forever."""
    work = Failing()
    task = asyncio.create_task(for_each(range(20), work, 4))
    await work.are_ending.wait()
    task.cancel()
    await asyncio.sleep(0)
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
