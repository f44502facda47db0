"""The agent registry on a real Consul: what the catalog lacks, tokens that change, agents that lose all."""

from pathlib import Path

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from k8s_consul_registrar.consul import agent
from k8s_consul_registrar.consul.access import ConsulTokenFile
from k8s_consul_registrar.consul.agent import AgentRegistry
from k8s_consul_registrar.consul.previous_location import PreviousLocation
from k8s_consul_registrar.model import UNSYNCED, Drift
from support.builders import make_service, our_pod_service, unaudited
from support.real_servers import (
    REAL,
    RealConsul,
    connected,
    held,
    make_token,
    real_consul,
    restart_empty,
    revoke,
)
from support.waiting import until

pytestmark = REAL

FULL = 'node_prefix "" { policy = "read" } service_prefix "" { policy = "write" } agent_prefix "" { policy = "read" }'


async def in_catalog(consul: RealConsul, node: str = "test-node") -> set[str]:
    """Return the IDs that the catalog shows for a node, apart from Consul's own."""
    _, found = await consul.request("GET", f"/v1/catalog/node/{node}")
    return set(found["Services"]) - {"consul"}


async def test_lookup_finds_what_is_there() -> None:
    """Services are read one by one, those that are absent left out, whatever is in the ID."""
    services = [our_pod_service(f"p{number}") for number in range(50)]
    services.append(make_service("odd/ID ?#%25", {"cluster": "lab"}, tags=("a", "b")))
    async with real_consul() as consul, connected(consul) as client:
        registry = AgentRegistry(client)
        await registry.register(services)
        ids = ["absent", *(service.id for service in services[20:])]
        found = {one.id: one async for one in registry.lookup(ids)}
        assert found == {service.id: service for service in services[20:]}
        assert [one async for one in registry.lookup([])] == []
        shards = our_pod_service("p1", shard_path="s2")
        await registry.register([shards])

        async def is_shown() -> bool:
            return await registry.lost_shards() == {shards.id: "s2"}

        await until(is_shown)


UNNAMEABLE = (
    "http://192.0.2.1:80",
    "/a",
    "a/../b",
    "a/.",
    "..",
    "a\u200bb",
    "a\r\nb",
    "register",
    "deregister/a",
)


async def test_ids_that_no_path_leads_to() -> None:
    """Others' services may have them and disturb nothing; ours are refused, since they could never go again."""
    async with real_consul() as consul, connected(consul) as client:
        for service_id in UNNAMEABLE:
            status, answer = await consul.request(
                "PUT", "/v1/agent/service/register", {"ID": service_id, "Name": "theirs"}
            )
            assert status == 200, answer
        registry = AgentRegistry(client)
        assert set(await held(registry)) == set(UNNAMEABLE)
        for _ in UNNAMEABLE:
            assert not await registry.drift()
        assert [one async for one in registry.lookup(UNNAMEABLE)] == []
        services = [
            make_service(service_id, {"cluster": "lab"}) for service_id in (*UNNAMEABLE, "a/b/", "..a")
        ]
        written = await registry.register(services)
        assert written.done == 2
        assert {one.id for one in written.failures} == set(UNNAMEABLE)
        assert {one.id async for one in registry.lookup(["a/b/", "..a"])} == {"a/b/", "..a"}
        assert (await registry.deregister(services[-2:])).done == 2
        assert set(await held(registry)) == set(UNNAMEABLE)


async def test_service_the_catalog_lacks_is_unsynced_until_registered_again() -> None:
    """An agent whose token for a service was revoked holds it forever and calls it synced; we do not."""
    async with real_consul(acl=True) as consul:
        old, new = await make_token(consul, "old", FULL), await make_token(consul, "new", FULL)
        services = [our_pod_service("a"), our_pod_service("b")]
        async with (
            connected(consul, token=old.secret) as before,
            connected(consul, token=new.secret) as after,
        ):
            await AgentRegistry(before).register(services)

            async def are_shown() -> bool:
                return len(await in_catalog(consul)) == 2

            await until(are_shown)
            registry = AgentRegistry(after)
            for _ in range(2):
                assert {one.index for one in (await held(registry)).values()} == {0}
            await revoke(consul, old)
            lost = {"Node": "test-node", "ServiceID": "pod--shop--a"}
            await consul.request("PUT", "/v1/catalog/deregister", lost)
            # The agent's next full comparison is at most a minute away; a restart makes it at once.
            await consul.restart()

            async def has_compared() -> bool:
                return "blocked by ACLs" in consul.program.log.read_text()

            await until(has_compared)
            first = await held(registry)
            assert first["pod--shop--a"] == services[0], "the agent says that all is well"
            assert first["pod--shop--a"].index == 0, "once may be chance"
            second = await held(registry)
            assert (second["pod--shop--a"].index, second["pod--shop--b"].index) == (UNSYNCED, 0)
            assert "pod--shop--a" not in await in_catalog(consul)

            assert (await registry.register([second["pod--shop--a"]])).done == 1
            await until(are_shown)
            assert {one.index for one in (await held(registry)).values()} == {0}


async def test_catalog_that_shows_something_else_counts_as_lacking() -> None:
    """A record that differs in the catalog, twice in a row, is to be registered again."""
    async with real_consul() as consul, connected(consul) as client:
        await AgentRegistry(client).register([our_pod_service("a")])

        async def is_shown() -> bool:
            return bool(await in_catalog(consul))

        await until(is_shown)
        edit = {"ID": "pod--shop--a", "Service": "edited"}
        body = {"Node": "test-node", "SkipNodeUpdate": True, "Service": edit}

        async def counts_as_lacking_the_second_time() -> bool:
            # A full comparison of a young agent may undo the edit at any moment: then again.
            registry = AgentRegistry(client)
            assert (await consul.request("PUT", "/v1/catalog/register", body))[0] == 200
            seen = [(await held(registry))["pod--shop--a"].index for _ in range(2)]
            assert seen[0] == 0, "once may be chance"
            return seen[1] == UNSYNCED

        await until(counts_as_lacking_the_second_time)


async def test_changed_token_makes_everything_unsynced_once(tmp_path: Path) -> None:
    """An agent keeps the token of each registration, so a new one is brought to every service, once."""
    file = tmp_path / "token"
    async with real_consul(acl=True) as consul:
        old, new = await make_token(consul, "old", FULL), await make_token(consul, "new", FULL)
        file.write_text(old.secret)
        async with connected(consul, token_file=str(file)) as client:
            registry = AgentRegistry(client)
            services = [our_pod_service(f"p{number}") for number in range(5)]
            await registry.register(services)
            assert {one.index for one in (await held(registry)).values()} == {0}
            file.write_text(new.secret)
            assert isinstance(client._tokens, ConsulTokenFile)
            client._tokens._file.expire()  # the file is looked at again now
            for _ in range(2):
                there = await held(registry)
                assert {one.index for one in there.values()} == {UNSYNCED}
            await registry.register(list(there.values())[:3])
            left = [one.index for one in (await held(registry)).values()]
            assert sorted(left) == [UNSYNCED, UNSYNCED, 0, 0, 0]
            await registry.register(list(there.values()))
            await revoke(consul, old)
            changed = replace(services[0], port=1)
            await registry.register([changed])

            async def is_shown() -> bool:
                _, found = await consul.request("GET", f"/v1/catalog/service/{changed.name}")
                return bool(found) and found[0]["ServicePort"] == 1

            await until(is_shown)


async def test_agent_that_restarted_empty_is_noticed() -> None:
    """With its data an agent comes back whole; without, the first look shows it."""
    async with real_consul() as consul, connected(consul) as client:
        registry = AgentRegistry(client)
        await registry.register([our_pod_service(f"p{number}") for number in range(300)])
        await held(registry)
        assert not await registry.drift()
        await consul.restart()
        assert len(await held(registry)) == 300
        assert not await registry.drift()
        await consul.request("PUT", f"/v1/agent/service/deregister/{registry._sample[-1]}")
        assert await registry.drift() is Drift.CHANGED
        await restart_empty(consul)
        assert await registry.drift() is Drift.EMPTIED
        assert await held(registry) == {}


async def test_service_lost_among_many_is_noticed_by_its_node() -> None:
    """One service that another tool deregisters moves the catalog's record of the node; our own writes do not count."""
    async with real_consul() as consul, connected(consul) as client:
        registry = AgentRegistry(client)
        await registry.register([our_pod_service(f"p{number}") for number in range(100)])

        async def is_settled() -> bool:
            return len(await in_catalog(consul)) == 100

        async def is_seen() -> bool:
            return bool(await registry.drift())

        await until(is_settled)
        await held(registry)
        await registry.deregister([our_pod_service("p0")])
        for _ in range(3):
            assert not await registry.drift()
        with pytest.raises(TimeoutError):
            await until(is_seen, within=agent.SYNC_TIME + 1, every=0.5)
        await consul.request("PUT", "/v1/agent/service/deregister/pod--shop--p50")
        await until(is_seen)


async def test_without_a_right_to_the_catalog_the_agents_word_counts() -> None:
    """A token that may only write services works, with a warning, once."""
    rules = 'service_prefix "" { policy = "write" }'
    async with real_consul(acl=True) as consul:
        token = await make_token(consul, "narrow", rules)
        async with connected(consul, token=token.secret) as client:
            registry = AgentRegistry(client)
            with capture_logs() as logs:
                await registry.register([our_pod_service("a")])
                for _ in range(3):
                    assert (await held(registry))["pod--shop--a"].index == 0
                assert not await registry.drift()
            assert [entry["log_level"] for entry in logs] == ["warning"]
            assert await registry.lost_shards() == {}


async def test_services_at_a_former_agent_are_removed() -> None:
    """Our services go from the agent, others' stay."""
    async with real_consul() as consul, connected(consul) as client:
        registry = AgentRegistry(client)
        foreign = make_service("foreign")
        await registry.register([*(our_pod_service(f"p{number}") for number in range(100)), foreign])
        cleared = await PreviousLocation(
            "former", registry, lambda service: service.value("cluster") == "lab"
        ).clear(unaudited)
        assert (cleared.done, cleared.failures) == (100, ())
        assert await held(registry) == {"foreign": foreign}
