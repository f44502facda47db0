"""The catalog registry on a real Consul: races, refusals, rights, and data that comes and goes."""

import asyncio

import pytest
from msgspec.structs import replace

from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.previous_location import PreviousLocation
from k8s_consul_registrar.errors import (
    ConsulError,
    ConsulFiltered,
    ConsulForbidden,
    ConsulRefused,
    ConsulTokenUnknown,
)
from k8s_consul_registrar.model import Drift, Service, Written
from k8s_consul_registrar.registrar.ownership import is_of_a_registrar
from support.builders import make_service, our_pod_service, unaudited
from support.real_servers import REAL, RealConsul, connected, held, make_token, real_consul, restart_empty
from support.waiting import PATIENCE, until

pytestmark = REAL

NODE = "k8s-lab"
META = {"external-node": "true", "managed_by": "k8s-consul-registrar", "synthetic-node": "true"}


def registry_of(client: ConsulClient, node: str = NODE) -> CatalogRegistry:
    """Return a registry of the test's node."""
    return CatalogRegistry(client, node)


def indexed(services: list[Service], written: Written) -> list[Service]:
    """Return services with the indexes that a write told."""
    return [replace(service, index=written.indexes[service.id]) for service in services]


async def node_record(consul: RealConsul, node: str = NODE) -> dict[str, object]:
    """Return what the catalog has of a node, apart from its services."""
    _, found = await consul.request("GET", f"/v1/catalog/node/{node}")
    record: dict[str, object] = found["Node"]
    return record


async def test_register_read_look_up_update_and_deregister() -> None:
    """A written service is read back equal, with the index that the write returned, whatever characters its ID has."""
    services = [our_pod_service(f"p{number}") for number in range(200)]
    services += [
        make_service(odd, {"cluster": "lab"}) for odd in ('a"b`c\\d', "x/../y ?#%25", "ü--2001:db8::1")
    ]
    services.append(make_service("tagged", tags=("a", "b")))
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client)
        assert await held(registry) == {}
        written = await registry.register(services)
        assert (written.done, written.failures, written.stale) == (204, (), ())
        there = await held(registry)
        assert there == {service.id: service for service in services}
        assert {one.id: one.index for one in there.values()} == written.indexes
        ids = [service.id for service in services[150:]]
        found = {one.id: one async for one in registry.lookup(["absent-1", *ids, "absent-2"])}
        assert found == {service_id: there[service_id] for service_id in ids}
        assert {one.index for one in found.values()} == {there[service_id].index for service_id in ids}

        renamed = replace(there['a"b`c\\d'], name="another", port=1)
        again = await registry.register([renamed])
        assert (again.done, again.stale) == (1, ())
        (now,) = [one async for one in registry.lookup([renamed.id])]
        assert (now, now.index) == (renamed, again.indexes[renamed.id])
        assert (await consul.request("GET", "/v1/catalog/service/another"))[1][0]["ServicePort"] == 1

        gone = await registry.deregister([now, *(one for one in there.values() if one.id != now.id)])
        assert (gone.done, gone.failures, gone.stale) == (204, (), ())
        assert await held(registry) == {}
        node = await node_record(consul)
        assert (node["Address"], node["Meta"]) == ("127.0.0.1", META)


async def test_racing_writer_is_seen_not_overwritten() -> None:
    """A record that is not the one we know is stale, to create, to update and to remove; others go through."""
    services = [our_pod_service(f"p{number}") for number in range(10)]
    async with real_consul() as consul, connected(consul) as client:
        ours, other = registry_of(client), registry_of(client)
        mine = indexed(services, await ours.register(services))
        theirs = await other.register([replace(mine[3], port=1)])
        assert theirs.done == 1

        created = await ours.register([our_pod_service("p3"), our_pod_service("new")])
        assert (created.done, created.stale, created.failures) == (1, ("pod--shop--p3",), ())
        updated = await ours.register([replace(one, port=2) for one in mine])
        assert (updated.done, updated.stale, updated.failures) == (9, ("pod--shop--p3",), ())
        removed = await ours.deregister([mine[3], *indexed(mine[4:], updated)])
        assert (removed.done, removed.stale, removed.failures) == (6, ("pod--shop--p3",), ())
        assert (await held(ours))["pod--shop--p3"].port == 1
        absent = await ours.deregister([replace(our_pod_service("never"), index=7)])
        assert (absent.done, absent.stale) == (0, ("pod--shop--never",))


async def test_refused_record_is_named_and_holds_up_no_other() -> None:
    """Records with illegal meta are named with Consul's reason; the rest of their transactions is written."""
    services = [our_pod_service(f"p{number}") for number in range(150)]
    services[10] = make_service("bad-key", {"a/b": "x"})
    services[140] = make_service("bad-value", {"a": "x" * 513})
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client)
        written = await registry.register(services)
        assert written.done == 148
        problems = {failure.id: failure.problem for failure in written.failures}
        assert problems.keys() == {"bad-key", "bad-value"}
        assert "invalid characters" in problems["bad-key"]
        assert len(await held(registry)) == 148


async def test_transactions_too_large_for_this_consul_are_split() -> None:
    """Where Consul allows less than usual, halves are tried until they fit; one that never fits is reported."""
    limits = "-hcl=limits { txn_max_req_len = 6000 kv_max_value_size = 6000 }"
    services = [our_pod_service(f"p{number}") for number in range(70)]
    services.append(make_service("huge", {f"k{number}": "x" * 500 for number in range(20)}))
    async with real_consul(limits) as consul, connected(consul) as client:
        registry = registry_of(client)
        written = await registry.register(services)
        assert written.done == 70
        (failure,) = written.failures
        assert failure.id == "huge"
        assert "too large" in failure.problem
        assert len(await held(registry)) == 70


async def test_large_records_are_packed_by_size() -> None:
    """Sixty-four of the largest legal metas exceed a transaction, so fewer go into one, without a refusal."""
    meta = {f"k{number:02}": "x" * 512 for number in range(64)}
    services = [make_service(f"large-{number}", meta) for number in range(40)]
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client)
        written = await registry.register(services)
        assert (written.done, written.failures) == (40, ())
        assert len(set(written.indexes.values())) == 3
        assert await held(registry) == {service.id: service for service in services}


async def test_node_that_vanishes_is_made_again() -> None:
    """The next writes bring a removed node back; removals from it are stale."""
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client)
        first = indexed([our_pod_service("a")], await registry.register([our_pod_service("a")]))
        await consul.request("PUT", "/v1/catalog/deregister", {"Node": NODE})
        assert (await registry.deregister(first)).stale == ("pod--shop--a",)
        assert await held(registry) == {}
        services = [our_pod_service(f"p{number}") for number in range(300)]
        written = await registry.register(services)
        assert (written.done, written.failures, written.stale) == (300, (), ())
        assert (await node_record(consul))["Meta"] == META


async def test_node_that_is_there_is_left_as_it_is() -> None:
    """A synthetic node is neither touched by a new registrar nor by its writes, whatever else its meta says."""
    async with real_consul() as consul, connected(consul) as client:
        meta = {"external-node": "true", "team": "x"}
        body = {"Node": "K8S-Lab", "Address": "192.0.2.1", "NodeMeta": meta}
        await consul.request("PUT", "/v1/catalog/register", body)
        before = await node_record(consul)
        written = await registry_of(client).register([our_pod_service("a")])
        assert written.done == 1
        assert await node_record(consul) == before


@pytest.mark.parametrize(
    ("meta", "reason"),
    [(None, "another program"), ({"external-node": "true", "external-probe": "true"}, "consul-esm")],
)
async def test_node_of_another_owner_is_refused(meta: dict[str, str] | None, reason: str) -> None:
    """An agent's node, or one that consul-esm will remove, is an error by name, and nothing is written."""
    async with real_consul(node="agent-1") as consul, connected(consul) as client:
        node = "agent-1"
        if meta is not None:
            node = "probed"
            body = {"Node": node, "Address": "127.0.0.1", "NodeMeta": meta, "Service": {"Service": "x"}}
            await consul.request("PUT", "/v1/catalog/register", body)
        registry = registry_of(client, node)
        with pytest.raises(ConsulRefused, match=f"CONSUL_NODE_NAME {node}.*{reason}"):
            await registry.register([our_pod_service("a")])
        with pytest.raises(ConsulRefused, match=f"CONSUL_NODE_NAME {node}.*{reason}"):
            await held(registry)
        _, found = await consul.request("GET", f"/v1/catalog/node/{node}")
        assert "pod--shop--a" not in found["Services"]


async def test_agents_node_that_claims_to_be_external_is_refused() -> None:
    """The health check of an agent shows that one keeps the node, whatever its meta says."""
    async with (
        real_consul("-node-meta=external-node:true", node="agent-1") as consul,
        connected(consul) as client,
    ):

        async def has_meta() -> bool:
            return "external-node" in str((await node_record(consul, "agent-1"))["Meta"])

        await until(has_meta)
        with pytest.raises(ConsulRefused, match=r"CONSUL_NODE_NAME agent-1 is an agent's"):
            await registry_of(client, "agent-1").register([our_pod_service("a")])


async def test_partial_rights() -> None:
    """Services the token may not write are reported one by one; those it may not see are never taken for absent."""
    rules = f'node "{NODE}" {{ policy = "write" }} service_prefix "pod--shop--" {{ policy = "write" }}'
    blind = 'service_prefix "" { policy = "write" }'
    async with real_consul(acl=True) as consul:
        partial = await make_token(consul, "partial", rules)
        nodeless = await make_token(consul, "nodeless", blind)
        async with (
            connected(consul) as root,
            connected(consul, token=partial.secret) as client,
            connected(consul, token=nodeless.secret) as hidden,
            connected(consul, token="") as anonymous,
            connected(consul, token="7f1c6d0e-8f5b-4a52-9d3c-0b7a52a1c9e4") as unknown,
        ):
            with pytest.raises(ConsulForbidden, match="CONSUL_NODE_NAME k8s-lab cannot be created"):
                await registry_of(hidden).register([our_pod_service("a")])
            registry = registry_of(client)
            services = [our_pod_service("a"), our_pod_service("b", "bank"), our_pod_service("c")]
            written = await registry.register(services)
            assert written.done == 2
            (failure,) = written.failures
            assert (failure.id, failure.problem) == ("pod--bank--b", "Permission denied")

            everything = registry_of(root)
            assert (await everything.register([our_pod_service("b", "bank")])).done == 1
            assert set(await held(registry)) == {"pod--shop--a", "pod--shop--c"}
            again = await registry.register([our_pod_service("b", "bank")])
            assert (again.done, len(again.failures)) == (0, 1)
            renamed = make_service("pod--bank--b", name="pod--shop--b")
            assert (await registry.register([renamed])).stale == ("pod--bank--b",)
            with pytest.raises(ConsulFiltered, match="pod--bank--b"):
                await anext(registry.lookup(["pod--shop--a", "absent", "pod--bank--b"]))
            assert len(await held(everything)) == 3

            for client_of_none in (hidden, anonymous):
                with pytest.raises(ConsulFiltered, match='"k8s-lab" read'):
                    await held(registry_of(client_of_none))
            with pytest.raises(ConsulForbidden, match="ACL not found"):
                await held(registry_of(unknown))
            with pytest.raises(ConsulForbidden, match="ACL not found"):
                await registry_of(unknown).register([our_pod_service("a")])


async def test_readiness_is_a_check_that_goes_with_its_service() -> None:
    """Readiness is written, read back, changed without touching the record, dropped, and gone with the service."""
    rules = f'node "{NODE}" {{ policy = "write" }} service_prefix "pod--shop--" {{ policy = "write" }}'
    async with real_consul(acl=True) as consul:
        token = await make_token(consul, "partial", rules)
        async with connected(consul, token=token.secret) as client:
            registry = registry_of(client)
            services = [replace(our_pod_service(f"p{n}"), ready=bool(n % 2)) for n in range(100)]
            services.append(our_pod_service("plain"))
            written = await registry.register(services)
            assert (written.done, written.failures, written.stale) == (101, (), ())
            there = await held(registry)
            assert there == {service.id: service for service in services}

            flipped = await registry.register([replace(there["pod--shop--p0"], ready=True)])
            assert flipped.indexes["pod--shop--p0"] == there["pod--shop--p0"].index
            _, health = await consul.request("GET", "/v1/health/service/pod--shop--p0")
            assert [check["Status"] for check in health[0]["Checks"]] == ["passing"]

            fresh = registry_of(client)  # does not know of the checks before it has read them
            assert (await held(fresh))["pod--shop--p0"].ready is True
            bare = await fresh.register([replace(there["pod--shop--p2"], ready=None)])
            assert (bare.done, bare.failures) == (1, ())
            (found,) = [one async for one in fresh.lookup(["pod--shop--p4"])]
            assert found.ready is False
            assert (await held(fresh))["pod--shop--p2"].ready is None
            gone = await fresh.deregister([there["pod--shop--p1"]])
            assert gone.done == 1
            _, checks = await consul.request("GET", f"/v1/health/node/{NODE}")
            assert len(checks) == 98
            stale = await fresh.register([replace(there["pod--shop--p1"], ready=False)])
            assert (stale.stale, stale.failures) == (("pod--shop--p1",), ())


async def test_foreign_changes_are_noticed_and_others_are_not() -> None:
    """A foreign change of our node is seen at once; changes elsewhere and our own are not taken for one."""
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client)

        async def is_seen() -> bool:
            return bool(await registry.drift())

        async def elsewhere(name: str) -> None:
            body = {"Node": "other", "Address": "192.0.2.9", "Service": {"Service": name}}
            assert (await consul.request("PUT", "/v1/catalog/register", body))[0] == 200

        assert await held(registry) == {}
        services = [our_pod_service(f"p{number}") for number in range(200)]
        written = await registry.register(services)
        for _ in range(3):
            assert not await registry.drift()
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)  # for that long the making of the node explains any change
        for number in range(3):
            await elsewhere(f"s{number}")
            assert not await registry.drift()
            await asyncio.sleep(0.05)

        edit = {"Node": NODE, "SkipNodeUpdate": True, "Service": {"ID": "pod--shop--p1", "Service": "edited"}}
        await consul.request("PUT", "/v1/catalog/register", edit)
        await until(is_seen, within=2 * PATIENCE)  # on a slow machine our own writes may hide it for 40 s
        assert await registry.drift(), "it stays so until everything is read"
        assert (await held(registry))["pod--shop--p1"].name == "edited"
        assert not await registry.drift()

        await consul.request("PUT", "/v1/catalog/deregister", {"Node": NODE, "ServiceID": "pod--shop--p2"})
        await until(is_seen, within=2 * PATIENCE)
        await held(registry)
        gone = await registry.deregister(indexed(services[50:60], written))
        assert gone.done == 10
        for _ in range(3):
            assert not await registry.drift()
            await asyncio.sleep(0.05)


async def test_foreign_change_just_before_our_own_is_noticed() -> None:
    """Our own write after it does not hide a foreign one."""
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client)
        written = await registry.register([our_pod_service("a")])
        await held(registry)
        await asyncio.sleep(1.1)  # for that long the making of the node explains any change
        assert not await registry.drift()
        body = {"Node": NODE, "SkipNodeUpdate": True, "Service": {"ID": "x", "Service": "x"}}
        await consul.request("PUT", "/v1/catalog/register", body)
        changed = replace(our_pod_service("a"), index=written.indexes["pod--shop--a"], port=7)
        assert (await registry.register([changed])).done == 1

        async def is_seen() -> bool:
            return bool(await registry.drift())

        await until(is_seen)


async def test_restarts_with_and_without_data() -> None:
    """A Consul that kept its data holds what it held; one that lost it is noticed and filled again."""
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client)
        services = [our_pod_service(f"p{number}") for number in range(100)]
        written = await registry.register(services)
        assert len(await held(registry)) == 100
        assert not await registry.drift()
        await consul.restart()
        there = await held(registry)
        assert {one.id: one.index for one in there.values()} == written.indexes

        await restart_empty(consul)

        async def is_seen() -> bool:
            return bool(await registry.drift())

        await until(is_seen)
        assert await held(registry) == {}
        assert not await registry.drift()
        again = await registry.register(services)
        assert (again.done, again.failures, again.stale) == (100, (), ())


async def test_services_at_a_former_node_are_removed() -> None:
    """Our services go from the previous node; others' stay, and so does the node."""
    async with real_consul() as consul, connected(consul) as client:
        before = registry_of(client, "k8s-before")
        services = [our_pod_service(f"p{number}") for number in range(1500)]
        foreign = make_service("foreign")
        await before.register([*services, foreign])
        former = PreviousLocation("former", before, lambda service: service.value("cluster") == "lab")
        assert len([one async for one in former.services()]) == 1500
        cleared = await former.clear(unaudited)
        assert (cleared.done, cleared.failures, cleared.stale) == (1500, (), ())
        assert await held(before) == {"foreign": foreign}


async def test_through_a_client_agent() -> None:
    """The catalog is written the same through an agent that is no server."""
    async with (
        real_consul(node="server") as server,
        real_consul(join=server.serf, node="client") as agent,
        connected(agent) as client,
        connected(server) as direct,
    ):
        registry = registry_of(client)
        services = [our_pod_service(f"p{number}") for number in range(100)]
        written = await registry.register(services)
        assert (written.done, written.failures) == (100, ())
        assert len(await held(registry_of(direct))) == 100
        assert len(await held(registry)) == 100
        assert not await registry.drift()


async def test_name_is_looked_up_in_the_whole_catalog() -> None:
    """On any node, in any case of letters, with or without meta; what registrars wrote is left out."""

    async def put(node: str, service_id: str, name: str, meta: dict[str, str] | None) -> None:
        service = {"ID": service_id, "Service": name} | ({} if meta is None else {"Meta": meta})
        record = {"Node": node, "Address": "192.0.2.1", "Service": service}
        status, answer = await consul.request("PUT", "/v1/catalog/register", record)
        assert status == 200, answer

    async with real_consul(acl=True) as consul, connected(consul) as client:
        registry = CatalogRegistry(client, NODE, is_of_a_registrar=is_of_a_registrar)
        await put("a", "pod--shop--x", "ours", {"managed_by": "k8s-consul-registrar", "cluster": "other"})
        await put("b", "pod--shop--y", "ours", {"cluster": "original"})
        assert not await registry.is_name_taken("ours")
        for number, meta in enumerate((None, {}, {"x": "y"}, {"managed_by": "terraform"})):
            await put("c", f"theirs-{number}", f"Theirs-{number}", meta)
            assert await registry.is_name_taken(f"THEIRS-{number}")
        assert not await registry.is_name_taken("theirs")
        await put("d", "theirs-x", "Ours", None)
        assert await registry.is_name_taken("ours")
        denied = await make_token(consul, "no-services", 'node_prefix "" { policy = "read" }')
        async with connected(consul, token=denied.secret) as blind:
            # 1.8 does not say that the name is hidden.
            assert not await CatalogRegistry(blind, NODE).is_name_taken("ours")


async def test_probe_needs_no_right_and_no_node() -> None:
    """Its transaction of reads is answered to a token without any."""
    async with real_consul(acl=True) as consul:
        denied = await make_token(consul, "nothing", 'key "none" { policy = "read" }')
        async with connected(consul, token=denied.secret) as client:
            await client.probe(is_write_owed=False)
            assert client.health.is_up
            with pytest.raises(ConsulForbidden):
                await client.request("PUT", "/v1/agent/service/register", body=b'{"Name":"x"}')
            assert client.health.is_up, "a missing right is no outage"
        async with connected(consul, token="11111111-2222-3333-4444-555555555555") as unknown:
            with pytest.raises(ConsulTokenUnknown):
                await unknown.request("PUT", "/v1/agent/service/register", body=b'{"Name":"x"}')
            assert not unknown.health.is_up


async def test_consul_that_comes_back_empty_is_drift() -> None:
    """Its history begins again, which shows at once and ends with the next full read."""
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client)
        await registry.register([our_pod_service(f"p{number}") for number in range(70)])
        assert len(await held(registry)) == 70
        await restart_empty(consul)

        async def has_drifted() -> bool:
            try:
                return await registry.drift() is Drift.CHANGED
            except ConsulError:
                return False

        await until(has_drifted)
        assert await held(registry) == {}
        assert await registry.drift() is Drift.NONE
