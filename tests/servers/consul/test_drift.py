"""Noticing foreign changes: which changes count as our own, at a server that answers as the test says."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.drift import HIDDEN, NodeDrift
from k8s_consul_registrar.errors import ConsulBusy
from support.scripted import client_of, serving
from support.waiting import Clock, until


class Indexes:
    """A catalog that is nothing but indexes: of everything, and a wake-up for the node."""

    def __init__(self, index: int = 100) -> None:
        self.index = index
        self.changed = asyncio.Event()
        self.looks = self.blocked = 0
        self.status = 200
        self.blocks = True

    async def answer(self, request: web.Request) -> web.Response:
        known = int(request.query.get("index", "0"))
        if not known:
            self.looks += 1
        elif known >= self.index and self.blocks:
            self.blocked += 1
            await self.changed.wait()
        return web.Response(status=self.status, headers={"X-Consul-Index": str(self.index)}, text="x")

    def change(self, index: int, *, here: bool) -> None:
        """Change the node, or another, as a foreign writer."""
        self.index = index
        if here:
            self.changed.set()
            self.changed = asyncio.Event()


async def started(client: ConsulClient, indexes: Indexes) -> tuple[NodeDrift, Clock]:
    """Return a watch that has seen a full read, and its clock."""
    clock = Clock(step=0.001)
    watch = NodeDrift(client, settle=1.0, clock=clock)
    await watch.begin("n")
    watch.read(indexes.index)
    clock.now += 100
    await until(lambda: indexes.blocked or not indexes.blocks)
    return watch, clock


async def woken(watch: NodeDrift) -> None:
    """Wait until the blocking query, where there is one, has ended."""
    await until(lambda: watch._querying is None or watch._querying.done())


@dataclass(slots=True)
class Story:
    """A watch, its clock and its Consul, while the steps of one case are taken."""

    indexes: Indexes
    watch: NodeDrift
    clock: Clock
    writing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


Step = Callable[[Story], Awaitable[None]]


def change(index: int) -> Step:
    """Change the node, and wait until the blocking query has ended."""

    async def step(story: Story) -> None:
        story.indexes.change(index, here=True)
        await woken(story.watch)

    return step


def elsewhere(index: int) -> Step:
    """Change another node."""

    async def step(story: Story) -> None:
        story.indexes.change(index, here=False)

    return step


def wrote(index: int) -> Step:
    """Note one of our writes, 0 for one whose index is unknown."""

    async def step(story: Story) -> None:
        story.watch.wrote(index)

    return step


def writes(index: int) -> Step:
    """Make one of our writes, by which the catalog comes to this index."""

    async def step(story: Story) -> None:
        with story.watch.writing() as newest:
            story.indexes.change(index, here=False)
        story.watch.wrote(index, newest)

    return step


def read(index: int) -> Step:
    """End a full read that shows this index."""

    async def step(story: Story) -> None:
        story.watch.read(index)

    return step


def later(seconds: float) -> Step:
    """Let time pass."""

    async def step(story: Story) -> None:
        story.clock.now += seconds

    return step


def status(code: int) -> Step:
    """Have Consul answer with another status."""

    async def step(story: Story) -> None:
        story.indexes.status = code

    return step


async def begin(story: Story) -> None:
    """Begin a full read."""
    await story.watch.begin("n")


async def write_begins(story: Story) -> None:
    """Begin one of our writes."""
    story.writing.enter_context(story.watch.writing())


async def write_ends(story: Story) -> None:
    """End one of our writes."""
    story.writing.close()


async def drifts(story: Story) -> None:
    """Fail unless a full read is due."""
    assert await story.watch.has_drifted()


async def steady(story: Story) -> None:
    """Fail if a full read is due."""
    assert not await story.watch.has_drifted()


async def fails(story: Story) -> None:
    """Fail unless the look does."""
    with pytest.raises(ConsulBusy):
        await story.watch.has_drifted()


HALF = later(HIDDEN / 2)
# Each begins after a full read that showed index 100.
CASES: dict[str, list[Step]] = {
    "change of another writer, until the next full read": [
        *(change(101), drifts, drifts, begin, read(101), later(100), steady),
    ],
    "our own write and none beyond its index": [
        *(write_begins, change(101), steady, write_ends, wrote(101), later(100), steady),
        *(change(102), later(100), drifts),
    ],
    "foreign change before ours: the query woke too low": [
        *(change(101), change(102), wrote(102), later(100), drifts),
    ],
    "foreign change after ours: the index goes beyond": [
        *(change(101), change(102), wrote(101), later(100), drifts),
    ],
    "write without an index explains what follows soon": [
        *(change(101), wrote(0), steady, later(10), steady, change(102), drifts),
    ],
    "write without an index explains no lower one": [
        *(status(500), change(7), status(200), wrote(0), later(100), drifts),
    ],
    "history goes back": [change(7), later(100), drifts],
    "history goes back: at once, during a write, until a read that began after": [
        *(write_begins, change(7), drifts, write_ends, wrote(9), read(9), drifts, begin, read(9), steady),
    ],
    "history goes back in an outage": [
        *(status(500), change(7), fails, status(200), later(100), drifts),
    ],
    "history goes back, and our next write comes to the index of the one that is lost": [
        *(writes(101), steady, elsewhere(100), writes(101), drifts, begin, read(101), steady),
    ],
    "history goes back, and our next write stays below": [
        *(writes(101), writes(103), elsewhere(90), writes(91), drifts, begin, read(91), steady),
    ],
    "our writes, each beyond what was seen before it": [
        *(writes(101), steady, writes(102), writes(105), steady, later(1), steady),
    ],
    "history went back and caught up": [change(7), elsewhere(100), later(100), drifts],
    "full read shows an older history: one more, and no more": [
        *(begin, read(7), drifts, begin, read(7), steady),
    ],
    "full read sent before the wake-up is no older history": [
        *(begin, wrote(105), change(105), read(102), later(100), steady),
    ],
    "look that fails is made again": [
        *(status(500), change(101), fails, status(200), later(100), drifts),
    ],
    "one write whose index is the node's hides nothing": [
        *(change(101), wrote(101), steady, HALF, steady, HALF, steady, read(101), later(2 * HIDDEN), steady),
    ],
    "two writes may hide another's between them": [
        *(change(101), wrote(101), change(103), wrote(103), steady, HALF, steady, HALF, drifts),
        *(read(103), later(2 * HIDDEN), steady),
    ],
    "write without an index may hide another's": [
        *(change(101), wrote(0), steady, HALF, steady, HALF, drifts, read(101), later(2 * HIDDEN), steady),
    ],
    "one write during a full read hides nothing": [
        *(begin, change(101), wrote(101), read(100), steady, later(HIDDEN), steady),
    ],
    "two writes during a full read may hide another's": [
        *(begin, change(101), wrote(101), change(103), wrote(103), read(100), steady, later(HIDDEN), drifts),
    ],
    "write without an index during a full read may hide another's": [
        *(begin, change(101), wrote(0), read(100), steady, later(HIDDEN), drifts),
    ],
    "foreign change after our write during a full read": [
        *(begin, change(101), wrote(101), change(102), read(100), later(1), drifts),
    ],
}


@pytest.mark.parametrize("steps", CASES.values(), ids=CASES.keys())
async def test_node_drift_tells_foreign_changes_from_ours(steps: list[Step]) -> None:
    """Each step of a case is taken in turn; `drifts` and `steady` say what is to be found there."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        story = Story(indexes, *await started(client, indexes))
        for step in steps:
            await step(story)


async def test_at_rest_nothing_is_asked() -> None:
    """One blocking query answers for as long as nothing changes on this node."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, _ = await started(client, indexes)
        for index in range(101, 111):
            indexes.change(index, here=False)
            assert not await watch.has_drifted()
        assert indexes.looks == 1


async def test_server_that_cannot_block_is_not_polled_in_a_loop() -> None:
    """A server that answers a blocking query at once costs a look now and then, and no more."""
    indexes = Indexes()
    indexes.blocks = False
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        for _ in range(3):
            clock.now += 100
            assert not await watch.has_drifted()
            await woken(watch)
        assert indexes.looks <= 4
        indexes.change(101, here=True)
        clock.now += 100
        assert await watch.has_drifted()


async def test_looking_takes_a_small_share_of_the_time() -> None:
    """After a look that took long none follows for a while."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        indexes.change(101, here=True)
        watch.wrote(101)
        await woken(watch)
        assert not await watch.has_drifted()
        indexes.change(102, here=True)
        await woken(watch)
        looks = indexes.looks
        assert not await watch.has_drifted()
        assert indexes.looks == looks
        clock.now += 1
        assert await watch.has_drifted()


async def test_before_the_first_full_read_nothing_is_known() -> None:
    """There is nothing yet that could have changed."""
    async with client_of("http://127.0.0.1:9") as client:
        assert not await NodeDrift(client).has_drifted()


async def test_writes_without_a_pause_hide_for_no_longer() -> None:
    """Where each look meets one of our writes, nothing can be concluded, so a full read must follow."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        looks = []
        for index in range(101, 110):
            indexes.change(index, here=True)
            watch.wrote(index)
            await woken(watch)
            look = asyncio.create_task(watch.has_drifted())
            await asyncio.sleep(0)
            with watch.writing():
                looks.append(await look)
            clock.now += HIDDEN / 6
        assert looks[:6] == [False] * 6
        assert looks[-1]
