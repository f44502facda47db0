"""Noticing foreign changes: what counts as whose, told by a server that says what it is told."""

import asyncio

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
        """Let somebody change the node, or another."""
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


async def test_at_rest_nothing_is_asked() -> None:
    """One blocking query answers for as long as nothing changes on this node."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, _ = await started(client, indexes)
        for index in range(101, 111):
            indexes.change(index, here=False)
            assert not await watch.has_drifted()
        assert indexes.looks == 1


async def test_change_of_another_writer_makes_a_full_read_due() -> None:
    """It is noticed, and stays so until the next full read."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        indexes.change(101, here=True)
        await woken(watch)
        assert await watch.has_drifted()
        assert await watch.has_drifted()
        await watch.begin("n")
        watch.read(101)
        clock.now += 100
        assert not await watch.has_drifted()


async def test_our_own_writes_are_explained_by_their_indexes() -> None:
    """The last index is ours: nothing else happened."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        with watch.writing():
            indexes.change(101, here=True)
            await woken(watch)
            assert not await watch.has_drifted(), "nobody can tell while it is under way"
        watch.wrote(101)
        clock.now += 100
        assert not await watch.has_drifted()
        indexes.change(102, here=True)
        await woken(watch)
        clock.now += 100
        assert await watch.has_drifted()


@pytest.mark.parametrize(("foreign", "ours"), [(101, 102), (102, 101)])
async def test_foreign_change_beside_our_own(foreign: int, ours: int) -> None:
    """Before our write the blocking query woke too low; after it the index goes beyond ours."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        for index in sorted((foreign, ours)):
            indexes.change(index, here=True)
            await woken(watch)
        watch.wrote(ours)
        clock.now += 100
        assert await watch.has_drifted()


async def test_write_without_an_index_explains_what_follows_soon() -> None:
    """A delete tells no index; once it must have shown, a further change is foreign."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        indexes.change(101, here=True)
        watch.wrote(0)
        await woken(watch)
        assert not await watch.has_drifted()
        clock.now += 10
        assert not await watch.has_drifted()
        indexes.change(102, here=True)
        await woken(watch)
        assert await watch.has_drifted()


async def test_history_that_goes_backwards_is_drift() -> None:
    """Consul was restored, or starts with nothing."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        indexes.change(7, here=True)
        await woken(watch)
        clock.now += 100
        assert await watch.has_drifted()


async def test_history_that_goes_back_is_drift_at_once_and_until_a_full_read() -> None:
    """No wait for a look, and writes under way do not hide it; a full read that began afterwards ends it."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, _ = await started(client, indexes)
        with watch.writing():
            indexes.change(7, here=True)
            await woken(watch)
            assert await watch.has_drifted()
        watch.wrote(9)
        watch.read(9)
        assert await watch.has_drifted(), "that read began before"
        await watch.begin("n")
        watch.read(9)
        assert not await watch.has_drifted()


async def test_full_read_that_shows_an_older_history_is_drift() -> None:
    """Part of it may be from before; one more full read, and no more."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, _ = await started(client, indexes)
        await watch.begin("n")
        watch.read(7)
        assert await watch.has_drifted()
        await watch.begin("n")
        watch.read(7)
        assert not await watch.has_drifted()


async def test_full_read_older_than_a_wake_up_is_no_older_history() -> None:
    """The list was sent before the change that the blocking query woke for."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        await watch.begin("n")
        watch.wrote(105)
        indexes.change(105, here=True)
        await woken(watch)
        watch.read(102)
        clock.now += 100
        assert not await watch.has_drifted()


async def test_history_that_goes_back_in_an_outage_is_drift() -> None:
    """The blocking query broke off; the first look afterwards tells."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        indexes.status = 500
        indexes.change(7, here=True)
        await woken(watch)
        with pytest.raises(ConsulBusy):
            await watch.has_drifted()
        indexes.status = 200
        clock.now += 100
        assert await watch.has_drifted()


async def test_history_that_went_backwards_and_caught_up_is_drift() -> None:
    """The blocking query woke too low, though the index is what it was by now."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        indexes.change(7, here=True)
        await woken(watch)
        indexes.change(100, here=False)
        clock.now += 100
        assert await watch.has_drifted()


async def test_write_without_an_index_explains_no_lower_one() -> None:
    """When the blocking query broke off, the index alone tells that history went backwards."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        indexes.status = 500
        indexes.change(7, here=True)
        await woken(watch)
        indexes.status = 200
        watch.wrote(0)
        clock.now += 100
        assert await watch.has_drifted()


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


async def test_consul_that_does_not_answer_is_an_error() -> None:
    """When the blocking query ends and a look fails, that is told, and later it is tried again."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        indexes.status = 500
        indexes.change(101, here=True)
        await woken(watch)
        with pytest.raises(ConsulBusy):
            await watch.has_drifted()
        indexes.status = 200
        clock.now += 100
        assert await watch.has_drifted()


async def test_before_the_first_full_read_nothing_is_known() -> None:
    """There is nothing yet that could have changed."""
    async with client_of("http://127.0.0.1:9") as client:
        assert not await NodeDrift(client).has_drifted()


@pytest.mark.parametrize(("writes", "is_hidden"), [((101,), False), ((101, 103), True), ((0,), True)])
async def test_gap_between_our_writes_makes_a_full_read_due(writes: tuple[int, ...], is_hidden: bool) -> None:
    """Between two of our writes, or beside one without an index, others may have written: a full read is due.

    Not at once, and not after a single write whose index is the node's: that one is accounted for.
    """
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        for index in writes:
            indexes.change(index or 101, here=True)
            watch.wrote(index)
            await woken(watch)
        assert not await watch.has_drifted()
        clock.now += HIDDEN / 2
        assert not await watch.has_drifted()
        clock.now += HIDDEN / 2
        assert await watch.has_drifted() is is_hidden
        watch.read(indexes.index)
        clock.now += 2 * HIDDEN
        assert not await watch.has_drifted()


async def test_writes_without_a_pause_hide_for_no_longer() -> None:
    """Where each look meets a write of ours, nothing can be told, which has to end in a full read too."""
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


@pytest.mark.parametrize("writes", [(101,), (101, 103), (0,)])
async def test_our_writes_during_a_full_read(writes: tuple[int, ...]) -> None:
    """They are ours, whether the read shows them or not; and what may hide between them is looked for."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        await watch.begin("n")
        for index in writes:
            indexes.change(index or 101, here=True)
            watch.wrote(index)
            await woken(watch)
        watch.read(100)
        assert not await watch.has_drifted()
        clock.now += HIDDEN
        assert await watch.has_drifted() is (writes != (101,))


async def test_foreign_change_after_our_write_during_a_full_read() -> None:
    """Our write explains no index beyond its own."""
    indexes = Indexes()
    async with serving(indexes.answer) as url, client_of(url) as client:
        watch, clock = await started(client, indexes)
        await watch.begin("n")
        indexes.change(101, here=True)
        watch.wrote(101)
        await woken(watch)
        indexes.change(102, here=True)
        watch.read(100)
        clock.now += 1
        assert await watch.has_drifted()
