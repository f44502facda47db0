"""Renames in the catalog on a Consul that never changes a service's name, and faults in the middle of one."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from aiohttp import web
from msgspec.structs import replace

from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.errors import ConsulBusy, ConsulUnreachable
from k8s_consul_registrar.model import Service, Written
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_model import Service as Record
from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions
from support.builders import our_pod_service
from support.doors import HttpDoor
from support.real_servers import held
from support.scripted import client_of

NODE = "k8s-lab"
DENIED = "Permission denied: token lacks permission 'service:write'"
Operations = list[dict[str, dict[str, Any]]]


class TxnDoor(HttpDoor):
    """Stands before a Consul; `answer` sees each transaction of writes and may answer in Consul's place."""

    answer: Callable[[Operations], web.Response | None] = staticmethod(lambda _: None)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        operations = json.loads(await request.read()) if request.path == "/v1/txn" else []
        is_write = any(body["Verb"] != "get" for one in operations for body in one.values())
        answer = self.answer(operations) if is_write else None
        return answer or await super()._serve(request)


def is_creation(operations: Operations, name: str = "new") -> bool:
    """Return whether a transaction writes services of a name where there are none."""
    return any(
        one["Service"]["Verb"] == "cas"
        and not one["Service"]["Service"].get("ModifyIndex")
        and one["Service"]["Service"]["Service"].startswith(name)
        for one in operations
        if "Service" in one
    )


def denial(operations: Operations) -> web.Response:
    """Answer that the token may make none of these writes."""
    errors = [{"OpIndex": position, "What": DENIED} for position in range(len(operations))]
    return web.json_response({"Results": None, "Errors": errors}, status=409)


class World(NamedTuple):
    """A Consul, the door before it, and a registry that has written some services through it."""

    consul: Consul
    door: TxnDoor
    registry: CatalogRegistry
    services: dict[str, Service]

    async def rename(self, *names: str) -> Written:
        """Write these services, all by default, under a new name each."""
        chosen = [one for one in self.services.values() if not names or one.id in names]
        return await self.registry.register([replace(one, name=f"new-{one.name}") for one in chosen])

    def names(self) -> dict[str, str]:
        """Return the name of each service in the catalog."""
        return {one.id: one.name for one in self.consul.catalog.services_of(NODE)}

    def renamed(self) -> dict[str, str]:
        """Return the names that all services shall have."""
        return {one.id: f"new-{one.name}" for one in self.services.values()}


@asynccontextmanager
async def renaming(*services: Service) -> AsyncIterator[World]:
    """Run a Consul of the newest release that holds these services."""
    async with (
        Consul(ConsulOptions(NEWEST)) as consul,
        TxnDoor(consul.url) as door,
        client_of(f"http://127.0.0.1:{door.port}") as client,
    ):
        registry = CatalogRegistry(client, NODE)
        written = await registry.register(services)
        assert written.done == len(services)
        yield World(consul, door, registry, await held(registry))


def pods(count: int) -> list[Service]:
    """Return this many services, every second one with a check."""
    return [
        replace(our_pod_service(f"p{number}", shard_path="a"), ready=(None, True)[number % 2])
        for number in range(count)
    ]


async def test_services_are_renamed_by_two_transactions_back_to_back() -> None:
    """At most 64 services lack a record at a time; the new records keep their checks."""
    async with renaming(*pods(100)) as world:
        fewest = len(world.services)

        def count(_: Operations) -> None:
            nonlocal fewest
            fewest = min(fewest, len(world.names()))

        world.door.answer = count
        written = await world.rename()
        assert (written.done, written.failures, written.stale) == (100, (), ())
        assert world.names() == world.renamed()
        after = await held(world.registry)
        assert {one.id: one.index for one in after.values()} == written.indexes
        assert {one.id: one.ready for one in after.values()} == {
            one.id: one.ready for one in world.services.values()
        }
        assert fewest >= 100 - 2 * 64


async def test_record_that_another_writer_changed_is_not_removed() -> None:
    """Neither before the look at the records nor between the look and the removal."""
    async with renaming(*pods(3)) as world:
        first, second, third = world.services.values()

        def change(service: Service) -> None:
            catalog = world.consul.catalog
            record = catalog.service(NODE, service.id)
            assert record is not None
            with catalog.apply():
                catalog.put_service(NODE, replace(record, port=1, modify_index=0))

        def interfere(operations: Operations) -> None:
            verbs = {body["Verb"] for one in operations for body in one.values()}
            change(second if "delete-cas" in verbs else first)

        world.door.answer = interfere
        written = await world.rename()
        assert (written.done, written.failures) == (1, ())
        assert set(written.stale) == {first.id, second.id}
        assert world.names() == {
            first.id: first.name,
            second.id: second.name,
            third.id: f"new-{third.name}",
        }


async def test_service_that_another_writer_creates_in_between_stays() -> None:
    """The creation names no record, so it never overwrites one; that is stale, not failed."""
    async with renaming(*pods(1)) as world:
        (service,) = world.services.values()

        def create(operations: Operations) -> None:
            if is_creation(operations):
                catalog = world.consul.catalog
                with catalog.apply():
                    catalog.put_service(NODE, Record(service.id, "theirs"))

        world.door.answer = create
        written = await world.rename()
        assert (written.done, written.failures, written.stale) == (0, (), (service.id,))
        assert world.names() == {service.id: "theirs"}


async def test_refused_replacement_restores_the_old_records() -> None:
    """With their checks; each failure names its reason, and what Consul takes is renamed all the same."""
    async with renaming(*pods(4)) as world:
        refused = list(world.services)[:2]

        def refuse(operations: Operations) -> web.Response | None:
            if not is_creation(operations):
                return None
            errors = [
                {"OpIndex": position, "What": DENIED}
                for position, one in enumerate(operations)
                if one.get("Service", {}).get("Service", {}).get("ID") in refused
            ]
            return web.json_response({"Results": None, "Errors": errors}, status=409) if errors else None

        world.door.answer = refuse
        written = await world.rename()
        assert written.done == 2
        assert {failure.id for failure in written.failures} == set(refused)
        assert all(DENIED in failure.problem for failure in written.failures)
        after = await held(world.registry)
        for service_id, before in world.services.items():
            is_refused = service_id in refused
            assert after[service_id] == (before if is_refused else replace(before, name=f"new-{before.name}"))


@pytest.mark.parametrize("status", [500, 503])
async def test_outage_between_the_two_is_made_up_for_by_the_next_write(status: int) -> None:
    """The record is created where there is none, and the old one is restored if Consul refuses that."""
    async with renaming(*pods(2)) as world:
        first, second = world.services
        world.door.answer = lambda operations: (
            web.Response(status=status) if is_creation(operations) else None
        )
        with pytest.raises(ConsulBusy):
            await world.rename()
        assert world.names() == {}
        world.door.answer = lambda operations: denial(operations) if is_creation(operations) else None
        create = [replace(one, name=f"new-{one.name}", index=0) for one in world.services.values()]
        written = await world.registry.register(create[:1])
        assert [failure.id for failure in written.failures] == [first]
        assert world.names() == {first: world.services[first].name}
        world.door.answer = lambda _: None
        written = await world.registry.register(create[1:])
        assert written.done == 1
        assert world.names() == {first: world.services[first].name, second: f"new-{create[1].name[4:]}"}


async def test_cancellation_between_the_two_waits_for_the_second() -> None:
    """A registrar that ends leaves no service without a record."""
    async with renaming(*pods(5)) as world:
        is_removed = asyncio.Event()

        def note(operations: Operations) -> None:
            if any(one.get("Service", {}).get("Verb") == "delete-cas" for one in operations):
                is_removed.set()

        world.door.answer = note
        renames = asyncio.create_task(world.rename())
        await is_removed.wait()
        renames.cancel()
        with pytest.raises(asyncio.CancelledError):
            await renames
        assert world.names() == world.renamed()


async def test_lost_answer_to_the_removal_loses_nothing() -> None:
    """The next write finds no record and creates one."""
    async with renaming(*pods(1)) as world:
        (service,) = world.services.values()

        def lose(operations: Operations) -> web.Response | None:
            if any(one.get("Service", {}).get("Verb") == "delete-cas" for one in operations):
                catalog = world.consul.catalog
                with catalog.apply():
                    catalog.drop_service(NODE, service.id)
                return web.Response(status=504)
            return None

        world.door.answer = lose
        with pytest.raises((ConsulBusy, ConsulUnreachable)):
            await world.rename()
        world.door.answer = lambda _: None
        assert [one async for one in world.registry.lookup([service.id])] == []
        written = await world.registry.register([replace(service, name=f"new-{service.name}", index=0)])
        assert written.done == 1
        assert world.names() == world.renamed()


async def test_name_that_differs_means_stale_for_creations_and_removals() -> None:
    """Another writer changed the record; nothing of it is touched, and nothing counts as failed."""
    async with renaming(*pods(1)) as world:
        (service,) = world.services.values()
        created = await world.registry.register([replace(service, name="other", index=0)])
        removed = await world.registry.deregister([replace(service, name="other")])
        for written in (created, removed):
            assert (written.done, written.failures, written.stale) == (0, (), (service.id,))
        assert world.names() == {service.id: service.name}
