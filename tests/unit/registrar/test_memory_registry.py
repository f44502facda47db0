"""The registry in memory, which stands in for Consul where there is none."""

from k8s_consul_registrar.model import Drift
from k8s_consul_registrar.registrar.interfaces import AlwaysAvailable, MemoryRegistry
from support.builders import our_pod_service
from support.waiting import most_between_turns


async def ids(registry: MemoryRegistry) -> list[str]:
    """Return the IDs of what is kept."""
    return [one.id async for one in registry.services()]


async def test_services_that_are_written_can_be_read() -> None:
    """A write replaces what was under the ID; a removal of something absent is done as well."""
    registry = MemoryRegistry()
    assert (await registry.register([our_pod_service("a"), our_pod_service("b")])).done == 2
    assert (await registry.register([our_pod_service("a", note="new")])).done == 1
    found = [one async for one in registry.lookup(["pod--shop--a", "pod--shop--z"])]
    assert [one.value("note") for one in found] == ["new"]
    assert (await registry.deregister([our_pod_service("a"), our_pod_service("z")])).done == 2
    assert await ids(registry) == ["pod--shop--b"]
    assert (await registry.register([])).done == 0


async def test_services_that_change_while_they_are_read_do_not_disturb_the_read() -> None:
    """A resync and a batch may overlap."""
    registry = MemoryRegistry()
    await registry.register([our_pod_service(f"p{number}") for number in range(5)])
    seen = []
    async for one in registry.services():
        seen.append(one.id)
        await registry.deregister([one])
    assert len(seen) == 5
    assert await ids(registry) == []


async def test_read_of_everything_lets_changes_through() -> None:
    """Nothing waits for a resync's end."""
    registry = MemoryRegistry()
    await registry.register([our_pod_service(f"p{number}") for number in range(150)])
    assert await most_between_turns(registry.services()) <= 30


async def test_nothing_else_writes_to_it() -> None:
    """There is no drift, no lost shard and no foreign name, and it is always available."""
    registry = MemoryRegistry()
    assert await registry.drift() is Drift.NONE
    assert await registry.lost_shards() == {}
    assert not await registry.is_name_taken("web")
    assert (AlwaysAvailable.is_up, AlwaysAvailable().concurrency(3)) == (True, 3)
