"""The record of the selection at the catalog's node, on a real Consul."""

import pytest

from k8s_consul_registrar.consul.batches import Transactions
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.node import NodeRemoval
from support.builders import our_pod_service
from support.real_servers import REAL, RealConsul, connected, held, make_token, real_consul

pytestmark = REAL

NODE = "k8s-lab"
# What a registrar of version 0 writes.
FORMER = {"external-node": "true", "managed_by": "k8s-consul-registrar"}
MADE = {**FORMER, "synthetic-node": "true"}


def registry_of(client: ConsulClient, selection: str = "") -> CatalogRegistry:
    """Return a registry; without a selection it is as in version 0."""
    return CatalogRegistry(client, NODE, selection=selection)


async def node_of(consul: RealConsul) -> tuple[dict[str, str], int]:
    """Return the node's meta and ModifyIndex."""
    _, found = await consul.request("GET", f"/v1/catalog/node/{NODE}")
    return found["Node"]["Meta"], found["Node"]["ModifyIndex"]


async def test_selection_is_recorded_once_and_read_by_the_next_start() -> None:
    """Over what version 0 wrote that takes one write; the next start with the same one takes none."""
    async with real_consul() as consul, connected(consul) as client:
        former = {"Node": NODE, "Address": "127.0.0.1", "NodeMeta": FORMER}
        await consul.request("PUT", "/v1/catalog/register", former)
        await registry_of(client).register([our_pod_service("p1")])
        assert (await node_of(consul))[0] == FORMER

        upgraded = registry_of(client, "one")
        there = await held(upgraded)
        assert upgraded.recorded_selection == ""
        assert await upgraded.record_selection()
        meta, index = await node_of(consul)
        assert meta == {**FORMER, "selection": "one"}
        assert not await upgraded.record_selection()
        assert await held(upgraded) == there, "services stay as they are"
        assert upgraded.recorded_selection == "", "our own record proves nothing about those before us"

        again = registry_of(client, "one")
        await held(again)
        assert again.recorded_selection == "one"
        assert not await again.record_selection()
        assert (await node_of(consul))[1] == index

        other = registry_of(client, "two")
        await held(other)
        assert other.recorded_selection == "one"
        assert await other.record_selection()
        assert (await node_of(consul))[0] == {**FORMER, "selection": "two"}
        assert other.recorded_selection == "one"

        await held(again)
        assert again.recorded_selection == "two", "another writer came after us"


async def test_node_that_is_made_says_the_selection_at_once() -> None:
    """The first start needs no second write of the node, and knows of nothing before it."""
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client, "one")
        assert await held(registry) == {}
        assert not await registry.record_selection(), "there is no node yet"
        await registry.register([our_pod_service("p1")])
        meta, index = await node_of(consul)
        assert meta == {**MADE, "selection": "one"}
        await held(registry)
        assert registry.recorded_selection == ""
        assert not await registry.record_selection()
        assert (await node_of(consul))[1] == index


async def test_version_0_runs_over_a_recorded_node() -> None:
    """It reads, writes and removes as ever, and leaves the record as it is."""
    async with real_consul() as consul, connected(consul) as client:
        await registry_of(client, "one").register([our_pod_service("p1"), our_pod_service("p2")])
        former = registry_of(client)
        there = await held(former)
        written = await former.deregister([there["pod--shop--p1"]])
        assert written.done == 1
        assert (await former.register([our_pod_service("p3")])).done == 1
        assert (await node_of(consul))[0]["selection"] == "one"


@pytest.mark.parametrize(
    "meta",
    [
        {"external-node": "true"},
        {"external-node": "true", "managed_by": "another-tool"},
        {"external-node": "true", "selection": "one"},
    ],
)
async def test_node_that_no_registrar_made_is_left_as_it_is(meta: dict[str, str]) -> None:
    """Its services may be ours; its record is not, and proves nothing about our settings."""
    async with real_consul() as consul, connected(consul) as client:
        await consul.request(
            "PUT", "/v1/catalog/register", {"Node": NODE, "Address": "127.0.0.1", "NodeMeta": meta}
        )
        registry = registry_of(client, "one")
        await registry.register([our_pod_service("p1")])
        before = await node_of(consul)
        await held(registry)
        assert registry.recorded_selection == ""
        assert not await registry.record_selection()
        assert await node_of(consul) == before


async def test_other_meta_of_our_node_stays() -> None:
    """Meta that an operator added to our node is kept."""
    async with real_consul() as consul, connected(consul) as client:
        await consul.request(
            "PUT",
            "/v1/catalog/register",
            {"Node": NODE, "Address": "127.0.0.1", "NodeMeta": {**FORMER, "team": "shop"}},
        )
        registry = registry_of(client, "one")
        assert await registry.record_selection()
        assert (await node_of(consul))[0] == {**FORMER, "team": "shop", "selection": "one"}


async def test_recorded_node_is_removed_as_ours() -> None:
    """A purge takes it for a registrar's, as before."""
    async with real_consul() as consul, connected(consul) as client:
        registry = registry_of(client, "one")
        service = our_pod_service("p1")
        await registry.register([service])
        await registry.deregister(list((await held(registry)).values()))
        removal = NodeRemoval(client, Transactions(client), NODE, has_our_name=True)
        assert await removal.obstacle() == ""
        assert await removal.remove() == ""
        assert (await consul.request("GET", f"/v1/catalog/node/{NODE}"))[1] is None


async def test_token_without_the_right_to_write_the_node_changes_nothing() -> None:
    """The record stays as it is, and nothing raises."""
    async with real_consul(acl=True) as consul:
        async with connected(consul) as client:
            await registry_of(client).register([our_pod_service("p1")])
        before = await node_of(consul)
        rules = 'service_prefix "" { policy = "write" } node_prefix "" { policy = "read" }'
        token = await make_token(consul, "reader", rules)
        async with connected(consul, token=token.secret) as client:
            assert not await registry_of(client, "one").record_selection()
        assert await node_of(consul) == before
