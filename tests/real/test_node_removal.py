"""The removal of a synthetic node on a real Consul: only ours, only empty, and not while another writer uses it."""

from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from k8s_consul_registrar.backoff import Timing
from k8s_consul_registrar.consul.access import ConsulAccess, ConsulAddress
from k8s_consul_registrar.consul.batches import Transactions
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.node import CREATED_META, MARK, NodeRemoval
from support.builders import our_pod_service
from support.doors import HttpDoor
from support.real_servers import REAL, RealConsul, connected, make_token, real_consul

pytestmark = REAL

NODE = "k8s-lab"


def removal_of(client: ConsulClient, *, has_our_name: bool = True) -> NodeRemoval:
    """Return the removal of the node over a client."""
    return NodeRemoval(client, Transactions(client), NODE, has_our_name=has_our_name)


async def record(consul: RealConsul) -> dict[str, object] | None:
    """Return the node's record, None where there is none."""
    _, found = await consul.request("GET", f"/v1/catalog/node/{NODE}?consistent")
    node: dict[str, object] | None = found and found["Node"]
    return node


async def make_node(client: ConsulClient) -> None:
    """Have a registrar make the node, and take its only service away again."""
    registry = CatalogRegistry(client, NODE)
    await registry.register([our_pod_service("a")])
    assert (await registry.deregister([one async for one in registry.services()])).done == 1


async def register(consul: RealConsul, **changes: object) -> None:
    """Register a foreign service on the node."""
    body = {"Node": NODE, "Service": {"ID": "db", "Service": "db"}, **changes}
    assert (await consul.request("PUT", "/v1/catalog/register", body))[0] == 200


WITH_NODE = {"Address": "127.0.0.1", "NodeMeta": {"external-node": "true"}}


class Racing(HttpDoor):
    """Has another writer act just before a request whose body holds a text is carried on."""

    def __init__(self, upstream: str, text: bytes, act: Callable[[], Awaitable[None]]) -> None:
        super().__init__(upstream)
        self._text = text
        self._act = act

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if self._text in await request.read():
            await self._act()
        return await super()._serve(request)


async def removed_through(consul: RealConsul, text: bytes, act: Callable[[], Awaitable[None]]) -> str:
    """Remove the node while another writer acts at a certain moment; return why it stays."""
    async with Racing(consul.url, text, act) as door:
        access = ConsulAccess(ConsulAddress(f"http://127.0.0.1:{door.port}"))
        async with ConsulClient(access, Timing()) as client:
            return await removal_of(client).remove()


async def test_empty_node_of_ours_goes() -> None:
    """And with it all its record; a second removal says that it is not there."""
    async with real_consul() as consul, connected(consul) as client:
        await make_node(client)
        assert await removal_of(client, has_our_name=False).remove() == ""
        assert await record(consul) is None
        assert "not there" in await removal_of(client).remove()


@pytest.mark.parametrize("what", ["service", "check"])
async def test_node_that_is_used_stays(what: str) -> None:
    """A service or a check is enough, and the record stays as it was."""
    async with real_consul() as consul, connected(consul) as client:
        await make_node(client)
        before = await record(consul)
        if what == "service":
            await register(consul, SkipNodeUpdate=True)
        else:
            check = {"Node": NODE, "CheckID": "alive", "Name": "alive", "Status": "passing"}
            await register(consul, SkipNodeUpdate=True, Service=None, Check=check)
        assert "on it" in await removal_of(client).remove()
        assert await record(consul) == before


@pytest.mark.parametrize(
    "node",
    [
        {"Address": "127.0.0.1", "NodeMeta": {}},
        {"Address": "127.0.0.1", "NodeMeta": {"managed_by": "k8s-consul-registrar"}},
        {"Address": "192.0.2.1", "NodeMeta": {"external-node": "true", "managed_by": "k8s-consul-registrar"}},
        {"Address": "127.0.0.1", "NodeMeta": {"external-node": "true", "team": "x"}},
        {"Address": "127.0.0.1", "NodeMeta": {"external-node": "true", "managed_by": "consul-k8s"}},
    ],
    ids=["an agent's", "not external", "an address", "their own meta", "another tool's"],
)
async def test_node_that_others_made_stays(node: dict[str, object]) -> None:
    """Our name for it is not enough."""
    async with real_consul() as consul, connected(consul) as client:
        assert (await consul.request("PUT", "/v1/catalog/register", {"Node": NODE, **node}))[0] == 200
        assert "not of our making" in await removal_of(client).remove()
        assert await record(consul) is not None


async def test_node_from_before_it_said_whose_it_is_needs_our_name() -> None:
    """With a chosen name it may belong to anyone."""
    async with real_consul() as consul, connected(consul) as client:
        assert (await consul.request("PUT", "/v1/catalog/register", {"Node": NODE, **WITH_NODE}))[0] == 200
        assert "not of our making" in await removal_of(client, has_our_name=False).remove()
        assert await removal_of(client).remove() == ""
        assert await record(consul) is None


async def test_service_that_comes_before_the_second_look_saves_the_node() -> None:
    """However it is written; the mark is taken off again."""
    async with real_consul() as consul:
        async with connected(consul) as client:
            await make_node(client)

        async def somebody() -> None:
            await register(consul, SkipNodeUpdate=True)

        assert "registers services" in await removed_through(consul, MARK.encode(), somebody)
        node = await record(consul)
        assert node is not None
        assert node["Meta"] == CREATED_META


async def test_service_that_comes_with_its_node_after_the_last_look_saves_it() -> None:
    """The registration changes the marked record back, which the removal notices."""
    async with real_consul() as consul:
        async with connected(consul) as client:
            await make_node(client)

        async def somebody() -> None:
            await register(consul, **WITH_NODE)

        assert "changes it" in await removed_through(consul, b"delete-cas", somebody)
        _, found = await consul.request("GET", f"/v1/catalog/node/{NODE}?consistent")
        assert set(found["Services"]) == {"db"}


async def test_token_that_may_not_see_others_removes_no_node() -> None:
    """Services that it cannot see would go with the node; with the right to read them the node goes."""
    ours = f'node "{NODE}" {{ policy = "write" }} service_prefix "pod--" {{ policy = "write" }} '
    async with real_consul(acl=True) as consul:
        blind = await make_token(consul, "blind", ours)
        seeing = await make_token(consul, "seeing", ours + 'service_prefix "" { policy = "read" }')
        async with connected(consul) as client:
            await make_node(client)
            await register(consul, SkipNodeUpdate=True)
        async with connected(consul, token=blind.secret) as client:
            assert "may not see" in await removal_of(client).remove()
        async with connected(consul, token=seeing.secret) as client:
            assert "on it" in await removal_of(client).remove()
            await consul.request("PUT", "/v1/catalog/deregister", {"Node": NODE, "ServiceID": "db"})
            assert await removal_of(client).remove() == ""
        assert await record(consul) is None
