"""Namespaces and partitions of Consul Enterprise, as the sandbox simulates them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from k8s_consul_registrar.consul.acl import Right, rights
from k8s_consul_registrar.consul.batches import Transactions
from k8s_consul_registrar.consul.catalog import CatalogRegistry
from k8s_consul_registrar.consul.client import ConsulClient
from k8s_consul_registrar.consul.lost_agents import LostAgents
from k8s_consul_registrar.consul.node import NodeRemoval
from k8s_consul_registrar.errors import ConsulRefused
from k8s_consul_registrar.sandbox.consul import Consul
from k8s_consul_registrar.sandbox.consul_model import Check, Service
from k8s_consul_registrar.sandbox.consul_release import NEWEST, ConsulOptions
from support.builders import our_pod_service, unaudited
from support.real_servers import held
from support.scripted import client_of, serving

NODE = "k8s-lab"
TEAM = "team"
ROOT, CONFINED = "root", "confined"


@asynccontextmanager
async def enterprise(token: str = ROOT) -> AsyncIterator[tuple[Consul, ConsulClient]]:
    """Run an Enterprise with ACLs, and a client in the namespace of a team."""
    async with Consul(ConsulOptions(NEWEST, is_enterprise=True, token=ROOT)) as consul:
        consul.tokens.create(CONFINED, namespace=TEAM)
        async with client_of(consul.url, token=token, namespace=TEAM) as client:
            yield consul, client


def removal(client: ConsulClient) -> NodeRemoval:
    """Return the removal of our node."""
    return NodeRemoval(client, Transactions(client), NODE, has_our_name=True)


async def test_services_have_the_namespace_of_the_settings() -> None:
    """They are written, read, looked up and removed there, beside another's of the same ID."""
    service = our_pod_service("a")
    async with enterprise() as (consul, client):
        registry = CatalogRegistry(client, NODE)
        assert (await registry.register([service])).done == 1
        with consul.catalog.apply():
            consul.catalog.put_service(NODE, Service(service.id, "another", namespace="other"))
        assert await held(registry) == {service.id: service}
        (found,) = [one async for one in registry.lookup([service.id, "none"])]
        assert (await registry.deregister([found])).done == 1
        assert [one.namespace for one in consul.catalog.services_of(NODE)] == ["other"]


@pytest.mark.parametrize("others", ["a service", "a check"])
async def test_node_that_another_namespace_uses_is_not_removed(others: str) -> None:
    """It goes once that namespace has left it, too."""
    async with enterprise() as (consul, client):
        registry = CatalogRegistry(client, NODE)
        await registry.register([our_pod_service("a")])
        await registry.deregister(list((await held(registry)).values()))
        with consul.catalog.apply():
            consul.catalog.put_service(NODE, Service("db", "db", namespace="other"))
            consul.catalog.put_check(Check(NODE, "ping", service_id="db", namespace="other"))
            if others == "a check":
                consul.catalog.put_check(Check(NODE, "disk", namespace="other"))
                consul.catalog.drop_service(NODE, "other\0db")
        assert "of others on it" in await removal(client).remove()
        assert consul.catalog.node(NODE) is not None
        with consul.catalog.apply():
            consul.catalog.drop_service(NODE, "other\0db")
            consul.catalog.drop_check(NODE, "other\0disk")
        assert await removal(client).remove() == ""
        assert consul.catalog.node(NODE) is None


async def test_token_of_one_namespace_removes_no_node() -> None:
    """It cannot see what other namespaces have there."""
    async with enterprise(CONFINED) as (consul, client):
        registry = CatalogRegistry(client, NODE)
        await registry.register([our_pod_service("a")])
        await registry.deregister(list((await held(registry)).values()))
        with consul.catalog.apply():
            consul.catalog.put_service(NODE, Service("db", "db", namespace="other"))
        assert await removal(client).is_used(), "what ACLs filtered may be anything"
        assert "may not see" in await removal(client).remove()
        assert consul.catalog.node(NODE) is not None


async def test_each_question_about_services_names_namespace_and_partition() -> None:
    """Consul heeds no `?ns` there; a node is in a partition only."""
    asked: list[dict[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        questions = await request.json()
        asked.extend(questions)
        return web.json_response([{**one, "Allow": True} for one in questions])

    questions = [
        Right("service", "x", "read"),
        Right("service", "x", "read", "default"),
        Right("node", "n", "write"),
    ]
    async with serving(answer) as url, client_of(url, namespace=TEAM, partition="p1") as client:
        assert await rights(client, questions) == [True] * 3
    assert [(one.get("Namespace"), one.get("Partition")) for one in asked] == [
        (TEAM, "p1"),
        ("default", "p1"),
        (None, "p1"),
    ]


async def test_rights_are_those_in_our_namespace() -> None:
    """A token that has them there only may write there, and is not asked about another namespace."""
    needed = [Right("service", "x", "write"), Right("node", NODE, "write")]
    async with enterprise(CONFINED) as (consul, client):
        assert await rights(client, needed) == [True, True]
        async with client_of(consul.url, token=CONFINED, namespace="other") as elsewhere:
            assert await rights(elsewhere, needed) == [False, True]


async def test_agents_node_is_known_by_its_check_in_the_default_namespace() -> None:
    """The check `serfHealth` is never looked for in ours, where it is not."""
    async with enterprise() as (consul, client):
        node = consul.catalog.node("agent-1")
        assert node is not None
        with consul.catalog.apply():
            consul.catalog.put_node(type(node)("agent-1", "127.0.0.1", meta={"external-node": "true"}))
        with pytest.raises(ConsulRefused, match="is an agent's"):
            await CatalogRegistry(client, "agent-1").register([our_pod_service("a")])


async def test_lost_agents_are_found_from_another_namespace() -> None:
    """Their services in ours are removed, as long as the check says what it said."""
    async with enterprise() as (consul, client):
        consul.peer("agent-2", is_server=False)
        check = consul.catalog.check("agent-2", "serfHealth")
        assert check is not None
        service = our_pod_service("a")
        with consul.catalog.apply():
            consul.catalog.put_service(
                "agent-2", Service(service.id, service.name, meta=dict(service.meta), namespace=TEAM)
            )
            consul.catalog.put_check(Check("agent-2", "serfHealth", check.name, "critical"))
        agents = LostAgents(client)
        (lost,) = await agents.failing()
        assert lost.node == "agent-2"
        cleared = await agents.location(lost, lambda _: True).clear(unaudited)
        assert (cleared.done, consul.catalog.services_of("agent-2")) == (1, [])
