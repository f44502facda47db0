"""Previous locations are cleared once everything is at the new one, and never the other way round."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.consul import previous_location as consul_location
from k8s_consul_registrar.consul.previous_location import PreviousLocation, Remove, clear_previous_locations
from k8s_consul_registrar.errors import ConsulBusy, ConsulError, ConsulForbidden, ConsulUnreachable
from k8s_consul_registrar.model import Service, Written
from support.builders import make_pod, our_pod_service, unaudited
from support.controller_lab import ControllerLab
from support.scripted import QUICK
from support.waiting import PATIENCE, until


class Location(PreviousLocation):
    """A previous location that counts how often it is cleared, after it failed as a test says."""

    def __init__(self, name: str = "old", *problems: ConsulError) -> None:
        super().__init__(name, Place(), is_ours=lambda _: True)
        self.problems = list(problems)
        self.clearings = 0

    async def begin(self) -> None:
        """Note nothing."""

    async def services(self) -> AsyncIterator[Service]:
        """Yield nothing: what goes is the location's own to know."""
        for one in list[Service]():
            yield one

    async def clear(self, remove: Remove) -> Written:
        """Clear it, or fail."""
        self.clearings += 1
        if self.problems:
            raise self.problems.pop(0)
        return Written(1)


async def a_while() -> None:
    """Give a task that waits more than enough turns."""
    await asyncio.sleep(10 * QUICK.retry_first)


async def test_location_keeps_everything_until_all_is_at_the_new_one() -> None:
    """The first comparison, every write that Consul refused, and the lead are waited for."""
    lab, location = ControllerLab(), Location()
    is_leader = False
    lab.consul.refused = {"pod--shop--b"}
    clearing = asyncio.create_task(
        clear_previous_locations(
            [location],
            remove=lambda _: unaudited,
            is_ready=lambda: is_leader and lab.controller.is_complete,
            timing=QUICK,
        )
    )
    is_leader = True
    await a_while()
    assert location.clearings == 0, "before anything is written"
    async with lab.running():
        lab.cluster.put_list([make_pod(name) for name in "abc"])
        await lab.until("a", "c")
        await lab.until_so(lambda: lab.status.has_synced)
        await a_while()
        assert location.clearings == 0, "while one is refused"
        is_leader = False
        lab.consul.refused = set()
        await lab.until("a", "b", "c")
        await a_while()
        assert location.clearings == 0, "while another leads"
        is_leader = True
        async with asyncio.timeout(PATIENCE):
            await clearing
    assert location.clearings == 1


async def test_location_that_cannot_be_cleared_holds_up_no_other() -> None:
    """While Consul cannot be used it is tried again; one that the token may not read is left as it is."""
    slow = Location("slow", ConsulUnreachable("gone"), ConsulBusy("busy"))
    denied, last = Location("denied", ConsulForbidden("no")), Location("last")
    async with asyncio.timeout(PATIENCE):
        await clear_previous_locations(
            [slow, denied, last], remove=lambda _: unaudited, is_ready=lambda: True, timing=QUICK
        )
    assert [one.clearings for one in (slow, denied, last)] == [3, 1, 1]


class Place:
    """An agent or node in memory, as consul/previous_location clears it."""

    def __init__(self) -> None:
        self.held: dict[str, Service] = {}

    async def services(self) -> AsyncIterator[Service]:
        """Yield what is there."""
        for one in list(self.held.values()):
            yield one

    async def deregister(self, services: Sequence[Service]) -> Written:
        """Remove services."""
        for one in services:
            del self.held[one.id]
        return Written(len(services))


@pytest.mark.parametrize("version", [7, 0])
async def test_service_a_successor_writes_to_a_previous_location_stays(version: int) -> None:
    """In a rollout the old registrar's previous location is the new one's place: what came later is not old."""
    place = Place()
    old, kept = our_pod_service("old"), our_pod_service("kept")
    place.held = {one.id: replace(one, index=min(version, 1)) for one in (old, kept)}
    location = consul_location.PreviousLocation("node k8s-lab", place, is_ours=lambda _: True)
    await location.begin()
    for name in ("kept", "new"):
        service = our_pod_service(name, shard_path="/shard-1")
        place.held[service.id] = replace(service, index=version)
    assert (await location.clear(unaudited)).done == 1
    assert set(place.held) == {"pod--shop--kept", "pod--shop--new"}


async def test_service_in_doubt_at_the_new_place_goes_from_the_old_one_once_it_is_known() -> None:
    """Not before, and not never: what was written during a resync is looked up a moment after everything else."""
    place, known = Place(), {"pod--shop--sure": True, "pod--shop--other": False}
    place.held = {one.id: one for one in map(our_pod_service, ("sure", "doubtful", "other"))}
    location = consul_location.PreviousLocation(
        "node k8s-lab", place, is_ours=lambda _: True, may_go=lambda service: known.get(service.id)
    )
    clearing = asyncio.create_task(
        clear_previous_locations([location], remove=lambda _: unaudited, is_ready=lambda: True, timing=QUICK)
    )
    await until(lambda: "pod--shop--sure" not in place.held)
    await a_while()
    assert set(place.held) == {"pod--shop--doubtful", "pod--shop--other"}
    known["pod--shop--doubtful"] = True
    async with asyncio.timeout(PATIENCE):
        await clearing
    assert set(place.held) == {"pod--shop--other"}
